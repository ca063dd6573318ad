"""Labels in other units or with other signs are found; right ones are not."""

import numpy as np
import pytest
from ase import units

from megagnn.data.plausibility import LabelCheck, _medians
from tests.data.trajectories import crystals, labelled, molecules, record, scaled

HA, RY, BOHR = units.Hartree, units.Rydberg, units.Bohr
KCAL, KJ = units.kcal / units.mol, units.kJ / units.mol
KBAR = 1e3 * units.bar


def faults(frames, **changes):
    check = LabelCheck("data")
    for index, atoms in enumerate(frames):
        check.add(record(atoms, **changes), "data", index)
    return check.faults()


def test_right_labels_are_silent():
    assert faults(molecules()) == []
    assert faults(molecules("C6H6")) == []
    assert faults(crystals()) == []
    assert faults(crystals(rattle=0.12, strain=0.0)) == []
    assert faults(crystals(rattle=0.0)) == []
    assert faults([*molecules(), *molecules("CH4"), *crystals()]) == []
    assert faults(molecules(num_frames=1)) == []
    assert faults([]) == []


@pytest.mark.parametrize(
    ("divisors", "way_out"),
    [
        ({"forces": HA / BOHR}, "--units forces=Ha/bohr"),
        ({"forces": -1.0}, "--units forces=-eV/Å"),
        ({"forces": KCAL}, "--units forces=kcal/mol/Å"),
        ({"forces": KJ / 10}, "--units forces=kJ/mol/nm"),
        ({"energy": HA}, "--units energy=Ha"),
        ({"energy": KCAL}, "--units energy=kcal/mol"),
        ({"energy": HA, "forces": HA / BOHR}, "--units energy=Ha,forces=Ha/bohr"),
        ({"energy": HA, "forces": -HA / BOHR}, "--units energy=Ha,forces=-Ha/bohr"),
        ({"energy": RY, "forces": RY / BOHR}, "--units energy=Ry,forces=Ry/bohr"),
        ({"energy": KCAL, "forces": KCAL}, "--units energy=kcal/mol"),
    ],
)
def test_units_of_energies_and_forces(divisors, way_out):
    found = faults(scaled(molecules(), **divisors))
    assert found[0].sure
    assert any(way_out in fault.text for fault in found if fault.sure)


def test_energies_per_atom():
    found = faults(scaled(molecules(), energy=len(molecules()[0])))
    assert found[0].sure
    assert "--units energy=eV/atom" in found[0].text


@pytest.mark.parametrize(
    ("divisor", "way_out"),
    [
        (KBAR, "stress=kBar"),
        (-KBAR, "stress=-kBar"),
        (units.GPa, "stress=GPa"),
        (-units.GPa, "stress=-GPa"),
        (-1.0, "stress=-eV/Å^3"),
        (units.bar, "stress=bar"),
        (HA / BOHR**3, "stress=Ha/bohr^3"),
    ],
)
def test_units_and_sign_of_stress(divisor, way_out):
    found = faults(scaled(crystals(), stress=divisor))
    assert found[0].sure
    assert any(way_out in fault.text for fault in found)


@pytest.mark.parametrize("sign", [1, -1])
def test_virials_read_as_stress(sign):
    frames = [
        labelled(f, **{**f.calc.results, "stress": sign * f.get_volume() * f.calc.results["stress"]})
        for f in crystals()
    ]
    found = faults(frames)
    assert found[0].sure
    assert any("--virial-key" in fault.text and "in eV: read it by" in fault.text for fault in found)


def test_size_of_stress_without_near_frames():
    """One cell of its own composition: nothing but the size can tell."""
    (fault,) = faults(scaled(crystals(num_frames=1), stress=KBAR))
    assert fault.sure
    assert "GPa" in fault.text
    assert "--units stress=kBar" in fault.text
    strong = [labelled(f, stress=2.0 * np.eye(3), energy=0.0) for f in crystals(num_frames=1)]
    (fault,) = faults(strong)
    assert not fault.sure  # 320 GPa: such data exist
    (fault,) = faults([labelled(f, stress=6.0 * np.eye(3), energy=0.0) for f in crystals(num_frames=1)])
    assert fault.sure  # 960 GPa in a crystal of usual density: 70 eV to an atom


def test_size_of_forces_and_energies_that_agree():
    found = faults(scaled(crystals(rattle=0.15, strain=0.0), energy=KCAL, forces=KCAL))
    assert [fault.sure for fault in found] == [False]
    assert "--units forces=kcal/mol/Å" in found[0].text


def test_single_energies_that_are_off_are_named():
    frames = list(molecules())
    frames[5] = labelled(frames[5], **{**frames[5].calc.results, "energy": -8000.0})
    (fault,) = faults(frames)
    assert not fault.sure
    assert "1 of 24 energies are far off the others: data, frame 5 by -" in fault.text


def test_one_energy_off_among_many_compositions():
    names = ("CH4", "H2O", "NH3", "C2H6", "CO2", "HCN", "CH3OH", "C2H2", "N2", "O2", "H2", "CO")
    frames = [f for name in names for f in molecules(name, num_frames=2)]
    assert faults(frames) == []
    frames[7] = labelled(frames[7], energy=frames[7].calc.results["energy"] + 3000.0)
    (fault,) = faults(frames)
    assert "1 of 24 energies are far off the others: data, frame 7 by 2998 eV" in fault.text


