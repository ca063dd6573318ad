"""What a store holds, in words and numbers: `megagnn inspect DATA`."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from megagnn.data import keys
from megagnn.data.arrays import Bools, Floats
from megagnn.data.baseline import Baseline, fit_baseline, given_references, sum_over_atoms
from megagnn.data.split import SPLITS
from megagnn.data.store import Store

SIZES = ("E rms", "F rms", "S rms")
MANY_SHOWN = 8


def _labels(store: Store) -> tuple[str, ...]:
    """The three labels, and those of other kinds that the store has."""
    return tuple(name for name in keys.LABELS if name in store.arrays)


def describe(store: Store, notes: Sequence[str] = ()) -> str:
    """A readable summary: per source and split the counts, spread of labels, then elements and provenance,
    notes, if any, and what looks wrong at the end.

    "E rms" is the root mean square energy per atom in meV/atom after per-element references fitted
    on training energies, without isolated atoms; "F rms" the root mean square of force components in eV/Å;
    "S rms" of stress components in eV/Å^3. These are the errors of knowing nothing, which a model must beat.
    """
    header, alone = store.header, store.isolated_atoms()
    known = baseline_of(store, alone)
    lines = [
        f"{store.path}: {header.num_structures:,} structures, {header.num_atoms:,} atoms",
        f"levels of theory: {', '.join(header.levels)}",
        "",
        *_table(
            [
                ("source", "split", "structures", "groups", "atoms", "max", *_labels(store), *SIZES),
                *_rows(store, known, alone),
            ]
        ),
        "",
    ]
    for index, source in enumerate(header.sources):
        numbers = store.of_atoms("atomic_numbers", np.flatnonzero(store.source == index))
        elements, counts = np.unique(numbers, return_counts=True)
        shares = (
            f"{chemical_symbols[z]} {n / counts.sum():.1%}" for z, n in zip(elements, counts, strict=True)
        )
        lines.append(f"{source}: {', '.join(shares)}; {_periodicity(store, store.source == index)}")
        lines += _state_lines(store, source, store.source == index)
    lines += [
        *_reference_lines(store, known, alone),
        "",
        f"split: {json.dumps(header.split, ensure_ascii=False)}",
    ]
    lines += [f"provenance of {s}: {json.dumps(p, ensure_ascii=False)}" for s, p in header.provenance.items()]
    warnings = [f"warning: {line}" for line in (*header.warnings, *known.told)]
    return "\n".join([*lines, *notes, *warnings])


def _rows(store: Store, known: Baseline, alone: Bools) -> list[tuple[str, ...]]:
    residual = _energy_residuals(store, known, alone)
    rows = []
    for index, source in enumerate(store.header.sources):
        for k, split in enumerate(SPLITS):
            chosen = np.flatnonzero((store.source == index) & (store.split == k))
            labelled = {label: store.labelled(label, chosen) for label in _labels(store)}
            forces = store.of_atoms("forces", labelled[keys.FORCES]).astype(np.float64)
            stress = store.arrays["stress"][labelled[keys.STRESS]].astype(np.float64)
            energies = residual[chosen][np.isfinite(residual[chosen])]
            rows.append(
                (
                    source,
                    split,
                    f"{len(chosen):,}",
                    f"{len(np.unique(store.group[chosen])):,}",
                    f"{store.num_atoms[chosen].sum():,}",
                    f"{store.num_atoms[chosen].max(initial=0)}",
                    *(f"{len(found):,}" for found in labelled.values()),
                    f"{1000 * np.sqrt(np.mean(energies**2)):.1f}" if len(energies) else "-",
                    f"{np.sqrt(np.mean(forces**2)):.3f}" if len(forces) else "-",
                    f"{np.sqrt(np.mean(stress**2)):.3g}" if len(stress) else "-",
                )
            )
    return rows


def _energy_residuals(store: Store, known: Baseline, alone: Bools) -> Floats:
    """(S,) energy per atom beyond references and shift, eV; NaN where there are none."""
    arrays = store.arrays
    labelled = store.labelled(keys.ENERGY, np.arange(len(store)))
    train = labelled[store.split[labelled] == SPLITS.index("train")]
    energies = known.references + known.shifts[:, None]
    baseline = sum_over_atoms(energies, arrays["atomic_numbers"], arrays["offsets"], store.source)
    fitted = labelled[np.isin(store.source[labelled], store.source[train]) & ~alone[labelled]]
    found = np.full(len(store), np.nan)
    found[fitted] = ((arrays["energy"] - baseline) / store.num_atoms)[fitted]
    return found


def baseline_of(store: Store, alone: Bools) -> Baseline:
    """References and shifts of the training split of a store; alone: (S,) which are isolated atoms."""
    numbers = np.arange(len(store.header.sources))
    part = (store, store.indices("train"), numbers)
    return fit_baseline([part], store.header.sources, given_references([store], None), [alone])


def _reference_lines(store: Store, known: Baseline, alone: Bools) -> list[str]:
    """Which references are not fitted, and how many isolated atoms there are."""
    lines = []
    for index, source in enumerate(store.header.sources):
        count = int((alone & (store.source == index)).sum())
        if count:
            lines.append(f"{source}: {count:,} isolated atoms")
        fixed = np.flatnonzero(known.fixed[index])
        if len(fixed):
            shown = ", ".join(f"{chemical_symbols[z]} {known.references[index, z]:.6g}" for z in fixed)
            lines.append(f"{source}: reference energies, eV, fixed: {shown}")
    return lines


def _periodicity(store: Store, chosen: Bools) -> str:
    """How many structures are periodic along how many directions."""
    directions = store.arrays["pbc"][chosen].sum(axis=1)
    names = {0: "molecules", 1: "chains", 2: "slabs", 3: "bulk or boxes"}
    return ", ".join(
        f"{(directions == k).sum():,} {name}" for k, name in names.items() if (directions == k).any()
    )


def _state_lines(store: Store, source: str, chosen: Bools) -> list[str]:
    """How many structures have which charge and multiplicity, the most frequent first."""
    lines = []
    for name in ("charge", "multiplicity"):
        if name not in store.arrays:
            continue
        values, counts = np.unique(store.arrays[name][chosen], return_counts=True)
        found = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
        if any(value for _, value in found):
            shown = ", ".join(f"{value:g} of {count:,}" for count, value in found[:MANY_SHOWN])
            lines.append(f"{source}: {name} {shown}{', ...' if len(found) > MANY_SHOWN else ''}")
    return lines


def _table(rows: list[tuple[Any, ...]]) -> list[str]:
    widths = [max(len(str(row[c])) for row in rows) for c in range(len(rows[0]))]
    return [
        "  ".join(
            str(cell).ljust(width) if c < 2 else str(cell).rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
