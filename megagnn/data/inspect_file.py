"""What a file holds, before anything of it is converted: `megagnn inspect FILE`."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from megagnn.data import keys
from megagnn.data.formats import FORMATS, ReadOptions, detect_format, read_structures
from megagnn.data.record import Structure

NUM_READ = 200
"""Structures that are read of a file; the largest are terabytes."""
NUM_SHOWN = 12


def describe_file(path: Path, options: ReadOptions | None = None) -> str:
    """Format, number of structures, labels with their units, levels of theory, groups and elements.

    The file is told by its description, where its format has one, and by its first NUM_READ structures.

    Raises:
        ValueError: no such file, or one of no known format of which nothing can be read.
    """
    told: list[ValueError] = []
    name = detect_format(path)
    look = FORMATS[name].look(path, options or ReadOptions())
    layout = f" ({look['layout']})" if "layout" in look else ""
    lines = [f"{path}: format {name}{layout}"]
    found: list[Structure] = []
    try:
        found.extend(
            islice(read_structures(path, options or ReadOptions(on_unreadable=told.append), name), NUM_READ)
        )
    except ValueError as error:
        if not look:
            raise
        told.append(error)  # of units, say: what was seen of the file is told all the same
    if name == "ase" and not found:
        reason = told[0] if told else "it holds no structures"
        raise ValueError(f"{path} is neither a checkpoint nor data that can be read: {reason}")
    count = look.get("num_structures", len(found))
    is_whole = len(found) < NUM_READ or count > NUM_READ
    groups = f" in {look['num_groups']:,} groups of the file" if "num_groups" in look else ""
    lines.append(f"structures   {'' if is_whole else 'at least '}{count:,}{groups}; {len(found):,} were read")
    if look.get("keys"):
        lines.append(f"labels there {', '.join(look['keys'])}")
    if look.get("units"):
        units = ", ".join(f"{quantity} {unit}" for quantity, unit in look["units"].items())
        lines.append(f"units there  {units}")
    lines += _of_structures(found)
    lines += [f"unreadable   {len(told):,} of them; the first: {told[0]}"] if told else []
    if not found:
        lines.append("nothing of it can be prepared")
    return "\n".join(lines)


def _of_structures(found: Sequence[Structure]) -> list[str]:
    """Lines on what was read, in the units of a store."""
    if not found:
        return []
    levels, groups = Counter(s.level for s in found), Counter(s.group for s in found)
    atoms = Counter(z for s in found for z in s.atomic_numbers.tolist())
    sizes = [s.num_atoms for s in found]
    lines = [
        f"levels       {', '.join(levels)}",
        f"groups       {len(groups):,}: {_some(list(groups))}",
        f"elements     {', '.join(f'{chemical_symbols[z]} {n:,}' for z, n in sorted(atoms.items()))}",
        f"atoms        {min(sizes)} to {max(sizes)} a structure",
        f"periodic     {', '.join(f'{n:,} along {k} axes' for k, n in sorted(_axes(found).items()))}",
    ]
    for name, state in (("charge", lambda s: s.charge), ("multiplicity", lambda s: s.multiplicity)):
        states = Counter(map(state, found))
        if any(states):
            shown = ", ".join(f"{value:g} of {count:,}" for value, count in states.most_common(NUM_SHOWN))
            lines.append(f"{name:<13}{shown}")
    for name, label in keys.LABELS.items():
        values = [np.asarray(s.labels[name]) for s in found if name in s.labels]
        if values:
            lines.append(
                f"{name:<13}{len(values):,} of {len(found):,}, {_size(name, values, found)} ({label.unit})"
            )
    notes = Counter(note for s in found for note in s.notes)
    return [*lines, *(f"note         {count:,} structures: {note}" for note, count in notes.items())]


def _size(name: str, values: Sequence[np.ndarray], found: Sequence[Structure]) -> str:
    """How large labels are: energies per atom by their range, others by their root mean square."""
    if name == keys.ENERGY:
        per_atom = [float(s.energy) / max(1, s.num_atoms) for s in found if s.energy is not None]
        return f"{min(per_atom):.5g} to {max(per_atom):.5g} per atom"
    flat = np.concatenate([value.ravel() for value in values])
    return f"root mean square {np.sqrt(np.mean(flat**2)):.4g}" if len(flat) else "empty"


def _axes(found: Sequence[Structure]) -> Counter[int]:
    return Counter(int(np.sum(s.pbc)) for s in found)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
