"""Charge, spin and dipole of structures, as each reader finds them."""

import json
import pickle
import zlib

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from megagnn.data.formats import ReadOptions, parse_units, read_structures
from megagnn.data.formats.electrons import (
    IMPOSSIBLE,
    SEVERAL,
    SPIN_LEFT_OUT,
    electronic_state,
    formal_charge,
    state_of_output,
)

OXYGEN, WATER, METHYL = [8, 8], [8, 1, 1], [6, 1, 1, 1]
POSITIONS = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.3]])
FORCES = np.array([[0.0, 0.0, -0.4], [0.0, 0.0, 0.4]])
DIPOLE = np.array([0.1, -0.2, 0.3])
ENERGY, BOHR, HARTREE = -4000.0, 0.529177210903, 27.211386245988


@pytest.mark.parametrize(
    ("info", "numbers", "state"),
    [
        ({}, WATER, (0.0, 0)),
        ({"charge": -1, "spin": 2}, OXYGEN, (-1.0, 2)),  # OMol25: the multiplicity
        ({"spin": 3}, OXYGEN, (0.0, 3)),
        ({"spin": 2}, OXYGEN, (0.0, 3)),  # two unpaired electrons: 16 electrons have no doublet
        ({"spin": 1}, WATER, (0.0, 1)),
        ({"spin": 1}, METHYL, (0.0, 2)),
        ({"spin": 0}, METHYL, (0.0, 0)),
        ({"total_charge": 1.0, "charge": 0.25, "multiplicity": 2}, WATER, (1.0, 2)),
        ({"charge": 0.5, "spin": 2}, WATER, (0.5, 2)),
        ({"charge": "high", "spin": True, "mult": 1}, WATER, (0.0, 1)),
        ({"charge": np.array([-1.0]), "spin": np.array([2])}, OXYGEN, (-1.0, 2)),
        ({"charge": -0.9999996, "spin": 2}, OXYGEN, (-1.0, 2)),  # the sum of charges of atoms
        ({"charge": 3e-8}, WATER, (0.0, 0)),
        ({"total_charge": np.float64(-2), "total_spin": np.int64(1)}, WATER, (-2.0, 1)),
    ],
)
def test_what_keys_mean(info, numbers, state):
    assert electronic_state(info, np.array(numbers)) == (*state, ())


def test_what_makes_no_sense_is_told():
    assert electronic_state({"spin": 0.7}, np.array(WATER)) == (0.0, 0, (SPIN_LEFT_OUT,))
    assert electronic_state({"multiplicity": -1}, np.array(WATER)) == (0.0, 0, (SPIN_LEFT_OUT,))
    assert electronic_state({"multiplicity": 2}, np.array(WATER)) == (0.0, 2, (IMPOSSIBLE,))
    with pytest.raises(ValueError, match="must be a finite number of e, got nan"):
        electronic_state({"charge": np.nan}, np.array(WATER))


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        ("[H:2][O:1][H:3]", 0),
        ("[C:1]([H:2])([H:3])([H:4])[N+:5]([H:6])([H:7])[H:8]", 1),
        ("[O-]C(=O)C[NH3+]", 0),
        ("[Ca+2].[Cl-].[OH-:3]", 0),
        ("[Fe++:1].[O--]", 0),
        ("[Mg+2]", 2),
        ("C#N", 0),
    ],
)
def test_charges_of_smiles(smiles, charge):
    assert formal_charge(smiles) == charge


def test_charge_and_spin_of_programs():
    orca = [
        " Total Charge           Charge          ....   -1\n",
        " Multiplicity           Mult            ....    2\n",
    ]
    assert state_of_output([*orca, *orca], "orca-output") == ({"charge": -1, "multiplicity": 2}, ())
    gaussian = [" Charge = -1 Multiplicity = 2\n"]
    assert state_of_output(gaussian, "gaussian-out") == ({"charge": -1, "multiplicity": 2}, ())
    several = [*gaussian, " Charge =  0 Multiplicity = 1\n"]
    assert state_of_output(several, "gaussian-out") == ({}, (SEVERAL,))
    assert state_of_output(["nothing"], "orca-output") == ({}, ())


def atoms_of():
    atoms = Atoms(OXYGEN, POSITIONS)
    atoms.calc = SinglePointCalculator(atoms, energy=ENERGY, forces=FORCES, dipole=DIPOLE)
    return atoms


def extxyz(path, **info):
    atoms = atoms_of()
    atoms.info.update(charge=-1, spin=2, **info)
    ase.io.write(path / "a.xyz", atoms, format="extxyz")
    return path / "a.xyz"


def database(path, **info):
    with ase.db.connect(path / "a.db") as rows:
        rows.write(atoms_of(), data={"charge": -1, "spin": 2, **info})
    return path / "a.db"


def pymatgen_json(path, **info):
    sites = [
        {"species": [{"element": "O", "occu": 1}], "xyz": list(position)} for position in POSITIONS.tolist()
    ]
    molecule = {"@class": "Molecule", "charge": -1, "spin_multiplicity": 2, "sites": sites}
    labels = {"energy": ENERGY, "forces": FORCES.tolist(), "dipole": DIPOLE.tolist()}
    (path / "a.json").write_text(json.dumps([{"structure": molecule, **labels, **info}]))
    return path / "a.json"


def hdf5(path, group, **datasets):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path / "a.h5", "w") as file:
        for name, value in datasets.items():
            file[f"{group}/{name}"] = value
    return path / "a.h5"


