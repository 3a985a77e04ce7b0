"""A split read by several processes, each of which writes what it has read to its place in the file.

The process that asks keeps the list and the file's layout. It deals out images; a worker reads one, keeps its pixels
and tells their size and the label's counts. As soon as that is known of all images before, so is the place in the
file: the worker is told, and writes from its memory. So no pixel crosses from one process to another, the bytes of
the file do not depend on how many processes there are, and memory does not depend on how many images.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NamedTuple, Self

from pipeline.datasets import Reader
from refinenet.data.split import Array, Schema
from refinenet.data.writer import Facts, Layout, SplitWriter, examine, fill
from refinenet.errors import UserError

DEAL = 4  # images at once: one by one, it takes a tenth of the time to tell of them
LARGE = 1 << 20  # pixels of a mean image, above which they are dealt one by one
AHEAD = 3  # deals that a worker may have: one that it reads, the next, and one whose place is not known yet


def cores() -> int:
    """How many processes to read with: PIPELINE_CORES, or as many cores as this process may use."""
    given = os.environ.get("PIPELINE_CORES")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"PIPELINE_CORES is {given!r}, expected a whole number from 1")
    return int(given)


def measured(reader: Reader, schema: Schema, image: str) -> tuple[Array, Array | None, Facts]:
    """An image of `schema.split`, its label and its facts. UserError, naming where it comes from, if it has none."""
    pixels, label = reader.read(schema.split, image)
    try:
        return pixels, label, examine(schema, image, pixels, label)
    except UserError as error:
        raise UserError(f"{reader.where(schema.split, image)}: {error}") from None


class _File(NamedTuple):
    """What the tasks that follow are about; not answered."""

    path: Path
    schema: Schema


class _Task(NamedTuple):
    """Write images that have been read, then read others. Images are called by their number in the list."""

    write: list[tuple[int, Layout]]
    read: list[tuple[int, str]]


class _Answer(NamedTuple):
    """The images that are written; those that are read, up to the first that something is wrong with."""

    written: list[int]
    found: list[tuple[int, Facts | Exception]]


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    has: set[int] = field(default_factory=set)  # images that it was dealt and has not written
    placed: list[tuple[int, Layout]] = field(default_factory=list)  # of these, what it can write
    asked: int = 0  # tasks that it has not answered

    def send(self, message: object) -> None:
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def deal(self, waiting: deque[tuple[int, str]], size: int) -> None:
        """Give it what it can do, `size` images at once; and a second task, so that it need not wait for one."""
        while self.asked < 2:
            read = [waiting.popleft() for _ in range(min(size, AHEAD * size - len(self.has), len(waiting)))]
            if not read and not self.placed:
                return
            self.has.update(image for image, _ in read)
            self.send(_Task(self.placed, read))
            self.placed = []
            self.asked += 1

    def answer(self) -> _Answer:
        answer: _Answer = pickle.loads(self.connection.recv_bytes())
        self.asked -= 1
        self.has.difference_update(answer.written)
        return answer


class Workers:
    """Processes that read with copies of `reader`; they end with the block, and with the process that made them."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._reader = reader
        self._workers: list[_Worker] = []
        self._resources = ExitStack()
        try:
            self._selector = self._resources.enter_context(DefaultSelector())
            with _without_ctrl_c():
                for _ in range(count):
                    self._start()
            copy = pickle.dumps(reader, pickle.HIGHEST_PROTOCOL)
            for worker in self._workers:
                worker.connection.send_bytes(copy)
        except BaseException:
            self._resources.close()
            raise

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that it does not run
        ours, theirs = context.Pipe()
        self._resources.callback(ours.close)
        with theirs:
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
        self._resources.callback(process.join)
        self._resources.callback(process.kill)
        self._workers.append(_Worker(process, ours))
        self._selector.register(ours, EVENT_READ, self._workers[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def write(self, images: Sequence[str], writer: SplitWriter) -> Iterator[None]:
        """Write `images`, in this order; yields once for each that has been written.

        The first of the list that cannot be read raises its UserError, whichever process read it and when.
        """
        try:
            for worker in self._workers:
                worker.send(_File(writer.path, writer.schema))
            yield from self._write(images, writer)
        except (EOFError, ConnectionError):
            raise self._died(images) from None

    def _write(self, images: Sequence[str], writer: SplitWriter) -> Iterator[None]:
        waiting = deque(enumerate(images))
        found: dict[int, tuple[_Worker, Facts | Exception]] = {}
        placed = done = pixels = 0
        while done < len(images):
            for worker in self._workers:
                worker.deal(waiting, DEAL if 0 < pixels <= LARGE * placed else 1)
            for key, _ in self._selector.select():
                answer = key.data.answer()
                for _ in answer.written:
                    done += 1
                    yield
                for image, facts in answer.found:
                    found[image] = key.data, facts
            for image in sorted(found):
                worker, facts = found[image]
                if image > placed:  # one before is still being read
                    break
                if isinstance(facts, Exception):  # of reading, or, where its place is known, of writing
                    raise facts
                worker.placed.append((image, writer.reserve(facts)))
                del found[image]
                placed += 1
                pixels += facts.height * facts.width

    def _died(self, images: Sequence[str]) -> UserError:
        for worker in self._workers:
            worker.process.join(timeout=0.1)
        dead = next((worker for worker in self._workers if worker.process.exitcode is not None), None)
        code = dead.process.exitcode if dead else None
        how = f"was killed ({signal.Signals(-code).name})" if code and code < 0 else f"ended with exit code {code}"
        about = f" {images[min(dead.has)]} or one soon after" if dead and dead.has else ""
        return UserError(
            f"{self._reader.raw}: the process that read{about} {how}; "
            "if memory ran out: PIPELINE_CORES=1 needs the least"
        )


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. It goes to all processes of a terminal; those begun here never see it.

    It is blocked for their sake, who inherit that, and caught for this one, whose other threads do not block it.
    """
    came: list[int] = []
    resource_tracker.ensure_running()  # unblocks it where a process of multiprocessing is the first
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def _work(parent: Connection) -> None:
    """Do what `parent` says until it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _keep_memory()
    with suppress(EOFError, ConnectionError):
        reader: Reader | Exception
        try:
            reader = pickle.loads(parent.recv_bytes())
        except (UserError, OSError) as error:  # its archives cannot be opened here
            reader = error
        gc.freeze()  # the modules and the lists of members stay; to look through them each time costs a twentieth
        while True:
            message = pickle.loads(parent.recv_bytes())
            if isinstance(message, _File):
                schema, descriptor = message.schema, os.open(message.path, os.O_WRONLY)
                held: dict[int, tuple[Array, Array | None]] = {}
            else:
                parent.send_bytes(pickle.dumps(_do(message, reader, schema, held, descriptor), pickle.HIGHEST_PROTOCOL))


def _do(
    task: _Task,
    reader: Reader | Exception,
    schema: Schema,
    held: dict[int, tuple[Array, Array | None]],
    descriptor: int,
) -> _Answer:
    written: list[int] = []
    found: list[tuple[int, Facts | Exception]] = []
    image = 0
    try:
        for image, layout in task.write:
            fill(descriptor, layout, *held.pop(image))
            written.append(image)
        for image, name in task.read:
            if isinstance(reader, Exception):
                raise reader
            pixels, label, facts = measured(reader, schema, name)
            held[image] = pixels, label
            found.append((image, facts))
    except (UserError, OSError) as error:
        found.append((image, error))
    except Exception:
        found.append((image, RuntimeError(f"in a worker:\n{traceback.format_exc()}")))
    return _Answer(written, found)


def _end_with_parent() -> None:
    process = multiprocessing.parent_process()
    assert process is not None
    process.join()
    os._exit(1)


def _keep_memory() -> None:
    """Let glibc keep what an image took for the next one: to give it back and get it anew costs a third of the time."""
    with suppress(OSError, AttributeError):
        allocator: Any = ctypes.CDLL(None)
        allocator.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that it takes
        allocator.mallopt(-1, 1 << 27)  # M_TRIM_THRESHOLD
