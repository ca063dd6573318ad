"""Which stores may be used in one data set: none twice, and no group on two sides of their splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagnn.data.isolated import ISOLATED_PREFIX
from megagnn.data.split import SPLITS, without_prefix
from megagnn.data.store import Store

# A copy of a store has these in common; a store of other labels for the same structures has not.
CONTENT = ("positions.npy", "energy.npy", "forces.npy")


def check_together(stores: Sequence[Store]) -> None:
    """Refuse stores that would count structures twice or leak test structures into training.

    Groups are compared where their names are stored. A group of a fixed test or validation file that its own
    store trains on, as its publisher chose, is left out of the comparison, and so are isolated atoms.

    Raises:
        ValueError: one store given twice or a copy of it, or a group on different sides in two stores.
    """
    if len(stores) < 2:
        return
    seen: dict[object, Store] = {}
    for store in stores:
        content = tuple(store.header.sha256.get(name) for name in CONTENT)
        for mark in (store.path.resolve(), content if all(content) else store.path.resolve()):
            other = seen.setdefault(mark, store)
            if other is not store:
                raise ValueError(
                    f"{other.path} and {store.path} are the same store; give it once, or its structures "
                    "count twice"
                )
    first: dict[str, tuple[int, Store]] = {}
    for store in stores:
        for group, side in group_sides(store).items():
            known, other = first.setdefault(group, (side, store))
            if known != side:
                raise ValueError(
                    f"group {group!r} is {SPLITS[known]} in {other.path} and {SPLITS[side]} in "
                    f"{store.path}; a group must lie on one side. Prepare them together: megagnn prepare "
                    f"{other.path} {store.path} --seed 0 --out DIR"
                )


def group_sides(store: Store) -> dict[str, int]:
    """Side of each group by name, as an index into SPLITS; empty where the store has no names."""
    names = store.group_names()
    if names is None:
        return {}
    groups, rows = np.unique(store.group, return_index=True)
    sides: dict[str, int] = {}
    fixed: dict[str, int] = {}
    for group, side in zip(groups.tolist(), store.split[rows].tolist(), strict=True):
        name = names[group]
        is_fixed, name = without_prefix(name) != name, without_prefix(name)
        if name.startswith(ISOLATED_PREFIX):
            continue  # references in one store, test cases in another
        if is_fixed:
            fixed[name] = max(side, fixed.get(name, side))
        else:
            sides[name] = side
    return {**fixed, **sides}
