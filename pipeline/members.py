"""The files in a .tar, .tgz, .tar.gz or .zip, read in place."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Self

from refinenet.files import UserError

CHUNK = 1 << 20
MEMBER_LIMIT = 1 << 28  # bytes that one member may take in memory; the largest official image has a few million
SCRATCH_LIMIT = 1 << 34  # bytes that an unpacked .tgz may take on disk, unless the archive is itself that large

# What zipfile and gzip raise on a broken file
_BROKEN = (
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    struct.error,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


@contextmanager
def _damage(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        kind = "zip archive" if path.suffix == ".zip" else "gzip stream"
        raise UserError(f"{where}: not a whole {kind} ({error})".split("\n")[0]) from None


class Archive:
    """The regular files in a .tar, .tgz, .tar.gz or .zip, read in place and in any order.

    A .tar is indexed once and then read by position. A .tgz has no positions: it is unpacked once, as one stream,
    into a file without a name beside its folder, which is gone when the archive is closed or the process dies.
    Links, devices and folders are not members. Errors are UserErrors that name archive!member.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resources = ExitStack()
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, tuple[int, int]] = {}  # name -> position in the .tar (0 in a .zip), bytes
        self._twice: set[str] = set()
        try:
            if path.suffix == ".zip":
                self._index_zip()
            else:
                self._index_tar()
        except BaseException:
            self._resources.close()
            raise

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, member: str) -> bool:
        return member in self._members

    def where(self, member: str) -> str:
        return f"{self.path}!{member}"

    def read(self, member: str) -> bytes:
        """The content of `member`; UserError where it is missing, damaged or larger than MEMBER_LIMIT."""
        position, size = self._find(member)
        if size > MEMBER_LIMIT:
            raise UserError(f"{self.where(member)}: {size} bytes, expected {MEMBER_LIMIT} at most")
        if self._zip is not None:
            with _damage(self.path, self.where(member)):
                return self._zip.read(member)
        data = os.pread(self._tar.fileno(), size, position)
        if len(data) < size:
            raise UserError(f"{self.where(member)}: {len(data)} of {size} bytes, the archive is truncated")
        return data

    def named(self, member: str) -> tuple[bytes, str]:
        """`read(member), where(member)`: the arguments of the decoders."""
        return self.read(member), self.where(member)

    def scratch(self, member: str) -> BinaryIO:
        """A .zip's member as a file to seek in, for what is too large for memory; unnamed, as an unpacked .tgz."""
        _, size = self._find(member)
        if self._zip is None:
            raise ValueError(f"{self.path}: members of a tar are read in place")
        file = self._unnamed()
        with _damage(self.path, self.where(member)), self._zip.open(member) as stream:
            self._pour(stream, file, self.where(member), size)
        file.seek(0)
        return file

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, member: str) -> tuple[int, int]:
        if member not in self._members:
            raise UserError(f"{self.where(member)}: no such file in the archive")
        if member in self._twice:
            raise UserError(f"{self.where(member)}: twice in the archive, expected once")
        return self._members[member]

    def _add(self, name: str, position: int, size: int) -> None:
        name = name.removeprefix("./")
        if name in self._members:
            self._twice.add(name)
        self._members[name] = (position, size)

    def _index_zip(self) -> None:
        with _damage(self.path, str(self.path)):
            self._zip = self._resources.enter_context(zipfile.ZipFile(self.path))
        for info in self._zip.infolist():
            if not info.is_dir():
                self._add(info.filename, 0, info.file_size)

    def _index_tar(self) -> None:
        packed = self._resources.enter_context(self.path.open("rb"))
        self._tar: IO[bytes] = self._unpacked(packed) if self.path.suffix in (".tgz", ".gz") else packed
        size = os.fstat(self._tar.fileno()).st_size
        try:
            with tarfile.open(fileobj=self._tar, mode="r:") as tar:
                for info in tar:
                    if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                        self._add(info.name, info.offset_data, info.size)
                        if info.offset_data + info.size > size:
                            raise UserError(f"{self.where(info.name)}: ends past the archive's {size} bytes: truncated")
                end = os.pread(self._tar.fileno(), tarfile.BLOCKSIZE, tar.offset)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.path}: not a whole tar archive ({error})") from None
        if end and end != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a damaged header for the end
            raise UserError(f"{self.path}: damaged at byte {tar.offset} of {size}, expected a tar header")

    def _unpacked(self, packed: IO[bytes]) -> IO[bytes]:
        file = self._unnamed()
        with _damage(self.path, str(self.path)), gzip.open(packed) as stream:
            self._pour(stream, file, str(self.path), max(SCRATCH_LIMIT, 2 * self.path.stat().st_size))
        file.seek(0)
        return file

    def _unnamed(self) -> BinaryIO:
        """A file without a name, on the disk of the archives (which has room for them) where that can be written."""
        folder = self.path.absolute().parent.parent
        place = folder if os.access(folder, os.W_OK) else None
        return self._resources.enter_context(tempfile.TemporaryFile(dir=place))

    @staticmethod
    def _pour(stream: gzip.GzipFile | IO[bytes], file: BinaryIO, where: str, limit: int) -> None:
        """Copy, but stop where the stream is longer than it may be."""
        done = 0
        while chunk := stream.read(CHUNK):
            done += len(chunk)
            if done > limit:
                raise UserError(f"{where}: unpacks to more than {limit} bytes")
            file.write(chunk)
        file.flush()
