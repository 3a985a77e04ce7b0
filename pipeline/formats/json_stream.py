"""A large JSON file of lists, item by item: in memory is one item, and the piece of the file that it is from."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from typing import Any

from pipeline.formats.archive import printable
from refinenet.errors import UserError

_ITEM_LIMIT = 1 << 24  # characters


def read(chunks: Iterator[bytes], where: str) -> Iterator[tuple[str, Any]]:
    """What the lists of the JSON's one object hold, item by item, each with its list's key; other values whole."""
    text = _Text(chunks)
    try:
        text.expect("{")
        while True:
            key = text.value()
            text.expect(":")
            if not isinstance(key, str):
                raise ValueError(f"a key that is {key!r}")
            if text.peek() == "[":
                text.expect("[")
                while text.peek() != "]":
                    yield key, text.value()
                    if text.peek() != "]":
                        text.expect(",")
                text.expect("]")
            else:
                yield key, text.value()
            if text.peek() == "}":
                return
            text.expect(",")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON of lists ({printable(str(error))})") from None


class _Text:
    """JSON that arrives in pieces."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._bytes = chunks, getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._before = "", 0, 0
        self._json = json.JSONDecoder()

    def _more(self) -> bool:
        """Get the next piece; False where the text has ended."""
        data = next(self._chunks, b"")
        more = self._bytes.decode(data, not data)
        if data:
            self._before += self._at
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(data)

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{self.peek()!r} at character {self._before + self._at}, expected {character!r}")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._at)
                # A number or word at the edge of a piece may go on in the next.
                if end < len(self._text) or not self._more():
                    self._at = end
                    return found
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _ITEM_LIMIT or not self._more():
                    raise ValueError(f"{error.msg} at character {self._before + error.pos}") from None
