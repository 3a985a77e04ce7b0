"""Training with the authors' recipe: phases, steps, the curve, exact resume (paper, section 4).

Everything random in a step is drawn from (seed, step), so the state of a training is its weights, its momentum, the
number of steps done and the losses since the last point of the curve; with images held out, also the best weights. A
run that is killed and started again gives bit-identical results. In a step the host never waits for the device: it
reads the losses every `log_every` steps.
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
from refinenet.data.subset import Subset, held_out_names
from refinenet.errors import UserError
from refinenet.model.network import RefineNet
from refinenet.training import checkpoints as stored
from refinenet.training.distributed import ProcessGroup
from refinenet.training.held_out import HeldOut
from refinenet.training.initial import crops_of
from refinenet.training.step import loss_sum_and_count, lr_at_step, make_optimiser, wrap_for_training


@dataclass
class Point:
    """A point of the training curve: mean loss of the steps since the last one; learning rate of the new layers.

    `held_out`: mean IoU on the held-out images after this step, a fraction; None where nobody looked.
    """

    step: int
    loss: float
    lr: float
    held_out: float | None = None


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


def hold_out(phases: Sequence[Phase], recipe: Recipe, seed: int) -> tuple[list[Phase], HeldOut | None]:
    """Return the phases without the images that the recipe holds out, and those; as they are and None for a share of 0.

    They are drawn by their names from the last phase's images, which are what the network is made for, and no phase
    keeps an image with such a name: earlier phases often have the last one's images, too.

    Raises:
        UserError: fewer than two images are held out, or left in a phase; none that is held out has a label.
    """
    if not recipe.hold_out:
        return list(phases), None
    names = [[phase.images[index].name for index in range(len(phase.images))] for phase in phases]
    held = held_out_names(names[-1], recipe.hold_out, seed)
    kept = [[index for index, name in enumerate(some) if name not in held] for some in names]
    out = [index for index, name in enumerate(names[-1]) if name in held]
    for some, left in zip(names, kept, strict=True):
        if min(len(out), len(left)) < 2:
            raise UserError(
                f"train.hold_out is {recipe.hold_out}: holds out {len(out)} and leaves {len(left)} of {len(some)} "
                "training images, expected 2 or more of each"
            )
    parts = [replace(phase, images=Subset(phase.images, left)) for phase, left in zip(phases, kept, strict=True)]
    return parts, HeldOut(Subset(phases[-1].images, out), recipe)


def best(curve: Sequence[Point]) -> Point | None:
    """Return the point with the best score on the held-out images, of equals the first; None without scores."""
    return max((p for p in curve if p.held_out is not None), key=lambda point: point.held_out or 0.0, default=None)


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
    # Of the step that scored best on the held-out images, on the host.
    best: dict[str, Tensor] | None = None


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

    With `recipe.hold_out` a part of the images is never trained on (`hold_out` says which). In the last phase the
    network is scored on it every `recipe.hold_out_every` steps and at the end, and ends with the weights of the best of
    these steps. A look completes a point of the curve.

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
        processes: each computes its share of every batch, and of the held-out images; the first one writes checkpoints.

    Raises:
        Stopped: `stop` returned True.
        UserError: a loss or a gradient is not finite; names the step and its images. Too few images to hold some out.
    """
    whole = images if isinstance(images, Sequence) else [Phase(images, recipe.steps)]
    processes = processes or ProcessGroup()
    if recipe.batch_size < processes.world:
        raise UserError(
            f"train.batch_size is {recipe.batch_size} and there are {processes.world} processes, "
            "expected an image for each"
        )
    phases, held_out = hold_out(whole, recipe, seed)
    model.train()
    with wrap_for_training(model, recipe, processes) as network, stored.Store(checkpoints) as store:
        run = _Run(model, network, recipe, seed, store, fingerprint, processes)
        run.resume()
        begin = 0
        for number, phase in enumerate(phases):
            last = number == len(phases) - 1
            if run.state.step < begin + phase.steps:
                run.phase(number, begin, phase, on_step, stop, due, last, held_out if last else None)
            begin += phase.steps
        run.processes.barrier()
    if run.state.best is not None:
        model.load_state_dict(run.state.best)
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
        held_out: HeldOut | None,
    ) -> None:
        """Run the remaining steps of a phase; look at `held_out` in between and at the end."""
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
                looks = held_out is not None and (state.step % recipe.hold_out_every == 0 or state.step == end)
                if state.step % recipe.log_every == 0 or state.step == end or looks:
                    # The only place where the host waits for the device.
                    point = Point(state.step, float(self._checked(crops)[:, 0].double().mean()), lr)
                    state.curve.append(point)
                    state.pending.clear()
                    if held_out is not None and looks:
                        self._look(held_out, point)
                on_step(Progress(state.step, point))
                done = last and state.step == end
                # All processes save after the same step: the losses in a checkpoint are a sum over all of them.
                stopping, saving = self.processes.any(stop(), self.processes.first and due())
                if stopping or saving or done:
                    path = self.save()
                if stopping and not done:
                    self._checked(crops)
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

    def _look(self, held_out: HeldOut, point: Point) -> None:
        """Score the network for `point`, the curve's last; keep its weights if they are the best so far."""
        point.held_out = held_out.score(self.model, self.processes)
        if best(self.state.curve) is point:
            weights = self.model.state_dict()
            # A dictionary of its own: a checkpoint that is being written keeps the one before.
            self.state.best = {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}

    def _pending(self) -> Tensor:
        """Return loss (over all processes) and gradient norm of each step since the last point, N x 2."""
        if not self.state.pending:
            return torch.zeros(0, 2, device=self.device)
        both = torch.stack(self.state.pending)
        return torch.stack((self.processes.all_reduce_sum(both[:, 0].contiguous()), both[:, 1]), 1)

    def _checked(self, crops: Crops) -> Tensor:
        """Return `_pending`, on the host, which waits for it; raise UserError where a value is not finite."""
        pending = self._pending().cpu()
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

    def save(self) -> Path:
        """Start to write a checkpoint (first process only), without waiting for the device; return its path.

        Where a loss or gradient since the last point of the curve is not finite nothing is written: the next point, or
        a stop, raises the error.
        """
        state, path = self.state, self.store.path(self.state.step)
        pending = self._pending()
        if not self.processes.first:
            return path

        def content() -> dict[str, Any]:
            assert self.optimiser is not None
            return {
                "fingerprint": self.fingerprint,
                "step": state.step,
                "phase": state.phase,
                "curve": [(p.step, p.loss, p.lr, p.held_out) for p in state.curve],
                "pending": pending,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": _random_states(self.device),
            }

        def sound(found: dict[str, Any]) -> bool:
            return bool(found["pending"].isfinite().all())

        return self.store.save(state.step, content, {"best": state.best}, sound)

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
        pending = (content["pending"] * torch.tensor([float(self.processes.first), 1.0])).to(self.device)
        curve = [Point(*row) for row in content["curve"]]
        self.state = _State(step, curve, list(pending), content["optimiser"], content["phase"], content["best"])


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the state of every generator that a step could use; each step seeds them anew, this is a safeguard."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restorers(device: torch.device) -> list[Callable[[Tensor], None]]:
    return [torch.set_rng_state, lambda state: torch.cuda.set_rng_state(state, device)][: 1 + (device.type == "cuda")]