def spice(path):
    return hdf5(
        path,
        "superoxide",
        smiles=[b"[O:1][O-:2]"],
        atomic_numbers=np.array(OXYGEN, np.int16),
        conformations=POSITIONS[None] / BOHR,
        dft_total_energy=[ENERGY / HARTREE],
        dft_total_gradient=-FORCES[None] * BOHR / HARTREE,
        scf_dipole=DIPOLE[None] / BOHR,
    )


def mace(path, config_weight=1.0):
    labels = {"energy": ENERGY, "forces": FORCES, "dipole": DIPOLE, "total_charge": -1.0, "total_spin": 2.0}
    named = {f"properties/{name}": value for name, value in labels.items()} | {"weight": config_weight}
    cell = {"cell": np.zeros((3, 3)), "pbc": [False] * 3}
    return hdf5(path, "config_batch_0/config_0", atomic_numbers=OXYGEN, positions=POSITIONS, **cell, **named)


def lmdb_of(path, **records):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    file = path / ("a.aselmdb" if "nextid" in records else "a.lmdb")
    with (
        lmdb.open(str(file), subdir=False, map_size=1 << 20) as environment,
        environment.begin(write=True) as write,
    ):
        for key, content in records.items():
            write.put(key.removeprefix("r").encode(), content)
    return file


def packed(value):
    return zlib.compress(json.dumps(value).encode())


def aselmdb(path, **info):
    row = {"numbers": OXYGEN, "positions": POSITIONS.tolist(), "cell": np.zeros((3, 3)).tolist()}
    labels = {"energy": ENERGY, "forces": FORCES.tolist(), "dipole": DIPOLE.tolist()}
    row |= {"pbc": [False] * 3, **labels, "data": {"charge": -1, "spin": 2, **info}}
    return lmdb_of(path, nextid=packed(2), r1=packed(row))


def graphs(path, **info):
    record = {"pos": POSITIONS, "atomic_numbers": np.array(OXYGEN), "cell": np.zeros((1, 3, 3))}
    record |= {"y": ENERGY, "force": FORCES, "pbc": False}
    record |= {"charge": np.array([-1.0]), "spin": np.array([2]), **info}
    return lmdb_of(path, r0=pickle.dumps(record, protocol=4))


@pytest.mark.parametrize("make", [extxyz, database, pymatgen_json, spice, mace, aselmdb, graphs])
def test_each_reader(make, tmp_path):
    path = make(tmp_path)
    (read,) = read_structures(path)
    assert read.energy == pytest.approx(ENERGY)
    assert read.forces == pytest.approx(FORCES)
    assert read.charge == -1.0
    assert not any("charge" in note or "spin" in note or "dipole" in note for note in read.notes)
    assert read.multiplicity == (0 if make is spice else 2)
    if make is graphs:
        assert not read.others
        return
    assert read.others["dipole"] == pytest.approx(DIPOLE)
    (without,) = read_structures(path, ReadOptions(other_keys={"dipole": "none"}))
    assert not without.others


@pytest.mark.parametrize("make", [extxyz, database, pymatgen_json, spice, mace, aselmdb, graphs])
def test_rules_of_labels_in_each_reader(make, tmp_path):
    """Units of the user come before those of the file, labels are left out on request, weights are read."""
    path = make(tmp_path) if make is spice else make(tmp_path, config_weight=2.0)
    (read,) = read_structures(path, ReadOptions(units=parse_units("energy=kJ/mol"), forces_key="none"))
    number = ENERGY / HARTREE if make is spice else ENERGY
    assert read.energy == pytest.approx(number * 0.01036427, rel=1e-6)
    assert read.forces is None
    assert read.weights == ((1.0,) * 3 if make is spice else (2.0,) * 3)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("ANI-1x", ("coordinates", "wb97x_dz.energy", "wb97x_dz.forces", "wb97x_dz.dipole")),
        ("QM7-X", ("atXYZ", "ePBE0+MBD", "totFOR", "vDIP")),
    ],
)
def test_dipoles_of_neutral_sets(layout, names, tmp_path):
    ani = layout == "ANI-1x"
    unit = HARTREE if ani else 1.0
    values = [POSITIONS, np.array(ENERGY / unit), FORCES / unit, DIPOLE]
    if ani:
        values = [np.stack([value, value]) for value in values]
        values[3][1] = np.nan
    numbers = {"atomic_numbers" if ani else "atNUM": OXYGEN}
    path = hdf5(
        tmp_path, "O2" if ani else "1/Geom-m1-i1-c1-opt", **numbers, **dict(zip(names, values, strict=True))
    )
    first, *others = read_structures(path)
    assert first.others["dipole"] == pytest.approx(DIPOLE)
    assert [s.others for s in others] == [{}] * ani  # NaN: not computed


def test_a_dipole_of_a_cell_or_of_another_method_is_left_out(tmp_path):
    atoms = atoms_of()
    atoms.info["REF_energy"] = -1.0
    atoms.arrays["REF_forces"] = FORCES
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    keyed = {"energy_key": "REF_energy", "forces_key": "REF_forces"}
    (foreign,) = read_structures(tmp_path / "a.xyz", ReadOptions(**keyed))
    assert not foreign.others
    (named,) = read_structures(tmp_path / "a.xyz", ReadOptions(**keyed, other_keys={"dipole": "dipole"}))
    assert named.others["dipole"] == pytest.approx(DIPOLE)
    atoms.set_cell([9.0, 9.0, 9.0])
    atoms.pbc = True
    ase.io.write(tmp_path / "b.xyz", atoms, format="extxyz")
    (cell,) = read_structures(tmp_path / "b.xyz")
    assert not cell.others
    assert any("dipole left out" in note for note in cell.notes)
