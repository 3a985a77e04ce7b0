"""The input path of a training: windows are drawn and copied one or two steps ahead, so that no step waits for them.

A thread draws the windows of the next steps and copies their bytes from the memory-mapped split into a buffer (numpy
leaves the interpreter to others meanwhile). For a GPU the buffer is pinned memory, and goes there in one copy on a
stream of its own; scale, flip and padding are some twenty kernels on the training's stream, which waits for the copy
without the host knowing. On a CPU the thread draws and copies and does nothing else: the cores are the training's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType

import torch

from refinenet.data.augment import Batch, BatchLayout
from refinenet.data.crops import Crops
from refinenet.errors import UserError
from refinenet.training.distributed import ProcessGroup


class Loader(Iterator[Batch]):
    """Iterates over the batches of steps `start`, `start` + 1, ...: those of `assemble(crops.draw(step, batch), ...)`.

    A context manager; `close` ends the thread, as do the end of the program and of the object. What goes wrong in the
    thread is raised by `next`.

    Args:
        crops: draws the windows.
        batch: windows a step, of all processes together.
        crop, input_scale, device: as of `assemble`.
        rank, world: this process's number and how many there are. It gets its share of each step's windows
            (`Processes.share`), padded as in the whole batch.
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
        share = ProcessGroup(rank, world).share(batch)
        self._feed = _Feed(crops, batch, crop, input_scale, device, share, start, stop)
        self._thread: threading.Thread | None = None
        self._slot = _Slot(device)
        if ahead:
            self._ready: SimpleQueue[_Filled | BaseException | None] = SimpleQueue()
            self._free: SimpleQueue[_Slot | None] = SimpleQueue()
            for slot in (self._slot, *(_Slot(device) for _ in range(ahead))):
                self._free.put(slot)
            # Not a method of this object, which the thread would keep alive.
            self._thread = threading.Thread(
                target=_run, args=(self._feed, self._free, self._ready), name="loader", daemon=True
            )
            self._thread.start()
            self._finalizer = weakref.finalize(self, _end, self._feed, self._free, self._thread)

    def __next__(self) -> Batch:
        """The next step's batch; StopIteration after the last, and once closed."""
        if self._feed.closed.is_set():
            raise StopIteration
        filled = self._ready.get() if self._thread else self._feed.fill(self._slot)
        if not isinstance(filled, _Filled):
            self.close()
            raise StopIteration if filled is None else filled
        batch = filled.batch()
        if self._thread:
            self._free.put(filled.slot)
        return batch

    def close(self) -> None:
        """End the thread; what it prepared is dropped."""
        self._feed.closed.set()
        if self._thread:
            self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Slot:
    """A buffer on the host and its copy on the device, which are the same on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = self.copy = torch.empty(0, dtype=torch.uint8)
        if device.type == "cuda":
            self.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # Blocking: to wait for it costs no core.
            self.read = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def make_room(self, size: int) -> None:
        """Wait until the device needs the slot's bytes no more, and have room for `size` others."""
        cuda = self.device.type == "cuda"
        if cuda:
            self.read.synchronize()
        if len(self.host) < size:
            size = -(-size // 2**20) * 2**20
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
            self.copy = torch.empty(size, dtype=torch.uint8, device=self.device) if cuda else self.host


class _Filled:
    """A slot with the windows of a step in it."""

    def __init__(self, slot: _Slot, packing: BatchLayout) -> None:
        self.slot, self.packing = slot, packing

    def send(self, stream: torch.cuda.Stream) -> None:
        """Begin the copy to the device, of the one stretch that is needed."""
        size = self.packing.size
        self.slot.copy[:size].copy_(self.slot.host[:size], non_blocking=True)
        self.slot.sent.record(stream)

    def batch(self) -> Batch:
        """Make the batch on the device; for the host it is done at once."""
        slot = self.slot
        if slot.device.type == "cpu":
            return self.packing.read(slot.host)
        if slot.device.type != "cuda":
            return self.packing.read(slot.host[: self.packing.size].to(slot.device))
        stream = torch.cuda.current_stream(slot.device)
        stream.wait_event(slot.sent)
        batch = self.packing.read(slot.copy)
        slot.copy.record_stream(stream)
        slot.read.record(stream)
        return batch


class _Feed:
    """Fills slots, step after step."""

    def __init__(
        self,
        crops: Crops,
        batch: int,
        crop: int,
        input_scale: float,
        device: torch.device,
        share: slice,
        start: int,
        stop: int | None,
    ) -> None:
        self._crops, self._batch, self._crop, self._input_scale = crops, batch, crop, input_scale
        self._share, self._step, self._stop = share, start, stop
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.closed = threading.Event()

    def fill(self, slot: _Slot) -> _Filled | None:
        """Put the next step's windows there and send them off; None after the last step."""
        if self._step == self._stop:
            return None
        windows = [self._crops.window(draw) for draw in self._crops.plan(self._step, self._batch)[self._share]]
        packing = BatchLayout(windows, self._crop, self._input_scale, self._batch > 1, self._device.type != "cpu")
        filled = _Filled(slot, packing)
        if self._stream is None:
            slot.make_room(packing.size)
            packing.write(windows, slot.host.numpy())
        else:
            with torch.cuda.stream(self._stream):
                slot.make_room(packing.size)
                packing.write(windows, slot.host.numpy())
                filled.send(self._stream)
        self._step += 1
        return filled


def _run(feed: _Feed, free: SimpleQueue[_Slot | None], ready: SimpleQueue[_Filled | BaseException | None]) -> None:
    try:
        while (slot := free.get()) is not None and not feed.closed.is_set():
            filled = feed.fill(slot)
            ready.put(filled)
            if filled is None:
                return
    except BaseException as error:
        ready.put(error)


def _end(feed: _Feed, free: SimpleQueue[_Slot | None], thread: threading.Thread) -> None:
    feed.closed.set()
    free.put(None)
    if thread is not threading.current_thread():  # where the collector finds the loader while the thread runs
        thread.join()
