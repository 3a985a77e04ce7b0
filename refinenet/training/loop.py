"""Training with the authors' recipe: phases, steps, the curve, exact resume (paper, section 4).

Everything random in a step is drawn from (seed, step), so the state of a training is its weights, its momentum, the
number of steps done and the losses since the last line of the curve. A run that is killed and started again ends in
the same bytes. In a step the host never waits for the device: it reads the losses every `log_every` steps.
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
    """One line of the training curve: the mean loss of the steps since the last, and the rate of the new layers."""

    step: int
    loss: float
    lr: float


@dataclass
class Progress:
    """What the outside is told after each step; `point` where a line of the curve was just completed."""

    step: int
    point: Point | None


@dataclass(frozen=True)
class Phase:
    """One stretch of a training: `steps` steps on `images`, from the rate `lr` (None: the recipe's) with no momentum.

    The schedule is the recipe's over this phase's own steps.
    """

    images: Samples
    steps: int
    lr: float | None = None


class Stopped(Exception):  # noqa: N818 - no error, it goes on later
    """The training was asked to stop. It did after `step` steps, and goes on from the checkpoint `path`."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"stopped after step {step}; goes on from {path}")
        self.step, self.path = step, path


@dataclass
class _State:
    step: int = 0
    curve: list[Point] = field(default_factory=list)
    # Of each step since the last point: loss and norm of the gradient, on the device.
    pending: list[Tensor] = field(default_factory=list)
    # Of the optimiser, as a checkpoint had it, and the phase it belongs to.
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
    processes: ProcessGroup | None = None,
) -> list[Point]:
    """Train `model` in place and return the curve; on `images` for the recipe's steps, or phase by phase.

    Checkpoints go to the folder `checkpoints`; the newest whole one with the same `fingerprint` (a digest of all that
    the result depends on) is where training starts. The caller removes the folder once the result is safe. `stop` is
    asked after each step. Of several `processes` each computes its share of every batch; the first one writes.

    Raises Stopped where `stop` said so, and UserError where a loss or a gradient is no longer finite; it names the
    step and its images.
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
                run.phase(number, begin, phase, on_step, stop, last=number == len(phases) - 1)
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
        self.saved = 0

    def phase(
        self,
        number: int,
        begin: int,
        phase: Phase,
        on_step: Callable[[Progress], None],
        stop: Callable[[], bool],
        last: bool,
    ) -> None:
        """The steps of a phase that are still to do."""
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
                done = last and state.step == end
                if state.step - self.saved >= recipe.checkpoint_every or done:
                    self.save(crops)
                on_step(Progress(state.step, point))
                if self.processes.any(stop()) and not done:
                    path = self.save(crops)
                    self.store.wait()
                    self.processes.barrier()
                    raise Stopped(state.step, path)

    def _step(self, batch: Batch, lr: float) -> Tensor:
        """One step; its loss and the norm of its gradient, which are on their way on the device."""
        assert self.optimiser is not None
        # Dropout too must not depend on what this process did before; processes draw masks of their own.
        torch.manual_seed(self.seed * 1_000_003 + self.state.step + (self.processes.rank << 40))
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        total, count = loss_sum_and_count(self.network(batch.images), batch.labels)
        loss = total / self.processes.all_reduce_sum(count).clamp_min(1)
        self.optimiser.zero_grad(set_to_none=True)
        # Times the processes, over which gradients are averaged.
        (loss * self.processes.world if self.processes.world > 1 else loss).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.recipe.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.recipe.grad_clip, norm)
        self.optimiser.step()
        return torch.stack((loss.detach(), norm))

    def _pending(self) -> Tensor:
        """Loss (over all processes) and gradient norm of each step since the last point, N x 2, on the host."""
        if not self.state.pending:
            return torch.zeros(0, 2)
        both = torch.stack([entry.to(self.device) for entry in self.state.pending])
        return torch.stack((self.processes.all_reduce_sum(both[:, 0].contiguous()), both[:, 1]), 1).cpu()

    def _checked(self, crops: Crops) -> Tensor:
        """The same; UserError where it is not finite."""
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
        """Begin to write a checkpoint; the first process does. Never one that has gone wrong: UserError as above."""
        state, path = self.state, self.store.path(self.state.step)
        pending = self._checked(crops)
        self.saved = state.step
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
        """Go on from the newest whole checkpoint of this training, if there is one: the first process says which."""
        found = stored.newest(self.store.folder, self.fingerprint) if self.processes.first else None
        step = int(self.processes.all_reduce_sum(torch.tensor(found[1]["step"] if found else 0)))
        if self.processes.world > 1:
            # PyTorch settles in the first backward pass in which order it sums gradients over processes. That is one
            # of its own, so that steps before and after a resume do not differ in it.
            side = round(self.recipe.crop * self.recipe.input_scale)
            (self.network(torch.zeros(1, 3, side, side, device=self.device)).sum() * 0).backward()  # type: ignore[no-untyped-call]
        if not step:
            return
        content = found[1] if found else stored.read(self.store.path(step))
        self.model.load_state_dict(content["model"])
        for state, restore in zip(content["random"], _restorers(self.device), strict=False):
            restore(state)
        # The losses are sums over the processes already: the first has them.
        pending = content["pending"] * torch.tensor([float(self.processes.first), 1.0])
        curve = [Point(*row) for row in content["curve"]]
        self.state = _State(step, curve, list(pending), content["optimiser"], content["phase"])
        self.saved = step


def _random_states(device: torch.device) -> list[Tensor]:
    """Of every generator that a step could use. Each step seeds them anew; they are kept so that nothing is missed."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restorers(device: torch.device) -> list[Callable[[Tensor], None]]:
    return [torch.set_rng_state, lambda state: torch.cuda.set_rng_state(state, device)][: 1 + (device.type == "cuda")]
