"""Deflate, zlib and gzip streams with the same bytes on every machine.

zlib, zlib-ng and the copies of them inside Python, Pillow and HDF5 compress the same input to different bytes, so the
rendered archives go through none of them. This is all the compression that label maps need.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def _reversed_bits(code: int, length: int) -> int:
    return int(f"{code:0{length}b}"[::-1], 2)


def _fixed_code(symbol: int) -> tuple[int, int]:
    """Bits (as deflate sends them, lowest first) and length of a symbol in the fixed Huffman code, RFC 1951 3.2.6."""
    if symbol < 144:
        code, length = 0x30 + symbol, 8
    elif symbol < 256:
        code, length = 0x190 + symbol - 144, 9
    elif symbol < 280:
        code, length = symbol - 256, 7
    else:
        code, length = 0xC0 + symbol - 280, 8
    return _reversed_bits(code, length), length


def _repeat_code(count: int) -> tuple[int, int]:
    """Bits and length of the code for `count` (3 to 258) bytes seen before; the distance follows it."""
    if count == 258:
        symbol, extra, value = 285, 0, 0
    else:
        extra = max(0, (count - 3).bit_length() - 3)
        symbol = 257 + 4 * extra + ((count - 3) >> extra)
        value = (count - 3) & ((1 << extra) - 1)
    bits, length = _fixed_code(symbol)
    return bits | value << length, length + extra


# One table of tokens: 0..255 a literal byte, 253 + n a repetition of n bytes (3..258), 512 the end of a block, 513 the
# head of one in the fixed code, 514 that of a stored one; neither is the last block.
_TOKENS = [*map(_fixed_code, range(256)), *map(_repeat_code, range(3, 259)), _fixed_code(256), (0b010, 3), (0b000, 3)]
_BITS = np.array([bits for bits, _ in _TOKENS], np.uint32)
_LENGTHS = np.array([length for _, length in _TOKENS], np.int64)
_PIECE = 1 << 18  # bytes compressed at a time, which bounds the memory: about a hundred bytes for each


def deflate(data: bytes) -> bytes:
    """`data` as a raw deflate stream (RFC 1951): repetitions shortened, or stored where that would be no shorter.

    The only distance looked at is that of one sample (1 to 4 bytes), whichever of the four repeats most.
    """
    pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
    return b"".join(_deflate_piece(piece) for piece in pieces) + b"\x03\x00"  # last, an empty block


def _deflate_piece(piece: bytes) -> bytes:
    values = np.frombuffer(piece, np.uint8)
    same = {d: values[d:] == values[:-d] for d in (1, 2, 3, 4)}
    distance = max(same, key=lambda d: (int(np.count_nonzero(same[d])), -d))
    blocks = (piece[start : start + 65535] for start in range(0, len(piece), 65535))
    stored = b"".join(struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF) + block for block in blocks)
    if np.count_nonzero(same[distance]) * 16 < len(piece):
        return stored
    packed = _deflate_repeats(values, np.pad(same[distance], (distance, 0)), distance)
    return min(stored, packed, key=len)


def _deflate_repeats(values: NDArray[np.uint8], same: NDArray[np.bool_], distance: int) -> bytes:
    """One block of the fixed code, and an empty stored one, which ends on a whole byte.

    `same` says which of `values` equal the one `distance` before.
    """
    starts = np.flatnonzero(np.concatenate(([True], same[1:] != same[:-1])))
    sizes = np.diff(np.append(starts, same.size))
    full, rest = np.divmod(sizes, 258)
    matched = same[starts]
    tokens_of = np.where(matched, full + np.where(rest >= 3, 1, rest), sizes)
    run = np.repeat(np.arange(starts.size), tokens_of)
    place = np.arange(run.size) - np.repeat(np.cumsum(tokens_of) - tokens_of, tokens_of)
    # A run that repeats starts with its matches of 258; behind them come one shorter match or up to two literals.
    in_full = matched[run] & (place < full[run])
    in_rest = matched[run] & ~in_full & (rest[run] >= 3)
    at = starts[run] + np.where(matched[run], full[run] * 258 + place - full[run], place)
    tokens = np.where(in_full, 253 + 258, np.where(in_rest, 253 + rest[run], values[np.minimum(at, values.size - 1)]))
    tokens = np.concatenate(([513], tokens, [512, 514]))
    bits, lengths = _BITS[tokens], _LENGTHS[tokens]
    repeats = (tokens > 255) & (tokens < 512)
    bits = np.where(repeats, bits | np.uint32(_reversed_bits(distance - 1, 5)) << lengths.astype(np.uint32), bits)
    lengths = np.where(repeats, lengths + 5, lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    stream = np.repeat(bits, lengths) >> within.astype(np.uint32) & 1
    return np.packbits(stream.astype(np.uint8), bitorder="little").tobytes() + b"\x00\x00\xff\xff"


def zlib_stream(data: bytes) -> bytes:
    """`data` in the zlib format (RFC 1950), as PNG, MAT and HDF5 hold it."""
    return b"\x78\x01" + deflate(data) + struct.pack(">I", zlib.adler32(data))


def gzip_file(data: bytes) -> bytes:
    """RFC 1952, without name or time."""
    head = b"\x1f\x8b\x08\x00" + struct.pack("<I", 0) + b"\x00\xff"
    return head + deflate(data) + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
