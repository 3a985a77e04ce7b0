"""The input path of a training: windows are drawn and copied one or two steps ahead, so that no step waits for them.

A thread draws the windows of the next steps and copies their bytes from the memory-mapped split (numpy leaves the
interpreter to others meanwhile). For a GPU it copies into pinned memory, and from there in one copy on a stream of its
own; scale, flip and padding are a few kernels a window on the training's stream, which waits for the copy without the
host knowing. On a CPU the thread draws and copies and does nothing else: the cores are the training's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from refinenet.data.augment import Batch, copy_windows, resize_windows
from refinenet.data.crops import Crops, Window
from refinenet.errors import UserError
from refinenet.training.distributed import ProcessGroup


class _Copied(NamedTuple):
    """The windows of a step; their pixels, which are on their way to the device until `sent`."""

    windows: list[Window]
    pixels: Tensor
    sent: torch.cuda.Event | None


class Loader(Iterator[Batch]):
    """Iterates over the batches of steps `start`, `start` + 1, ...: of each `make_batch(crops.draw(step, batch), ...)`.

    A context manager; `close` ends the thread, as do the end of the program and of the object. What goes wrong in the
    thread is raised by `next`.

    Args:
        crops: draws the windows.
        batch: windows a step, of all processes together.
        crop, input_scale, device: as of `make_batch`.
        rank, world: this process's number and how many there are. It gets its share of each step's windows
            (`ProcessGroup.share`), padded as in the whole batch.
        start: the first step.
        stop: the step before which to end; None: never.
        ahead: steps that are prepared while one is computed, 0 for no thread. The batches are the same.
    """

    def __init__(
        self,
        crops: Crops,
        batch: int,
        crop: int,
        input_scale: float,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        stop: int | None = None,
        ahead: int = 2,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if batch < world:
            raise UserError(
                f"train.batch_size is {batch}, expected one image or more for each of the {world} processes"
            )
        self._crops, self._batch, self._crop, self._input_scale = crops, batch, crop, input_scale
        self._device, self._share = device, ProcessGroup(rank, world).share(batch)
        self._steps: Iterator[int] = count(start) if stop is None else iter(range(start, stop))
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "loader") if ahead else None
        self._copies: deque[Callable[[], _Copied]] = deque()  # of the next steps; to call one waits for it
        self._look_ahead(ahead)

    def __next__(self) -> Batch:
        """Return the next step's batch; StopIteration after the last, and once closed."""
        self._look_ahead(self._ahead + 1)
        if not self._copies:
            self.close()
            raise StopIteration
        try:
            copied = self._copies.popleft()()
        except BaseException:
            self.close()
            raise
        if copied.sent is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied.sent)
            copied.pixels.record_stream(stream)
        return resize_windows(copied.windows, copied.pixels, self._crop, self._input_scale, self._batch > 1)

    def _look_ahead(self, steps: int) -> None:
        """Have the copies of so many steps begun, or of all that are left."""
        for step in islice(self._steps, steps - len(self._copies)):
            if self._thread:
                self._copies.append(self._thread.submit(self._copy, step).result)
            else:
                self._copies.append(partial(self._copy, step))

    def _copy(self, step: int) -> _Copied:
        """Draw this process's windows of a step and send them off."""
        windows = [self._crops.window(draw) for draw in self._crops.plan(step, self._batch)[self._share]]
        if self._stream is None:
            return _Copied(windows, copy_windows(windows, self._device), None)
        with torch.cuda.stream(self._stream):
            return _Copied(windows, copy_windows(windows, self._device), self._stream.record_event())

    def close(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._steps = iter(())
        self._copies.clear()
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
