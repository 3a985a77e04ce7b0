"""The files in a .tar, .tgz, .tar.gz or .zip, read in place."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self, cast

from pipeline.formats.anonymous_file import anonymous_file
from refinenet.errors import UserError

CHUNK = 1 << 20
MEMBER_LIMIT = 1 << 28  # bytes that one member may take in memory; the largest official image has a few million
SCRATCH_LIMIT = 1 << 30  # bytes that what is unpacked may take on disk, or SCRATCH_RATIO times what it is unpacked from
SCRATCH_RATIO = 64
MEMBERS_LIMIT = 2_000_000
INDEX_LIMIT = 1 << 27  # bytes of a .zip's index; 15 times SUNRGBD.zip's by estimate
HEADER_LIMIT = 1 << 14  # bytes of a name in a .tar

# What zipfile, tarfile and gzip raise on a broken file; RecursionError: long names of long names of ...
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    EOFError,
    zlib.error,
    struct.error,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    OverflowError,
)

_TAR_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}
_ZIP_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_LOCAL = b"PK\3\4"
_LEADS_OUT = re.compile(r"/|[A-Za-z]:|(.*/)?\.\.(/|$)|.*[\\\0]", re.DOTALL)


def printable(text: str) -> str:
    """`text` on one line, without what a terminal would obey; cut where it is long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:200])
    return shown if len(text) <= 200 else f"{shown}..."


