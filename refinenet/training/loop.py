"""Training with the authors' recipe: phases, steps, the curve, exact resume (paper, section 4).

Everything random in a step is drawn from (seed, step), so the state of a training is its weights, its momentum, the
number of steps done and the losses since the last point of the curve. A run that is killed and started again gives
bit-identical results. In a step the host never waits for the device: it reads the losses every `log_every` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinenet.config import Recipe
from refinenet.data.augment import Batch
from refinenet.data.crops import Crops, Samples
from refinenet.data.loader import Loader
from refinenet.errors import UserError
from refinenet.model.network import RefineNet
from refinenet.training import checkpoints as stored
from refinenet.training.distributed import ProcessGroup
from refinenet.training.initial import crops_of
from refinenet.training.step import loss_sum_and_count, lr_at_step, make_optimiser, wrap_for_training


@dataclass
class Point:
    """A point of the training curve: mean loss of the steps since the last one; learning rate of the new layers."""

    step: int
    loss: float
    lr: float


@dataclass
class Progress:
    """Passed to `on_step` after each step; `point`: the point of the curve that this step completed, else None."""

    step: int
    point: Point | None


@dataclass(frozen=True)
class Phase:
    """A phase of a training: `steps` steps on `images`, at learning rate `lr` (None: the recipe's).

    The recipe's schedule runs over this phase's steps; the momentum starts at 0.
    """

    images: Samples
    steps: int
    lr: float | None = None


class Stopped(Exception):  # noqa: N818 - not an error, the training can be resumed
    """The training stopped after `step` steps because it was asked to; it resumes from the checkpoint `path`."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"stopped after step {step}; goes on from {path}")
        self.step, self.path = step, path


@dataclass
class _State:
    step: int = 0
    curve: list[Point] = field(default_factory=list)
    # Loss and gradient norm of each step since the last point, on the device.
    pending: list[Tensor] = field(default_factory=list)
    # The optimiser's state from a checkpoint, and the phase it belongs to.
    optimiser: dict[str, Any] | None = None
    phase: int = 0


def train(
    model: RefineNet,
    images: Samples | Sequence[Phase],
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    fingerprint: str,
    on_step: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    due: Callable[[], bool] = lambda: False,
    processes: ProcessGroup | None = None,
) -> list[Point]:
    """Train `model` in place and return the curve.

    Args:
        model: on the device to train on, with its initial weights.
        images: what to train on for the recipe's steps, or phases, one after the other.
        recipe: settings of the training.
        seed: of crops and dropout.
        checkpoints: their folder. Training resumes from the newest whole one with the same fingerprint. The caller
            removes the folder once the result is safe.
        fingerprint: digest of everything that the result depends on.
        on_step: called after each step.
        stop: polled after each step; True: write a checkpoint and raise Stopped.
        due: polled after each step, in the first process; True: write a checkpoint. One is always written at the end.
            At which steps does not change the result.
        processes: each computes its share of every batch; the first one writes checkpoints.

    Raises:
        Stopped: `stop` returned True.
        UserError: a loss or a gradient is not finite; names the step and its images.
    """
    phases = images if isinstance(images, Sequence) else [Phase(images, recipe.steps)]
    processes = processes or ProcessGroup()
    if recipe.batch_size < processes.world:
        raise UserError(
            f"train.batch_size is {recipe.batch_size} and there are {processes.world} processes, "
            "expected an image for each"
        )
    model.train()
    with wrap_for_training(model, recipe, processes) as network, stored.Store(checkpoints) as store:
        run = _Run(model, network, recipe, seed, store, fingerprint, processes)
        run.resume()
        begin = 0
        for number, phase in enumerate(phases):
            if run.state.step < begin + phase.steps:
                run.phase(number, begin, phase, on_step, stop, due, last=number == len(phases) - 1)
            begin += phase.steps
        run.processes.barrier()
    model.eval()
    return run.state.curve


@dataclass
class _Run:
    model: RefineNet
    network: Callable[[Tensor], Tensor]
    recipe: Recipe
    seed: int
    store: stored.Store
    fingerprint: str
    processes: ProcessGroup
    state: _State = field(default_factory=_State)
    optimiser: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device

    def phase(
        self,
        number: int,
        begin: int,
        phase: Phase,
        on_step: Callable[[Progress], None],
        stop: Callable[[], bool],
        due: Callable[[], bool],
        last: bool,
    ) -> None:
        """Run the remaining steps of a phase."""
        recipe, state = self.recipe, self.state
        own = replace(recipe, steps=phase.steps, lr=phase.lr or recipe.lr)
        self.optimiser = make_optimiser(self.model, recipe)
        if state.optimiser is not None and state.phase == number:
            self.optimiser.load_state_dict(state.optimiser)
        state.phase, state.optimiser = number, None
        crops = crops_of(phase.images, recipe, self.seed)
        end = begin + phase.steps
        with Loader(
            crops,
            recipe.batch_size,
            recipe.crop,
            recipe.input_scale,
            self.device,
            self.processes.rank,
            self.processes.world,
            state.step,
            end,
        ) as loader:
            for batch in loader:
                lr = lr_at_step(own, state.step - begin)
                state.pending.append(self._step(batch, lr))
                state.step += 1
                point = None
                if state.step % recipe.log_every == 0 or state.step == end:
                    # The only place where the host waits for the device.
                    point = Point(state.step, float(self._checked(crops)[:, 0].double().mean()), lr)
                    state.curve.append(point)
                    state.pending.clear()
                on_step(Progress(state.step, point))
                done = last and state.step == end
                # All processes save after the same step: the losses in a checkpoint are a sum over all of them.
                stopping, saving = self.processes.any(stop(), self.processes.first and due())
                if stopping or saving or done:
                    path = self.save(crops)
                if stopping and not done:
                    self.store.wait()
                    self.processes.barrier()
                    raise Stopped(state.step, path)

    def _step(self, batch: Batch, lr: float) -> Tensor:
        """Run one step; return its loss and gradient norm, 2 values on the device, without waiting for them."""
        assert self.optimiser is not None
        # So that dropout does not depend on what this process did before; each process draws its own masks.
        torch.manual_seed(self.seed * 1_000_003 + self.state.step + (self.processes.rank << 40))
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        total, count = loss_sum_and_count(self.network(batch.images), batch.labels)
        loss = total / self.processes.all_reduce_sum(count).clamp_min(1)
        self.optimiser.zero_grad(set_to_none=True)
        # Times the number of processes, because DDP averages gradients over them.
        (loss * self.processes.world if self.processes.world > 1 else loss).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.recipe.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.grad_clip, norm)
        self.optimiser.step()
        return torch.stack((loss.detach(), norm))

    def _pending(self) -> Tensor:
        """Return loss (over all processes) and gradient norm of each step since the last point, N x 2, on the host."""
        if not self.state.pending:
            return torch.zeros(0, 2)
        both = torch.stack([entry.to(self.device) for entry in self.state.pending])
        return torch.stack((self.processes.all_reduce_sum(both[:, 0].contiguous()), both[:, 1]), 1).cpu()

    def _checked(self, crops: Crops) -> Tensor:
        """Return `_pending`; raise UserError where a value is not finite."""
        pending = self._pending()
        for index, row in enumerate(pending.tolist()):
            for what, value in zip(("loss", "gradient"), row, strict=True):
                if not math.isfinite(value):
                    step = self.state.step - len(pending) + index
                    names = ", ".join(window.name for window in crops.draw(step, self.recipe.batch_size))
                    raise UserError(
                        f"{what} is {value} in step {step + 1} on {names}; "
                        f"last good checkpoint: {self.store.last() or 'none'}"
                    )
        return pending

    def save(self, crops: Crops) -> Path:
        """Start to write a checkpoint (first process only). Raises UserError where a loss or gradient is not finite."""
        state, path = self.state, self.store.path(self.state.step)
        pending = self._checked(crops)
        if not self.processes.first:
            return path

        def content() -> dict[str, Any]:
            assert self.optimiser is not None
            return {
                "fingerprint": self.fingerprint,
                "step": state.step,
                "phase": state.phase,
                "curve": [(p.step, p.loss, p.lr) for p in state.curve],
                "pending": pending,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": _random_states(self.device),
            }

        return self.store.save(state.step, content)

    def resume(self) -> None:
        """Load the newest whole checkpoint of this training, if there is one; the first process decides which."""
        found = stored.newest(self.store.folder, self.fingerprint) if self.processes.first else None
        step = int(self.processes.all_reduce_sum(torch.tensor(found[1]["step"] if found else 0)))
        if self.processes.world > 1:
            # DDP fixes the order in which it sums gradients in the first backward pass. This extra one makes the order
            # the same before and after a resume.
            side = round(self.recipe.crop * self.recipe.input_scale)
            (self.network(torch.zeros(1, 3, side, side, device=self.device)).sum() * 0).backward()  # type: ignore[no-untyped-call]
        if not step:
            return
        content = found[1] if found else stored.read(self.store.path(step))
        self.model.load_state_dict(content["model"])
        for state, restore in zip(content["random"], _restorers(self.device), strict=False):
            restore(state)
        # The stored losses are already summed over the processes: only the first process contributes them.
        pending = content["pending"] * torch.tensor([float(self.processes.first), 1.0])
        curve = [Point(*row) for row in content["curve"]]
        self.state = _State(step, curve, list(pending), content["optimiser"], content["phase"])


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the state of every generator that a step could use; each step seeds them anew, this is a safeguard."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restorers(device: torch.device) -> list[Callable[[Tensor], None]]:
    return [torch.set_rng_state, lambda state: torch.cuda.set_rng_state(state, device)][: 1 + (device.type == "cuda")]
