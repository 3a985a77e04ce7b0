"""JPEG, PNG, MATLAB files, tar and zip, with the same bytes on every machine.

What normally differs is fixed here: compression (stored blocks, see `deflate`), times, users and platforms in headers.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.label_images import colour_map
from refinenet.atomic import atomic_file

Member = tuple[str, bytes]  # path inside an archive, content; a path that ends in a slash is a folder's

MTIME = 1336694400  # 2012-05-11 00:00 UTC, the day of the VOC 2012 release
_ZIP_TIME = (2012, 5, 11, 0, 0, 0)
_MATLAB_TIME = b"Fri May 11 00:00:00 2012"


def deflate(data: bytes) -> bytes:
    """Wrap `data` as a raw DEFLATE stream (RFC 1951) of stored blocks.

    Nothing is compressed: zlib, zlib-ng and the copies inside Python, Pillow and HDF5 each give other bytes.
    """
    stream = bytearray()
    for start in range(0, max(1, len(data)), 0xFFFF):
        block = data[start : start + 0xFFFF]
        stream += struct.pack("<BHH", start + 0xFFFF >= len(data), len(block), 0xFFFF ^ len(block)) + block
    return bytes(stream)


def zlib_stream(data: bytes) -> bytes:
    """Wrap `data` in the zlib format (RFC 1950), as PNG, MAT and HDF5 hold it."""
    return b"\x78\x01" + deflate(data) + struct.pack(">I", zlib.adler32(data))


def gzip_file(data: bytes) -> bytes:
    """Wrap `data` in the gzip format (RFC 1952), without name or time."""
    head = b"\x1f\x8b\x08\x00" + bytes(4) + b"\x00\xff"
    return head + deflate(data) + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    """An RGB image, H x W x 3, as a baseline JPEG with chroma at half resolution, like those of the data sets.

    Or a grey one, H x W.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90, **({"subsampling": "4:2:0"} if image.ndim == 3 else {}))
    return buffer.getvalue()


