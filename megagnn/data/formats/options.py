"""What a reader of any format is told: names, keys and units of labels, species, how frames are grouped."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megagnn.data import keys
from megagnn.data.formats.groups import GROUPINGS
from megagnn.data.formats.units import Units

USUAL_NAMES = {
    "energy": ("energy", "free_energy"),
    "forces": ("forces",),
    "stress": ("stress",),
    "virial": ("virial", "virials"),
}
"""Label -> names under which it is found without a key."""


VIRIAL_LEFT_OUT = "a virial is not read, for other labels have keys of their own; --virial-key reads it"

Raw = TypeVar("Raw")
Parsed = TypeVar("Parsed")


class UnreadableError(ValueError):
    """A file, or a frame of it, that cannot be understood.

    Attributes:
        last: number of the frame after which nothing of the file was read, though it may hold more; None
            where reading went on.
    """

    def __init__(self, message: str, last: int | None = None) -> None:
        super().__init__(message)
        self.last = last


class LastFrameError(ValueError):
    """A frame that cannot be read, after which the others of its file may be lost."""


def cannot_read(
    path: Path, frame: int, error: Exception | str, last: int | None = None, hint: str = "is the file whole?"
) -> UnreadableError:
    """The error of a frame whose parser raised one; one that says what to do gets no hint beside it."""
    reason = str(error) or type(error).__name__
    end = "" if isinstance(error, UnreadableError) else f"; {hint}"
    return UnreadableError(f"cannot read {path}, frame {frame}: {reason}{end}", last)


@dataclass(frozen=True)
class ReadOptions:
    """Options of `read_structures`.

    Attributes:
        source: name of the data set; None takes the name of the file without its endings.
        level: name of the level of theory of the labels; None leaves "unknown", or what the file says.
        group_by: "auto", "formula", "file", "frame" or "info:KEY"; see `group_name`.
        energy_key, forces_key, stress_key, virial_key: names of the labels in the file; None takes the usual
            ones, "none" reads no such label.
        other_keys: label of another kind (`keys.OTHER_LABELS`) -> its name in the file, "none" for one that
            is not read; without a key a label is read where a format knows its name.
        units: of the file, where they are not those of ASE (or those the format itself declares).
        species: names of species in the file -> elements.
        ase_format: ASE's name of the format; None leaves it to the file's name and content.
        on_unreadable: called for each frame that cannot be read, and reading goes on where it can; None stops
            there with the error.
        file_content: name of the file by its structures, for group_by "file".
    """

    source: str | None = None
    level: str | None = None
    group_by: str = "auto"
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virial_key: str | None = None
    other_keys: Mapping[str, str] = field(default_factory=dict)
    units: Units = field(default_factory=Units)
    species: Mapping[str, str] = field(default_factory=dict)
    ase_format: str | None = None
    on_unreadable: Callable[[UnreadableError], None] | None = None
    file_content: str = ""

    def __post_init__(self) -> None:
        if self.group_by not in GROUPINGS and not (self.group_by.startswith("info:") and self.group_by[5:]):
            raise ValueError(
                f"unknown grouping {self.group_by!r}; known are {', '.join(GROUPINGS)} and info:KEY"
            )
        if self.stress_key and "virial" in self.stress_key.lower() and self.virial_key is None:
            raise ValueError(
                f"--stress-key {self.stress_key} names a virial, an energy that is minus the stress times "
                f"the volume; read it with --virial-key {self.stress_key} (if it does hold a stress, add "
                "--virial-key none)"
            )

    @property
    def label_keys(self) -> dict[str, str | None]:
        """Label -> its key, None where none was given."""
        return {label: getattr(self, f"{label}_key") for label in USUAL_NAMES}

    @property
    def all_keys(self) -> dict[str, str | None]:
        """The same with the labels of other kinds whose keys were given."""
        return {**self.label_keys, **self.other_keys}

    def others(
        self, find: Callable[[str], Any], usual: Mapping[str, str | None] | None = None
    ) -> dict[str, Any]:
        """Labels of other kinds, for `Frame.others`: what `find` finds of each key that was given.

        usual: label -> key under which it stands where none was given, if it is of the same method.
        """
        named = {**(usual or {}), **self.other_keys}
        return {name: find(key) for name, key in named.items() if key not in (None, "none")}

    @property
    def usual_others(self) -> dict[str, str | None]:
        """Labels of other kinds under their usual names; none beside labels with keys of their own."""
        return {} if self.foreign_keys else {keys.DIPOLE: keys.DIPOLE}

    @property
    def foreign_keys(self) -> list[str]:
        """Labels named by a key that is not their usual name: they may be of another method than the rest."""
        return [
            name for name, key in self.label_keys.items() if key not in (None, "none", *USUAL_NAMES[name])
        ]

    def check_label_keys(self, usual: Mapping[str, str], where: str) -> None:
        """Refuse to pair labels named by a key with labels that merely have the usual name.

        A file with REF_energy and REF_forces often holds `forces` too, of another method.

        Args:
            usual: label -> its usual name, of those that a frame has under it.
            where: the frame, for the message.

        Raises:
            ValueError: some label has a key of its own, and another has none but would be found under its
                usual name.
        """
        given = self.foreign_keys
        unnamed = [name for name, key in self.label_keys.items() if key is None and name in usual]
        if given and unnamed:
            flags = " ".join(f"--{name}-key {usual[name]}" for name in unnamed)
            raise ValueError(
                f"{where}: {' and '.join(given)} would be read by the key given, but "
                f"{' and '.join(unnamed)} under the usual name, perhaps of another method; name all keys, "
                f"with {flags} if they belong together (none for a label to leave out, as in "
                f"--{unnamed[0]}-key none)"
            )

    def usual_virial(self, virial: Any) -> tuple[Any, tuple[str, ...]]:
        """A virial found under its usual name, and notes; None where no stress is wanted, or where it may be
        of another method than labels with keys of their own."""
        if virial is None or self.stress_key == "none":
            return None, ()
        return (None, (VIRIAL_LEFT_OUT,)) if self.foreign_keys else (virial, ())

    def unreadable(self, error: UnreadableError) -> None:
        """Report a frame that cannot be read; returns only if reading may go on.

        Raises:
            UnreadableError: the error, where nobody asked to be called.
        """
        if self.on_unreadable is None:
            raise error
        self.on_unreadable(error)

    def check_first(self, find: Callable[[str], Any], there: str, is_labelled: bool, where: str) -> None:
        """Refuse a file whose first frame lacks what was asked for by name, or has nothing to learn from.

        Args:
            find: from a key to its value in the frame, or None.
            there: the keys of the frame, in words.
            is_labelled: whether it has an energy or forces.
            where: the frame, for the message.

        Raises:
            ValueError: no such key, or neither energy nor forces (an UnreadableError).
        """
        for name, key in self.all_keys.items():
            if key not in (None, "none") and find(key) is None:
                raise ValueError(f"{where}: there is no {name} key {key!r}; {there}")
        if not is_labelled:
            raise UnreadableError(
                f"{where}: no energy or forces found; {there}. Name the keys of the labels with --energy-key "
                "and --forces-key"
            )

    def source_name(self, path: Path) -> str:
        """The source's name for structures of a file; of a hidden file without its first dot."""
        return self.source if self.source is not None else path.name.lstrip(".").split(".")[0] or path.name


def parsed_frames(
    path: Path, raw_frames: Iterable[Raw], parse: Callable[[Raw], Parsed], options: ReadOptions
) -> Iterator[tuple[int, Parsed]]:
    """(index, what `parse` makes of it) of each frame; those that cannot be read go to `options.unreadable`.

    Args:
        raw_frames: the frames of a file as they stand there; an error of this iterator ends the reading.
        parse: raises whatever it likes of a frame that it cannot read; reading goes on with the next.

    Raises:
        UnreadableError: see `ReadOptions.unreadable`.
    """
    index = 0
    try:
        for raw in raw_frames:
            try:
                found = parse(raw)
            except Exception as error:
                last = index if isinstance(error, LastFrameError) else None
                options.unreadable(cannot_read(path, index, error, last))
            else:
                yield index, found
            index += 1
    except UnreadableError:
        raise
    except Exception as error:
        options.unreadable(cannot_read(path, index, error, last=index))
