"""A large JSON file of lists, item by item, by ijson: in memory is one item, and the piece of the file that it is from.

Items are built here, of ijson's events: `ijson.items` writes out the way to each value, which for lists in lists takes
memory with the square of their depth (25 GB for 100,000).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.formats.archive import printable
from refinenet.errors import UserError

_DEPTH = 32  # of lists and objects in each other; COCO's has 5
_ITEM_LIMIT = 1 << 24  # bytes


def read(chunks: Iterator[bytes], where: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of the lists in the JSON's one object, each with its list's key; other values are left out."""
    import ijson
    from ijson.common import ObjectBuilder

    events: Any = ijson.sendable_list()
    parser, item = ijson.basic_parse_coro(events, use_float=True), ObjectBuilder()
    key, in_list, depth, size = "", False, 0, 0
    try:
        for chunk in chunks:
            parser.send(chunk)
            size += len(chunk)
            for event, value in events:
                starts = event in ("start_map", "start_array")
                depth -= event in ("end_map", "end_array")
                if depth == 0 and event not in ("start_map", "end_map"):
                    raise ValueError("expected an object")
                if depth == 1:
                    key, in_list = value if event == "map_key" else key, event == "start_array"
                elif in_list:
                    item.event(event, value)
                    if depth == 2 and not starts:
                        yield key, item.value
                        size = 0
                depth += starts
                if depth > _DEPTH:
                    raise ValueError(f"lists in lists, more than {_DEPTH} deep")
            events.clear()
            if size > _ITEM_LIMIT:
                raise ValueError(f"an item of more than {_ITEM_LIMIT} bytes")
        parser.close()
    except (ijson.JSONError, ValueError) as error:
        raise UserError(f"{where}: not JSON of lists ({printable(' '.join(str(error).split()))})") from None