def png(image: NDArray[np.uint8] | NDArray[np.uint16], palette: NDArray[np.uint8] | None = None) -> bytes:
    """H x W (grey, or indexes into `palette`, 256 x 3), H x W x 3 (RGB) or H x W x 4 (RGBA).

    8 bits a sample; 16 where the array is uint16.
    """
    height, width = image.shape[:2]
    colour = 3 if palette is not None else {1: 0, 3: 2, 4: 6}[image.size // (height * width)]
    rows = np.ascontiguousarray(image.astype(image.dtype.newbyteorder(">"))).view(np.uint8).reshape(height, -1)
    unfiltered = np.pad(rows, ((0, 0), (1, 0)))  # filter type 0 before every row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * image.itemsize, colour, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette.tobytes()))
    chunks += [(b"IDAT", zlib_stream(unfiltered.tobytes())), (b"IEND", b"")]
    out = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        out += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(out)


def voc_palette() -> NDArray[np.uint8]:
    """The VOC colour map (VOCdevkit/VOCcode/VOClabelcolormap.m), 256 x 3."""
    return np.array(colour_map(256), np.uint8)


def cells(texts: Iterable[str]) -> NDArray[np.object_]:
    """A 1 x N cell array of strings for `mat`."""
    values = list(texts)
    array = np.empty((1, len(values)), object)
    array[0, :] = values
    return array


def mat(variables: Mapping[str, Any]) -> bytes:
    """Variables as a compressed MAT-file of level 5 (MATLAB's own default, `save -v7`)."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(cast(Any, buffer), dict(variables), do_compression=False, long_field_names=True)
    plain = buffer.getvalue()
    text = b"MATLAB 5.0 MAT-file, Platform: GLNXA64, Created on: " + _MATLAB_TIME
    out = [text.ljust(116), plain[116:128]]
    at = 128
    while at < len(plain):
        size = 8 + struct.unpack_from("<I", plain, at + 4)[0]
        packed = zlib_stream(plain[at : at + size])
        out.append(struct.pack("<II", 15, len(packed)) + packed)  # 15: miCOMPRESSED
        at += size
    return b"".join(out)


class Mat73:
    """A MAT-file of level 7.3: HDF5 behind a block of 512 bytes, dimensions in MATLAB's order (reversed)."""

    def __init__(self) -> None:
        import h5py

        self._buffer = io.BytesIO()
        # The oldest layout HDF5 can write, which is MATLAB's too.
        self.file = h5py.File(self._buffer, "w", userblock_size=512, libver=("earliest", "v108"))

    def array(self, name: str, values: NDArray[Any], kind: str, **attributes: int) -> Any:
        """Write one dataset of MATLAB class `kind` in one piece."""
        dataset = self.file.create_dataset(name, data=values, track_times=False)
        return self._describe(dataset, kind, attributes)

    def stack(self, name: str, items: Iterable[NDArray[Any]], count: int, kind: str) -> Any:
        """Write `count` arrays of one shape as one dataset, count x shape, each as a zlib stream like MATLAB's."""
        dataset = None
        for number, item in enumerate(items):
            little = np.ascontiguousarray(item, item.dtype.newbyteorder("<"))
            if dataset is None:
                options = {"chunks": (1, *item.shape), "compression": "gzip", "track_times": False}
                dataset = self.file.create_dataset(name, (count, *item.shape), little.dtype, **options)
            dataset.id.write_direct_chunk((number,) + (0,) * item.ndim, zlib_stream(little.tobytes()))
        return self._describe(dataset, kind, {})

    def cell(self, name: str, items: Iterable[tuple[NDArray[Any], str]], shape: tuple[int, int]) -> Any:
        """Write a cell array of (values, MATLAB class): references to datasets in #refs#."""
        import h5py

        group = self.file.require_group("#refs#")
        references = []
        for values, kind in items:
            decode = {"MATLAB_int_decode": 2} if kind == "char" else {}
            references.append(self.array(f"#refs#/{len(group)}", values, kind, **decode).ref)
        table = np.empty(len(references), h5py.ref_dtype)
        table[:] = references
        dataset = self.file.create_dataset(name, data=table.reshape(shape), dtype=h5py.ref_dtype, track_times=False)
        return self._describe(dataset, "cell", {})

    @staticmethod
    def _describe(dataset: Any, kind: str, attributes: Mapping[str, int]) -> Any:
        dataset.attrs["MATLAB_class"] = np.bytes_(kind)
        for key, value in attributes.items():
            dataset.attrs[key] = np.int32(value)
        return dataset

    def content(self) -> bytes:
        """Close the file and give its bytes."""
        self.file.close()
        text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: " + _MATLAB_TIME + b" HDF5 schema 1.00 ."
        self._buffer.seek(0)
        self._buffer.write(text.ljust(116) + bytes(8) + struct.pack("<H", 0x0200) + b"IM")
        return self._buffer.getvalue()


def characters(text: str) -> NDArray[np.uint16]:
    """A MATLAB string as level 7.3 stores it: UTF-16 code units, N x 1."""
    return np.frombuffer(text.encode("utf-16-le"), "<u2").reshape(-1, 1)


def lines(texts: Iterable[str]) -> bytes:
    """One text a line, as the list files have them."""
    return "".join(f"{text}\n" for text in texts).encode()


def in_folders(members: Iterable[Member]) -> Iterator[Member]:
    """Yield the members, each folder before the first in it, as tar and zip pack what lies on a disk."""
    seen: set[str] = set()
    for name, content in members:
        parents = [f"{name[:at]}/" for at, char in enumerate(name) if char == "/"]
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                yield parent, b""
        yield name, content


def write_tar(path: Path, members: Iterable[Member]) -> None:
    """Write a tar at `path`, gzipped if its name says so; it appears whole or not at all."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode = len(content), MTIME, 0o644
            if name.endswith("/"):
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry, io.BytesIO(content))
    content = buffer.getvalue()
    write(path, gzip_file(content) if path.suffix in (".gz", ".tgz") else content)


def write_zip(path: Path, members: Iterable[Member]) -> None:
    """Write a zip of stored members at `path`; it appears whole or not at all."""
    with atomic_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            entry = zipfile.ZipInfo(name, _ZIP_TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            if entry.is_dir():
                entry.external_attr = 0o40755 << 16 | 0x10  # of Unix; of DOS
            archive.writestr(entry, content)


def write(path: Path, content: bytes) -> None:
    """Write `content` at `path`; the file appears whole or not at all."""
    with atomic_file(path) as part:
        part.write_bytes(content)
