"""What published layouts have in common: names of labels that belong together, and items made structures."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megagnn.data.arrays import Ints
from megagnn.data.foreign.child import ForeignError, read_in_child
from megagnn.data.formats.assemble import Frame, assemble
from megagnn.data.formats.options import ReadOptions, UnreadableError, parsed_frames
from megagnn.data.formats.units import Units
from megagnn.data.keys import DIPOLE
from megagnn.data.record import MAX_ATOMIC_NUMBER, Structure

NOT_COMPUTED = "forces left out: not computed (NaN)"


class Method(NamedTuple):
    """Names of labels of one level of theory; the forces are derivatives of the energy."""

    level: str
    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    dipole: str | None = None


class Published(NamedTuple):
    """A published layout.

    Attributes:
        methods: that it may have labels of; the first that is there is read unless keys say otherwise.
        units: of the file.
        nan_is_missing: NaN stands for a label that was not computed; else it is a fault, as everywhere.
        group: from an item to the name of what must stay on one side of a split, or None for the formula.
        info: from an item to what it tells of a structure beside its labels.
    """

    methods: tuple[Method, ...]
    units: Units = Units()
    nan_is_missing: bool = False
    group: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    info: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda item: item.get("info", {})


def choose(methods: Sequence[Method], options: ReadOptions, where: str) -> Method:
    """The level of theory that the keys of the user name, with the keys of its labels that are to be read.

    A key of one label brings the others of its level. "none" leaves a label out.

    Raises:
        ValueError: keys of labels that do not belong together, or one that is known beside others not named.
    """
    keys = options.label_keys
    given = {label: key for label, key in keys.items() if key not in (None, "none")}
    for method in methods:
        if all(getattr(method, label) == key for label, key in given.items()):
            left: dict[str, Any] = {label: None for label, key in keys.items() if key == "none"}
            return method._replace(**left)
    known = [method for method in methods if any(getattr(method, k) == v for k, v in given.items())]
    if len(given) > 1 and known and all(any(getattr(m, k) == v for m in methods) for k, v in given.items()):
        pairs = "; ".join(f"{m.level}: {m.energy}, {m.forces or 'no forces'}" for m in methods)
        raise ValueError(
            f"{where}: {' and '.join(given.values())} are of different levels of theory ({pairs}); name keys "
            "of one, or none for a label to leave out"
        )
    usual = {label: getattr(methods[0], label) for label in keys if getattr(methods[0], label)}
    options.check_label_keys(usual, where)
    named = {label: key or getattr(methods[0], label) for label, key in keys.items()}
    return Method("unknown", **{label: None if key == "none" else key for label, key in named.items()})


def read_described(
    reader: str, path: Path, layouts: Mapping[str, Published], options: ReadOptions
) -> Iterator[Structure]:
    """Yield the structures of a file that a child process reads, by the layout that it finds there.

    Args:
        reader: see `read_in_child`; called with the path and the keys of all labels that may be wanted. Its
            first item is {"layout": one of `layouts`, "keys": names of labels in the first structure}.

    Raises:
        ValueError: see `read_in_child`, `choose` and `structures`.
    """
    with closing(_items(reader, path, layouts, options)) as items:
        found = _description(path, items)
        yield from structures(path, items, layouts[found["layout"]], options, found["keys"])


def described(
    reader: str, path: Path, layouts: Mapping[str, Published], options: ReadOptions
) -> dict[str, Any]:
    """The description of such a file, with the units of its labels."""
    with closing(_items(reader, path, layouts, options)) as items:
        found = _description(path, items)
        return {**found, "units": dict(layouts[found["layout"]].units.of)}


def _description(path: Path, items: Iterator[Any]) -> dict[str, Any]:
    found: dict[str, Any] | None = next(items, None)
    if found is None:
        raise UnreadableError(f"{path} holds no structures; check that its writer came to its end")
    return found


def _items(
    reader: str, path: Path, layouts: Mapping[str, Published], options: ReadOptions
) -> Generator[Any, None, None]:
    known = {key for entry in layouts.values() for method in entry.methods for key in method[1:]}
    keys = sorted(key for key in known | set(options.all_keys.values()) if key not in (None, "none"))
    try:
        yield from read_in_child(reader, path, {"keys": keys})
    except ForeignError as error:
        raise UnreadableError(str(error), last=error.num_items) from error


def structures(
    path: Path, items: Iterator[Any], published: Published, options: ReadOptions, keys: Sequence[str]
) -> Iterator[Structure]:
    """Yield the structures of items; those without a computed energy where NaN says so are passed over.

    Args:
        items: dictionaries with `numbers` (N,), `positions` (N, 3), `values` (labels by key), and perhaps
            `cell` (3, 3), `pbc` (3,), `fixed` (N,), `info`, `where` (a name for messages), `level`,
            `notes`; or
            strings that say why one cannot be read.
        keys: names of labels that the first structure has, for messages.

    Raises:
        ValueError: items that are no structures (an UnreadableError), no such key, keys that do not belong
            together.
    """
    there = [m for m in published.methods if {m.energy, m.forces} & set(keys)]
    method = choose(there or published.methods, options, str(path))

    def parse(numbered: tuple[int, Any]) -> Structure | None:
        index, item = numbered
        if isinstance(item, str):
            raise UnreadableError(f"{item}; leave it out with --on-bad skip, or repair the file")
        if index == 0 and options.on_unreadable is None:
            found = {key for label in ("energy", "forces") if (key := getattr(method, label))} & set(keys)
            there = f"keys there are {', '.join(keys) or 'none'}"
            options.check_first(
                item["values"].get, there, bool(found), f"{path}, {item.get('where', 'frame 0')}"
            )
        frame = _frame(path, index, item, published, method, options)
        return None if frame is None else assemble(frame, options)

    for _, structure in parsed_frames(path, enumerate(items), parse, options):
        if structure is not None:
            yield structure


def _frame(
    path: Any, index: int, item: Mapping[str, Any], published: Published, method: Method, options: ReadOptions
) -> Frame | None:
    values = item["values"]
    labels = {label: values.get(key) for label in options.label_keys if (key := getattr(method, label))}
    others = options.others(values.get, {DIPOLE: method.dipole})
    notes = tuple(item.get("notes", ()))
    if published.nan_is_missing:
        missing = [label for label, value in labels.items() if _is_nan(value)]
        if "energy" in missing:
            return None
        labels = {label: value for label, value in labels.items() if label not in missing}
        others = {label: value for label, value in others.items() if not _is_nan(value)}
        notes = (*notes, *([NOT_COMPUTED] if "forces" in missing else []))
    numbers = atomic_numbers(item["numbers"])
    forces = labels.get("forces")
    if forces is not None and np.shape(forces) != (len(numbers), 3):
        raise UnreadableError(
            f"{item.get('where', '')} {method.forces} must be ({len(numbers)}, 3) for its atoms, got "
            f"{np.shape(forces)}"
        )
    cell, pbc = item.get("cell"), item.get("pbc")
    return Frame(
        path=path,
        index=index,
        numbers=numbers,
        positions=np.asarray(item["positions"], dtype=np.float64),
        cell=np.zeros((3, 3)) if cell is None else np.asarray(cell, dtype=np.float64).reshape(3, 3),
        pbc=np.zeros(3, dtype=bool) if pbc is None else np.broadcast_to(np.asarray(pbc, dtype=bool), 3),
        info=published.info(item),
        units=published.units,
        group=published.group(item),
        level=item.get("level") or method.level,
        fixed=item.get("fixed"),
        notes=notes,
        others=others,
        **labels,
    )


def _is_nan(value: Any) -> bool:
    """Whether a label, or part of it, was not computed."""
    array = np.asarray(0 if value is None else value)
    return array.dtype.kind == "f" and bool(np.isnan(array).any())


def atomic_numbers(values: Any) -> Ints:
    """(N,) whole numbers from what a file holds, floating point included.

    Raises:
        UnreadableError: anything else.
    """
    array = np.asarray(values)
    good = array.ndim == 1 and array.dtype.kind in "iuf" and bool((array == np.rint(array)).all())
    if not good or not ((array >= 0) & (array <= MAX_ATOMIC_NUMBER)).all():
        raise UnreadableError(
            f"atomic numbers must be whole numbers up to {MAX_ATOMIC_NUMBER} in one row, got "
            f"{str(array)[:60]} of shape {array.shape}"
        )
    return array.astype(np.int64)
