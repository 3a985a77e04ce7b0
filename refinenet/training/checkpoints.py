"""Checkpoints, written atomically in a thread and verified when read.

A file step-<step>.pt is what torch.save writes, followed by its BLAKE2b digest: torch.load ignores bytes after its
archive, and by itself notices most broken files, but not all. The last two are kept.

The step after a checkpoint changes the weights in place, so they are copied first: on their own device, in the order of
the training's work, which waits for nothing. A thread copies the copy to the host, on a GPU on a stream of its own, and
writes it. Meanwhile weights and momentum are there twice: for RefineNet-101 and SGD 0.95 GB. A GPU that has no room for
that beside a step copies to the host at once, for which the training waits.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from refinenet.atomic import atomic_file

_DIGEST = 32  # bytes
_BLOCK = 1 << 20


def due_every(seconds: float) -> Callable[[], bool]:
    """Return a function that is True at its first call after each `seconds` seconds; 0: at every call."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if (now := time.monotonic()) - last < seconds:
            return False
        last = now
        return True

    return due


def newest(folder: Path, fingerprint: str) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content (on the host) of the last whole checkpoint with this fingerprint, or None.

    A broken checkpoint is reported on stderr and skipped. One with another fingerprint, of other settings, data or
    initial weights, is removed.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        if problem := _problem(path):
            print(f"{path}: broken checkpoint, taking the one before ({problem})", file=sys.stderr)
            continue
        content = read(path)
        if content["fingerprint"] == fingerprint:
            return path, content
        path.unlink()
    return None


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint that is known to be whole, its tensors onto the host."""
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return content


def _problem(path: Path) -> str:
    """Return what is wrong with the bytes of a checkpoint; "" if nothing is."""
    try:
        with path.open("rb") as file:
            left = path.stat().st_size - _DIGEST
            digest = hashlib.blake2b(digest_size=_DIGEST)
            while left > 0 and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            return "" if left == 0 and file.read() == digest.digest() else "not the bytes that were written"
    except OSError as error:
        return str(error)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its digest to a temporary name, then rename it."""
    with atomic_file(path) as part:
        torch.save(content, part)
        with part.open("rb+") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST)).digest()
            file.write(digest)  # reading has left the position at the end


class Store:
    """Writes the checkpoints of one training in a thread, so that the training does not wait for the disk.

    A context manager: its exit waits for what is being written. A disk error is raised by the next call or at the exit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.folder / f"step-{step:09d}.pt"

    def save(
        self,
        step: int,
        content: Callable[[], dict[str, Any]],
        constant: Mapping[str, Any] | None = None,
        sound: Callable[[dict[str, Any]], bool] = lambda content: True,
    ) -> Path:
        """Start to write a checkpoint, one at a time; return its path.

        Args:
            step: after which it is.
            content: called once the checkpoint before is on disk. Its tensors may change as soon as this returns.
            constant: more content, on the host, that nobody changes; it is not copied.
            sound: called in the thread with `content` on the host; where it is False nothing is written.
        """
        self.wait()
        taken = _Snapshot(content())

        def write_it() -> None:
            found = taken.on_host()
            if sound(found):
                write(self.path(step), {**found, **(constant or {})})
                for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
                    old.unlink()

        self._writing = self._thread.submit(write_it)
        return self.path(step)

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def last(self) -> Path | None:
        """Return the newest checkpoint on disk, or None."""
        self.wait()
        return max(self.folder.glob("step-*.pt"), default=None)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()


class _Snapshot:
    """Content with its tensors as they are now; another thread fetches them to the host (`on_host`), once."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._stream: torch.cuda.Stream | None = None
        gpu = next((leaf.device for leaf in tree_iter(content) if isinstance(leaf, Tensor) and leaf.is_cuda), None)
        try:
            if gpu is not None and not _has_room(gpu, content):
                raise torch.OutOfMemoryError
            self._content = _each_tensor(content, Tensor.clone)
        except torch.OutOfMemoryError:
            self._content = _each_tensor(content, lambda tensor: tensor.to("cpu", copy=True))
            return
        if gpu is not None:
            self._stream = torch.cuda.Stream(gpu)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(gpu))

    def on_host(self) -> dict[str, Any]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            # Each copy waits until it is done: memory that a copy still reads is never given back.
            content: dict[str, Any] = _each_tensor(self._content, lambda tensor: tensor.to("cpu"))
        self._content = {}
        return content


def _has_room(gpu: torch.device, content: Any) -> bool:
    """Return whether a copy of the tensors of `content` on `gpu` fits beside the most that was held at once so far.

    That is a step; after the first checkpoint a step and a copy, so that it errs on the side of waiting.
    """
    wanted = sum(leaf.nbytes for leaf in tree_iter(content) if isinstance(leaf, Tensor) and leaf.device == gpu)
    free, _ = torch.cuda.mem_get_info(gpu)
    return free + torch.cuda.memory_reserved(gpu) - torch.cuda.max_memory_allocated(gpu) >= wanted


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda tensor: change(tensor.detach()), value)
