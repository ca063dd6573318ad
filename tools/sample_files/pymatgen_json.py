"""Writes the JSON test files with pymatgen: `python tools/sample_files/pymatgen_json.py DIR`."""

import bz2
import json
import sys
from pathlib import Path

from pymatgen.core import Lattice, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry

FORCES = [[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]]
KBAR = [[16.021766, 0.0, 0.0], [0.0, -32.043532, 0.0], [0.0, 0.0, 0.0]]


def salt(stretch: float, **site_properties: object) -> Structure:
    """Two atoms of NaCl in a skewed cell."""
    lattice = Lattice([[4.0 * stretch, 0, 0], [0, 4.0, 0], [1.0, 0, 4.0]])
    return Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]], site_properties=site_properties)


def mptrj() -> dict[str, dict[str, object]]:
    """Two materials of two frames, in the form of MPtrj_2022.9_full.json."""
    return {
        f"mp-{m}": {
            f"mp-{m}-{m}-{k}": {
                "structure": salt(1 + 0.01 * k).as_dict(),
                "uncorrected_total_energy": -7.0 - k,
                "corrected_total_energy": -9.0 - k,
                "energy_per_atom": -4.5 - 0.5 * k,
                "ef_per_atom": -2.0,
                "e_per_atom_relaxed": -4.6,
                "ef_per_atom_relaxed": -2.1,
                "force": FORCES,
                "stress": KBAR,
                "magmom": None if m == 1 else [0.0, -0.1],
                "bandgap": 5.0,
                "mp_id": f"mp-{m}",
            }
            for k in range(2)
        }
        for m in (1, 2)
    }


def alexandria() -> dict[str, object]:
    """Two entries, forces and moments beside the sites."""
    entries = []
    for k in range(2):
        structure = salt(1 + 0.01 * k, forces=FORCES, magmom=[0.0, 0.1], charge=[0.0, 0.0])
        data = {"mat_id": f"agm00{k}", "energy_total": -7.0 - k, "stress": KBAR, "e_above_hull": 0.01}
        entry = ComputedStructureEntry(structure, -7.0 - k, correction=-0.5, data=data, entry_id=f"agm00{k}")
        entries.append(entry.as_dict())
    return {"entries": entries}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "mptrj.json").write_text(json.dumps(mptrj(), default=float))
    (folder / "alexandria.json.bz2").write_bytes(
        bz2.compress(json.dumps(alexandria(), default=float).encode())
    )
