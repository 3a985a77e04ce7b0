"""Checkpoints, written atomically in a thread and verified when read.

A file step-<step>.pt is what torch.save writes, followed by its BLAKE2b digest: torch.load ignores bytes after its
archive, and by itself notices most broken files, but not all. The last two are kept.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

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

    def save(self, step: int, content: Callable[[], dict[str, Any]]) -> Path:
        """Start to write a checkpoint, one at a time; return its path.

        `content` is called once the checkpoint before is on disk; its tensors are copied to the host.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, self.path(step), _copied(content()))
        return self.path(step)

    def _write(self, path: Path, content: dict[str, Any]) -> None:
        write(path, content)
        for old in sorted(self.folder.glob("step-*.pt"))[:-2]:
            old.unlink()

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


def _copied(value: Any) -> Any:
    """Return `value` with every tensor copied to the host, where the next step does not change it."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
