"""Large JSON files entry by entry: published sets are larger than memory once parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ase.io.formats import open_with_compression

CHUNK = 1 << 20
SPACE = " \t\r\n"


def iterate_entries(path: Path) -> Iterator[tuple[str | None, Any]]:
    """(key, value) of each entry of the list (key None) or object at the top of a file, compressed or not.

    Memory is that of the largest entry.

    Raises:
        ValueError: not a JSON list or object, or one that ends early.
        OSError, EOFError: a damaged compressed file.
    """
    with open_with_compression(str(path), "rt") as file:
        text = _Buffer(file)
        opening = text.next_character()
        if opening not in ("[", "{"):
            raise ValueError("expected a JSON list or object")
        closing = "]" if opening == "[" else "}"
        text.skip()
        while text.next_character() != closing:
            key = None
            if opening == "{":
                key = text.value()
                if not isinstance(key, str) or text.next_character() != ":":
                    raise ValueError("expected a key in double quotes and a colon")
                text.skip()
            yield key, text.value()
            if text.next_character() == ",":
                text.skip()
            elif text.next_character() != closing:
                raise ValueError("expected a comma between entries")


class _Buffer:
    """The part of a file that is not yet decoded."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.text = ""
        self.start = 0
        self.decoder = json.JSONDecoder()

    def read(self, size: int = CHUNK) -> bool:
        """Append some of the file; False at its end."""
        more = self.file.read(size)
        self.text, self.start = self.text[self.start :] + more, 0
        return bool(more)

    def skip(self) -> None:
        self.start += 1

    def next_character(self) -> str:
        """The next character that is no white space; it stays."""
        while True:
            while self.start < len(self.text) and self.text[self.start] in SPACE:
                self.start += 1
            if self.start < len(self.text):
                return self.text[self.start]
            if not self.read():
                raise ValueError("the file ends early")

    def value(self) -> Any:
        """The next value, whole; the text at hand is doubled until it is."""
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.start)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self.text) - 20 and not error.msg.startswith("Unterminated")
                if whole or not self.read(max(CHUNK, len(self.text) - self.start)):
                    raise ValueError(f"the file ends early or is damaged: {error}") from error
                continue
            except RecursionError as error:
                raise ValueError("an entry is nested too deeply") from error
            if end == len(self.text) and self.read():
                continue  # a number may go on in the next part
            self.start = end
            return value