@contextmanager
def _damage(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        kind = "zip archive" if path.suffix == ".zip" else "gzip stream" if path.suffix in _PACKED else "tar archive"
        raise UserError(f"{where}: not a whole {kind} ({printable(str(error))})") from None


class _Careful(io.FileIO):
    """A file that gives up where a broken archive makes its reader ask for more at once than `limit` bytes."""

    def __init__(self, descriptor: int, limit: int) -> None:
        super().__init__(descriptor, closefd=False)
        self._limit = limit

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size == -1:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if not 0 <= size <= self._limit:
            raise OSError(f"a header of {size} bytes, expected {self._limit} at most")
        return super().read(size) or b""


class _Member(NamedTuple):
    position: int  # of the content in a .tar, of the local header in a .zip
    size: int
    packed: int = 0
    method: int = zipfile.ZIP_STORED
    check: int | None = None


_PACKED = (".tgz", ".gz")


class Archive:
    """The regular files in a .tar, .tgz, .tar.gz or .zip, read in place and in any order.

    A .tar and a .zip are indexed once and then read by position. A .tgz has no positions: it is unpacked once, as one
    stream, into a file without a name. Links, devices and folders are not members. An archive with a name that leads
    out of it (absolute, "..", a drive, a backslash, NUL) is refused as a whole, though nothing here makes files of such
    names. Errors are UserErrors that name archive!member.

    Nothing here moves the position of a file once it is indexed: processes that are forked can read it at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, _Member] = {}
        self._others: dict[str, str] = {}  # name -> what it is instead of a file
        self._twice: set[str] = set()
        self._resources = ExitStack()
        try:
            self._open()
            with _damage(path, str(path)):
                self._index_zip() if path.suffix == ".zip" else self._index_tar()
        except BaseException:
            self._resources.close()
            raise

    def _open(self) -> None:
        self._file: IO[bytes] = self._resources.enter_context(self.path.open("rb"))
        if self.path.suffix in _PACKED:
            self._file = self._resources.enter_context(anonymous_file(self.path, self._gunzipped(self._file)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, member: str) -> bool:
        return member in self._members

    def where(self, member: str) -> str:
        return f"{self.path}!{printable(member)}"

    def read(self, member: str, limit: int | None = None) -> bytes:
        """The content of `member`; UserError where it is missing, damaged or larger than `limit` (MEMBER_LIMIT)."""
        found, most = self._find(member), MEMBER_LIMIT if limit is None else limit
        if max(found.size, found.packed) > most:
            size = max(found.size, found.packed)
            raise UserError(f"{self.where(member)}: {size} bytes, expected {most} at most")
        return b"".join(self.chunks(member))

    def stems(self, folder: str, suffix: str) -> list[str]:
        """Return the names, without `suffix`, of the files with it right in `folder`, sorted. UserError for none."""
        paths = [PurePosixPath(member) for member in self]
        names = [path.stem for path in paths if str(path.parent) == folder and path.suffix == suffix]
        if not names:
            raise UserError(f"{self.where(folder)}: no image")
        return sorted(names)

    def read_named(self, member: str) -> tuple[bytes, str]:
        """`read(member), where(member)`: the arguments of the decoders."""
        return self.read(member), self.where(member)

    def check_members(self, expected: Mapping[str, tuple[int, int]], source: str) -> None:
        """Compare a .zip with a list of members: name -> bytes, CRC-32. Members beyond the list are not looked at.

        Only the index is looked at, which takes no time; reading a member compares its content with that.

        Args:
            expected: the list.
            source: where it stands, for messages.

        Raises:
            UserError: names the first member, by the alphabet, that is missing or another one.
        """
        wrong = []
        for member, (size, crc) in sorted(expected.items()):
            found = self._members.get(member)
            if found is None or (found.size, found.check) != (size, crc):
                wrong.append((member, found, f"{size} bytes of CRC-32 {crc:08x}"))
        if wrong:
            member, found, wanted = wrong[0]
            is_there = "no such file" if found is None else f"{found.size} bytes of CRC-32 {found.check or 0:08x}"
            others = f", and {len(wrong) - 1} more of its {len(expected):,} are wrong" if len(wrong) > 1 else ""
            raise UserError(f"{self.where(member)}: {is_there}, expected {wanted} as in {source}{others}")

    def chunks(self, member: str) -> Iterator[bytes]:
        """The content of `member` piece by piece, for what is too large for memory; never more than its index says."""
        found = self._find(member)
        if self.path.suffix != ".zip":
            yield from self._pieces(member, found.position, found.size)
            return
        with _damage(self.path, self.where(member)):
            start = found.position + self._local_header(found.position, member)
            inflate = zlib.decompressobj(-15) if found.method == zipfile.ZIP_DEFLATED else None
            size, check = 0, 0
            for piece in self._pieces(member, start, found.packed):
                while piece:
                    data = piece if inflate is None else inflate.decompress(piece, CHUNK)
                    piece = b"" if inflate is None else inflate.unconsumed_tail
                    size, check = size + len(data), zlib.crc32(data, check)
                    if size > found.size:
                        raise ValueError(f"unpacks to more than the {found.size} bytes that its index says")
                    yield data
            if (inflate is not None and not inflate.eof) or size < found.size:
                raise ValueError(f"{size} of {found.size} bytes")
            if check != found.check:
                raise ValueError("the check sum does not match")

    def scratch(self, member: str) -> mmap:
        """Unpack a .zip's member that is too large for memory to a file to seek in, of which each process has its own.

        So it is mapped: a forked process has a copy of the position, and shares the bytes.
        """
        found = self._find(member)
        if self.path.suffix != ".zip":
            raise ValueError(f"{self.path}: members of a tar are read in place")
        self._limit(found.size, found.packed, self.where(member))
        file = self._resources.enter_context(anonymous_file(self.path, self.chunks(member)))
        with _damage(self.path, self.where(member)):  # of no bytes
            return self._resources.enter_context(mmap(file.fileno(), 0, access=ACCESS_READ))

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(self, member: str) -> _Member:
        if member in self._twice:
            raise UserError(f"{self.where(member)}: twice in the archive, expected once")
        if member in self._others:
            raise UserError(f"{self.where(member)}: {self._others[member]}, expected a file")
        if member not in self._members:
            raise UserError(f"{self.where(member)}: no such file in the archive")
        return self._members[member]

    def _pieces(self, member: str, position: int, size: int) -> Iterator[bytes]:
        while size > 0:
            data = os.pread(self._file.fileno(), min(size, CHUNK), position)
            if not data:
                raise UserError(f"{self.where(member)}: {size} bytes are missing, the archive is truncated")
            yield data
            position, size = position + len(data), size - len(data)

    def _local_header(self, position: int, member: str) -> int:
        """The length of a .zip member's own header, which must be about this member."""
        head = os.pread(self._file.fileno(), 30, position)
        if len(head) < 30 or head[:4] != _LOCAL:
            raise ValueError(f"no file at byte {position}, where the index says")
        flags, name, extra = struct.unpack_from("<6xH18xHH", head)
        found = os.pread(self._file.fileno(), name, position + 30).decode("utf-8" if flags & 0x800 else "cp437")
        if found.removeprefix("./") != member:
            raise ValueError(f"the file at byte {position} is {printable(found)}")
        return int(30 + name + extra)

    def _add(self, name: str, member: _Member, kind: str | None) -> None:
        if _LEADS_OUT.match(name):
            raise UserError(f"{self.where(name)}: a name that leads out of the archive; nothing of it is read")
        name = name.removeprefix("./")
        if kind == "a folder":
            name = name.rstrip("/")
        elif name in self._members or name in self._others:
            self._twice.add(name)
        if kind is None:
            self._members[name] = member
        else:
            self._others[name] = kind
        if len(self._members) + len(self._others) > MEMBERS_LIMIT:
            raise UserError(f"{self.path}: more than {MEMBERS_LIMIT} members")

    def _index_zip(self) -> None:
        with zipfile.ZipFile(_Careful(self._file.fileno(), INDEX_LIMIT)) as archive:
            infos, end = archive.infolist(), archive.start_dir
        for info in infos:
            kind = None
            if info.is_dir():
                kind = "a folder"
            elif info.create_system == 3:  # Unix
                kind = _ZIP_KINDS.get(stat.S_IFMT(info.external_attr >> 16))
            if kind is None and info.flag_bits & 1:
                kind = "an encrypted file"
            if kind is None and info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = f"a file packed by method {info.compress_type}"
            member = _Member(info.header_offset, info.file_size, info.compress_size, info.compress_type, info.CRC)
            self._add(info.orig_filename, member, kind)
        # Bombs let many names share the same bytes.
        infos.sort(key=lambda info: info.header_offset)
        for one, after in zip(infos, [info.header_offset for info in infos[1:]] + [end], strict=True):
            if one.header_offset < 0 or one.header_offset + 30 + one.compress_size > after:
                raise UserError(f"{self.where(one.orig_filename)}: overlaps what follows it in the archive")

    def _index_tar(self) -> None:
        descriptor = self._file.fileno()
        size, end = os.fstat(descriptor).st_size, 0
        with tarfile.open(fileobj=_Careful(descriptor, HEADER_LIMIT), mode="r:") as tar:
            while (info := tar.next()) is not None:
                cast(Any, tar).members.clear()  # it would keep them all, with a dictionary each
                if info.size < 0 or info.offset_data < end:
                    raise UserError(f"{self.where(info.name)}: {info.size} bytes at byte {info.offset_data}: damaged")
                kind = "a sparse file" if info.issparse() else _TAR_KINDS.get(info.type)
                if kind is None and info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                    kind = f"a member of kind {info.type!r}"
                self._add(info.name, _Member(info.offset_data, info.size), kind)
                end = info.offset_data + (info.size if kind is None else 0)
                if end > size:
                    raise UserError(f"{self.where(info.name)}: ends past the archive's {size} bytes: truncated")
            last = os.pread(descriptor, tarfile.BLOCKSIZE, tar.offset)
        if last and last != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a damaged header for the end
            raise UserError(f"{self.path}: damaged at byte {tar.offset} of {size}, expected a tar header")

    def _gunzipped(self, packed: IO[bytes]) -> Iterator[bytes]:
        done, size = 0, os.fstat(packed.fileno()).st_size
        with _damage(self.path, str(self.path)), gzip.open(packed) as stream:
            while chunk := stream.read(CHUNK):
                done += len(chunk)
                self._limit(done, size, str(self.path))
                yield chunk

    @staticmethod
    def _limit(size: int, packed: int, where: str) -> None:
        limit = max(SCRATCH_LIMIT, SCRATCH_RATIO * packed)
        if size > limit:
            raise UserError(f"{where}: unpacks to more than {limit} bytes")
