"""Dense CRFs in processes beside the network, for many images: the labels are those of `crf_labels`.

A CRF holds Python's lock for the second or more that it takes, so threads would stand in line. The processes are
started anew, not forked, which a process that uses CUDA must not be; each imports NumPy and what the main module
imports at its top (0.3 s for `evaluate`), and nothing of PyTorch. Like every use of `spawn` it wants the main module of
a script under `if __name__ == "__main__":`.

Pixels and probabilities go there, and labels come back, through memory that all share: through a pipe, a process that
is killed in the middle of a label map would leave this one waiting for the rest for ever. No more images are in flight
than that memory has slots. A slot takes what the largest image that was in it took, for C outputs 4 C + 4 bytes a
pixel.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import reduction
from types import TracebackType
from typing import IO, Any

import numpy as np

from refinenet.data.split import Array
from refinenet.errors import UserError
from refinenet.inference.crf import Floats, crf_labels

AHEAD = 2  # images in flight for each process: one that it does, one that is next
_SPACING = 1 << 36  # bytes from slot to slot; only what is used takes memory

_Shape = tuple[int, int, int]  # outputs, height, width


class Refinement:
    """The labels of one image, which may not be computed yet."""

    def __init__(self, future: Future[None], labels: Array) -> None:
        self._future, self._shared = future, labels
        self._own: Array | None = None

    def done(self) -> bool:
        """Return whether `labels` would not wait."""
        return self._future.done()

    def killed(self) -> bool:
        """Return whether it will never be there, because a process was killed."""
        return self._future.done() and isinstance(self._future.exception(), BrokenProcessPool)

    def labels(self) -> Array:
        """Return H x W uint8, once they are there. Raises UserError where a process was killed."""
        if self._own is None:
            try:
                self._future.result()
            except BrokenProcessPool:
                raise _killed() from None
            self._own = self._shared.copy()  # the slot is used again
        return self._own


class CRFProcesses:
    """Up to `count` processes, started with the first image, ended with the `with` block and with this process.

    Where the block ends by an exception, Ctrl-C among them, they are killed, whatever they are at.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._in_flight: deque[tuple[int, Refinement]] = deque()
        self._free = deque(range(AHEAD * count))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> CRFProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for process in list((self._pool._processes or {}).values()):  # kill_workers() of Python 3.14
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._memory.close()

    def submit(self, image: Array, probabilities: Floats) -> Refinement:
        """Begin `crf_labels(image, probabilities)`. Waits for the oldest image where all slots are in use.

        Raises UserError where a process was killed.
        """
        if self._pool is None:
            self._memory = os.fdopen(os.memfd_create("crf"), "r+b", buffering=0)
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, _begin, (_Shared(self._memory.fileno()),))
        if not self._free:
            slot, oldest = self._in_flight.popleft()
            oldest.labels()
            self._free.append(slot)
        slot = self._free.popleft()
        shape = (probabilities.shape[0], probabilities.shape[1], probabilities.shape[2])
        there, pixels, labels = _views(self._memory, slot, shape)
        there[:], pixels[:] = probabilities, image
        try:
            with _ctrl_c_waits():
                future = self._pool.submit(_label, slot, shape)
        except Exception as error:
            # While one is started, another that is killed closes what the new one is to inherit: any error.
            if isinstance(error, BrokenProcessPool) or any(other.killed() for _, other in self._in_flight):
                raise _killed() from None
            raise
        refinement = Refinement(future, labels)
        self._in_flight.append((slot, refinement))
        return refinement


def _killed() -> UserError:
    return UserError(
        "a process of the dense CRF was killed or crashed; if memory ran out: PIPELINE_CORES=1 needs the least"
    )


def _views(memory: IO[bytes], slot: int, shape: _Shape) -> tuple[Floats, Array, Array]:
    """Return what a slot holds: outputs x H x W, H x W x 3 and H x W."""
    outputs, height, width = shape
    size = height * width
    mapped = np.asarray(np.memmap(memory, np.uint8, "r+", slot * _SPACING, (4 * outputs + 4) * size))
    given, pixels, labels = np.split(mapped, [4 * outputs * size, (4 * outputs + 3) * size])
    return given.view(np.float32).reshape(shape), pixels.reshape(height, width, 3), labels.reshape(height, width)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Keep Ctrl-C for the end of the block. Processes started in it never get it; it goes to all of a terminal's."""
    came: list[int] = []
    # Blocked, as those inherit; and handled, for other threads of this process are not blocked.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


class _Shared:
    """A file descriptor that a process inherits which is started with this object among its arguments."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _inherited, (reduction.DupFd(self.descriptor),)


# From here on: in a worker.

_memory: IO[bytes]


def _inherited(duplicate: Any) -> _Shared:
    return _Shared(duplicate.detach())


def _begin(shared: _Shared) -> None:
    global _memory
    _memory = os.fdopen(shared.descriptor, "r+b", buffering=0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _label(slot: int, shape: _Shape) -> None:
    probabilities, image, labels = _views(_memory, slot, shape)
    labels[:] = crf_labels(image, probabilities)
