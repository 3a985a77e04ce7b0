"""A split read by several processes, in the order of its list, for the one process that writes the file.

A worker decodes an image and its label, checks them and counts the classes. What it counted goes back through a pipe,
the pixels through memory that all processes share: pickled into the pipe they would cost a fifth more of the cores
(benchmarks/prepare.md), and a worker that is killed in the middle of them would leave this process waiting for the
rest for ever. No more images are in flight than that memory has slots, which bounds it whatever their number.

The workers are forked: they find the archives open and unpacked and the lists read, import nothing again, and need no
semaphores under names that a SIGKILL would leave behind. The other threads of this process at that moment hold no lock
that a worker takes.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from pipeline.datasets import Reader
from pipeline.formats import decode
from refinenet.allocator import keep_freed_memory
from refinenet.data.split import Array, Schema
from refinenet.data.writer import Facts, examine
from refinenet.errors import SHOWN, UserError, several

TOGETHER = 4  # images of a task: one by one, the pool's own work takes twice as much of the cores
AHEAD = 2  # tasks in flight for each worker: one that it does, one that is next or waits to be written
SLOT = 4 * decode.PIXELS  # bytes from slot to slot, of the largest image with its label; only what is used takes memory


class Example(NamedTuple):
    """What `SplitWriter.put` takes, and more. `image`: H x W x 3 uint8 RGB. `label`: H x W uint8, or None.

    `fingerprint`: of the image, as the reader makes it.
    """

    facts: Facts
    image: Array
    label: Array | None
    fingerprint: bytes = b""


Read = Callable[[Schema, Sequence[str]], Iterator[Example]]
_Found = tuple[Facts, bytes] | UserError  # facts and fingerprint of an image, or what is wrong with it


@contextmanager
def reading(reader: Reader, count: int, broken: list[str] | None = None) -> Iterator[Read]:
    """Yield `read(schema, images)`, which reads those images of `schema.split` in `count` processes, in their order.

    An example's pixels are to be used before the next is asked for. The first of the list that cannot be read raises
    its UserError, whichever process read it and when; or, with `broken`, its text is added there, and it is passed
    over. The processes end with the block, and with this process.
    """
    if count == 1:
        yield partial(_read_alone, reader, broken)
        return
    with os.fdopen(os.memfd_create("images"), "rb", buffering=0) as memory:
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(count, context, _begin, (reader, memory.fileno()))
        try:
            with _ctrl_c_waits():
                pool.submit(int)  # the first task forks all workers
            yield partial(_read_all, pool, memory, AHEAD * count, reader, broken)
        finally:
            pool.shutdown(cancel_futures=True)


def examined(reader: Reader, schema: Schema, image: str) -> Example:
    """Read an image of `schema.split`. UserError, naming where it comes from, for a label that is not of `schema`."""
    pixels, label = reader.read(schema.split, image)
    try:
        return Example(examine(schema, image, pixels, label), pixels, label, reader.fingerprint(pixels))
    except UserError as error:
        raise UserError(f"{reader.where(schema.split, image)}: {error}") from None


def _read_alone(reader: Reader, broken: list[str] | None, schema: Schema, images: Sequence[str]) -> Iterator[Example]:
    for image in images:
        try:
            example = examined(reader, schema, image)
        except UserError as error:
            _pass_over(error, broken)
        else:
            yield example


def _pass_over(error: UserError, broken: list[str] | None) -> None:
    if broken is None:
        raise error
    broken.append(str(error))
    if len(broken) == SHOWN:
        raise several(f"at least {SHOWN} files cannot be used", broken)


def _read_all(
    pool: ProcessPoolExecutor,
    memory: Any,
    tasks: int,
    reader: Reader,
    broken: list[str] | None,
    schema: Schema,
    images: Sequence[str],
) -> Iterator[Example]:
    read = 0
    try:
        for slot, found in _results(pool, tasks, schema, images):
            for facts in found:
                if isinstance(facts, UserError):
                    _pass_over(facts, broken)
                else:
                    yield _example(memory, slot, *facts)
                slot, read = slot + 1, read + 1
    except BrokenProcessPool:
        raise UserError(
            f"{reader.raw}: a process that read {images[read]} or one soon after was killed or crashed; "
            "if memory ran out: PIPELINE_CORES=1 needs the least"
        ) from None


def _results(
    pool: ProcessPoolExecutor, tasks: int, schema: Schema, images: Sequence[str]
) -> Iterator[tuple[int, list[_Found]]]:
    """What was found of TOGETHER images each time, and the slot of the first; it is used again for later ones.

    `tasks`: how many the pool may have.
    """
    in_flight: deque[tuple[int, Future[list[_Found]]]] = deque()
    for start, slot in zip(range(0, len(images), TOGETHER), cycle(range(0, tasks * TOGETHER, TOGETHER)), strict=False):
        if len(in_flight) == tasks:
            first, future = in_flight.popleft()
            yield first, future.result()
        in_flight.append((slot, pool.submit(_read, schema, images[start : start + TOGETHER], slot)))
    for slot, future in in_flight:
        yield slot, future.result()


def _example(memory: Any, slot: int, facts: Facts, fingerprint: bytes) -> Example:
    height, width, size = facts.height, facts.width, facts.height * facts.width
    labelled = facts.counts is not None
    pixels = np.memmap(memory, np.uint8, "r", slot * SLOT, (4 if labelled else 3) * size)
    label = pixels[3 * size :].reshape(height, width) if labelled else None
    return Example(facts, pixels[: 3 * size].reshape(height, width, 3), label, fingerprint)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Keep Ctrl-C for the end of the block. Processes forked in it ignore it; it goes to all of a terminal's."""
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


# From here on: in a worker.

_inherited: tuple[Reader, int]  # the reader and the descriptor of the shared memory


def _begin(reader: Reader, memory: int) -> None:
    global _inherited
    _inherited = reader, memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # the modules and the lists of members stay; to look through them each time costs a twentieth
    keep_freed_memory(1 << 27)  # what an image took, for the next: a third of the time


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read(schema: Schema, images: Sequence[str], slot: int) -> list[_Found]:
    """Read images of `schema.split` into the slots from `slot` on: H x W x 3 bytes, then H x W of the label."""
    reader, memory = _inherited
    found: list[_Found] = []
    for at, image in enumerate(images, slot):
        try:
            example = examined(reader, schema, image)
        except UserError as error:
            found.append(error)
            continue
        pixels = (example.image, example.label)
        arrays = [np.ascontiguousarray(values).data for values in pixels if values is not None]
        if os.pwritev(memory, arrays, at * SLOT) < sum(values.nbytes for values in arrays):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), image)
        found.append((example.facts, example.fingerprint))
    return found