def test_forces_that_have_nothing_to_do_with_the_energies():
    rng = np.random.default_rng(0)
    frames = crystals(num_frames=30, rattle=0.02, strain=0.0)
    mixed = [labelled(f, energy=f.calc.results["energy"], forces=rng.normal(size=(4, 3))) for f in frames]
    (fault,) = faults(mixed)
    assert not fault.sure
    assert "do not change as the forces say" in fault.text


def test_cells_of_two_sizes_with_one_energy():
    cells = [labelled(f.repeat((1, 1, n)), energy=-14.0 + 0.01 * n) for n in (1, 2, 3) for f in crystals(2)]
    assert any("--units energy=eV/atom" in fault.text for fault in faults(cells))
    right = [labelled(f.repeat((1, 1, n)), energy=-14.0 * n) for n in (1, 2, 3) for f in crystals(2)]
    assert faults(right) == []


def test_energies_with_the_kinetic_energy():
    """What molecular dynamics conserves does not change with the forces."""
    frames = crystals(num_frames=40, rattle=0.03, strain=0.0)
    forces = [f.calc.results["forces"] for f in frames]
    kept = [labelled(f, energy=1.0 + 1e-4 * k, forces=forces[k]) for k, f in enumerate(frames)]
    assert any("kinetic energy" in fault.text and not fault.sure for fault in faults(kept))


def test_energies_rounded_beyond_their_differences_are_silent():
    frames = crystals(num_frames=40, rattle=0.004, strain=0.0)
    coarse = [
        labelled(f, energy=round(f.calc.results["energy"], 2), forces=f.calc.results["forces"])
        for f in frames
    ]
    assert faults(coarse) == []


def test_medians_of_many_compositions():
    rng = np.random.default_rng(0)
    indices = np.concatenate([np.arange(200_000), rng.integers(0, 200_000, 100_000)])
    values = rng.normal(size=len(indices))
    found = _medians(values, indices)  # a pass over all values for each index would take minutes
    for index in range(40):
        assert found[index] == np.median(values[indices == index])


STRAINED = {"num_frames": 40, "rattle": 0.08, "strain": 0.04}
"""Steps and strains so large that they spoil the rule by a third."""


def without_stress(frames):
    return [labelled(f, **{name: f.calc.results[name] for name in ("energy", "forces")}) for f in frames]


def test_the_sign_of_forces_in_strained_cells():
    frames = crystals(**STRAINED)
    assert faults(frames) == []
    (fault,) = faults(scaled(frames, forces=-1.0))
    assert fault.sure
    assert "--units forces=-eV/Å" in fault.text


def test_the_sign_of_forces_in_strained_cells_without_stress():
    frames = without_stress(crystals(**STRAINED | {"strain": 0.02}))
    assert faults(frames) == []
    (fault,) = faults(
        [labelled(f, **{**f.calc.results, "forces": -f.calc.results["forces"]}) for f in frames]
    )
    assert fault.sure
    assert "--units forces=-eV/Å" in fault.text


def test_energies_per_atom_of_cells_of_one_size():
    frames = crystals(**STRAINED)
    found = faults(scaled(frames, energy=len(frames[0])))
    assert len(found) == 2  # by forces and by stress
    assert all(fault.sure and "perhaps --units energy=eV/atom" in fault.text for fault in found)


def test_lengths_in_bohr_beside_forces_per_ångström():
    for frames in (crystals(**STRAINED), molecules(num_frames=40)):
        longer = []
        for f in without_stress(frames):
            copy = f.copy()
            copy.set_cell(f.cell.array / BOHR)
            copy.positions = f.positions / BOHR
            longer.append(labelled(copy, **f.calc.results))
        first, *others = faults(longer)
        assert "--units length=bohr" in first.text
        assert first.sure
        assert all("sum of their covalent radii" in fault.text for fault in others)


def test_units_that_the_user_declared_are_named():
    check = LabelCheck("data", {"energy": "hartree"})
    for index, atoms in enumerate(scaled(molecules(), energy=1 / HA)):
        check.add(record(atoms), "file", index)
    told = [fault.text for fault in check.faults()]
    assert any(
        "though units are declared (energy=hartree): perhaps they are what is wrong" in t for t in told
    )
    assert all("energy=hartree" in text for text in told if "--units" in text)


def test_two_methods_in_one_source():
    frames = [f for seed in (0, 1) for f in crystals(num_frames=12, seed=seed)]
    shifted = [
        labelled(f, **{**f.calc.results, "energy": f.calc.results["energy"] - 3.0 * len(f)})
        for f in frames[12:]
    ]
    check, apart = LabelCheck("data"), LabelCheck("data")
    for index, atoms in enumerate([*frames[:12], *shifted]):
        check.add(record(atoms), "file", index)
        apart.add(record(atoms, file="a.xyz" if index < 12 else "b.xyz"), "file", index)
    assert any("eV per atom and more apart" in f.text and not f.sure for f in check.faults())
    assert any("files b.xyz and a.xyz" in f.text and "NAME=FILE" in f.text for f in apart.faults())
    assert faults(frames) == []


def test_bonds_and_crystals_of_one_composition_are_no_two_methods():
    frames = crystals(num_frames=12)
    spread = []
    for f in frames:
        wide = f.copy()
        wide.set_cell(1.5 * f.cell.array, scale_atoms=True)
        spread.append(labelled(wide, energy=f.calc.results["energy"] + 12.0))
    assert not [f for f in faults([*frames, *spread]) if "two methods" in f.text]
