"""Where structures come from, kept as two numbers each: a store may be of millions of them."""

from __future__ import annotations

from array import array


class Places:
    """File and frame of structures; `add` them in order, then ask for the name of one."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._of_file, self._frames = array("i"), array("q")

    def add(self, file: str, frame: int) -> None:
        """The next structure: its file, and its number there."""
        self._of_file.append(self._files.setdefault(file, len(self._files)))
        self._frames.append(frame)

    def name(self, index: int) -> str:
        """The place of a structure in words."""
        return f"{list(self._files)[self._of_file[index]]}, frame {self._frames[index]}"
