"""HDF5 of ANI-1x, SPICE, QM7-X and MACE.

| layout | units | reference |
|---|---|---|
| ANI-1x | Ha, Ha/Å; NaN is not computed | Smith et al., Sci. Data 2020, 7, 134, table 1 |
| SPICE | Ha, bohr; gradients, Ha/bohr | Eastman et al., Sci. Data 2023, 10, 11 |
| QM7-X | eV, eV/Å | Hoja et al., Sci. Data 2021, 8, 43 |
| MACE | eV, eV/Å, eV/Å^3 | `save_configurations_as_HDF5` of mace |
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megagnn.data.formats.electrons import formal_charge
from megagnn.data.formats.options import ReadOptions
from megagnn.data.formats.published import Method, Published, described, read_described
from megagnn.data.formats.units import Units
from megagnn.data.record import Structure

READER = "megagnn.data.foreign.hdf5:structures"
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def _first_name(data_set: str) -> Any:
    return lambda item: f"{data_set} {item['names'][0]}"


def _with_charge(item: Mapping[str, Any]) -> dict[str, Any]:
    """What SPICE tells; the charge of a molecule is that of its SMILES, which names every atom."""
    info = dict(item["info"])
    return {**info, "charge": formal_charge(str(info.get("smiles") or ""))}


LAYOUTS = {
    "ANI-1x": Published(
        (
            Method("wB97X/6-31G(d)", "wb97x_dz.energy", "wb97x_dz.forces", dipole="wb97x_dz.dipole"),
            Method("wB97X/def2-TZVPP", "wb97x_tz.energy", "wb97x_tz.forces", dipole="wb97x_tz.dipole"),
            Method("CCSD(T)*/CBS", "ccsd(t)_cbs.energy"),
        ),
        Units({"energy": "Ha", "forces": "Ha/Å"}),
        nan_is_missing=True,
    ),
    "SPICE": Published(
        (Method("wB97M-D3BJ/def2-TZVPPD", "dft_total_energy", "dft_total_gradient", dipole="scf_dipole"),),
        Units({"energy": "Ha", "forces": "-Ha/bohr", "length": "bohr", "dipole": "e*bohr"}),
        group=_first_name("SPICE"),
        info=_with_charge,
    ),
    "QM7-X": Published(
        (
            Method("PBE0+MBD", "ePBE0+MBD", "totFOR", dipole="vDIP"),
            Method("PBE0", "ePBE0", "pbe0FOR", dipole="vDIP"),
        ),
        group=_first_name("QM7-X"),
    ),
    "MACE": Published(
        (
            Method(
                "unknown",
                *(f"properties/{label}" for label in ("energy", "forces", "stress", "virials", "dipole")),
            ),
            Method("unknown", "energy", "forces", "stress", "virials"),  # of earlier versions
        ),
    ),
}


def is_hdf5(path: Path) -> bool:
    """Whether a file begins as HDF5 does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == SIGNATURE


def read_hdf5(path: Path, options: ReadOptions) -> Iterator[Structure]:
    """Yield the structures of a file, in memory that does not grow with it.

    Without keys the labels are those of the first level of theory of the layout; `--energy-key` of another
    brings the forces that belong to it. Conformations whose energy was not computed are passed over.

    Raises:
        ValueError: a file that cannot be read or has another layout (an UnreadableError), keys of labels that
            do not belong together.
    """
    yield from read_described(READER, path, LAYOUTS, options)


def look_into_hdf5(path: Path, options: ReadOptions) -> dict[str, Any]:
    """See `Format.look`."""
    return described(READER, path, LAYOUTS, options)
