"""Units declared by the user: numbers, signs, spellings, what is not known."""

import numpy as np
import pytest
from ase import units as au

from megagnn.data.formats import ReadOptions, Units, parse_units, read_structures
from tests.data.formats.frames import CELL, STRESS, crystal, text_of, write


@pytest.mark.parametrize(
    ("text", "quantity", "factor"),
    [
        ("energy=Ha", "energy", 27.211386),
        ("energy=hartree/atom", "energy", 3 * 27.211386),
        ("energy=meV", "energy", 1e-3),
        ("energy=kcal/mol", "energy", 0.0433641),
        ("energy=kJ/mol", "energy", 0.01036427),
        ("energy=Ry", "energy", 13.605693),
        ("forces=Ha/bohr", "forces", 51.422067),
        ("forces=-Ha/Bohr", "forces", -51.422067),
        ("forces=Ry/bohr", "forces", 25.711034),
        ("forces=Ha/\u212b", "forces", 27.211386),  # the sign of the unit, not the letter
        ("forces=kcal/mol/A", "forces", 0.0433641),
        ("forces=kJ/mol/nm", "forces", 0.001036427),
        ("stress=GPa", "stress", 1 / 160.21766),
        ("stress=-kBar", "stress", -1 / 1602.1766),
        ("stress=bar", "stress", 1 / 1602176.6),
        ("stress=Pa", "stress", 1 / 160.21766e9),
        ("stress=atm", "stress", 0.000101325 / 160.21766),
        ("stress=eV/Å^3", "stress", 1.0),
        ("stress=Ha/bohr**3", "stress", 183.6315),
        ("length=bohr", "length", 0.52917721),
        ("length=nm", "length", 10.0),
        ("energy=Ha/atom", "virial", 27.211386),  # a virial follows the unit of energies
        ("energy=Ha,virial=eV", "virial", 1.0),
        ("energy=Ha", "forces", 1.0),
    ],
)
def test_factors(text, quantity, factor):
    assert parse_units(text).factor(quantity, num_atoms=3) == pytest.approx(factor, rel=2e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("energy=erg", "unknown unit 'erg' of energy; known are eV, meV, Ha"),
        ("energy=-Ha", "unknown unit '-Ha' of energy"),
        ("forces=Ha", "unknown unit 'Ha' of forces; known are an energy by a length"),
        ("stress=eV/Å", "unknown unit 'eV/Å' of stress"),
        ("charge=e", "unknown quantity 'charge'; known are energy, forces, stress, virial, length, dipole"),
        ("dipole=C*m", "unknown unit 'C\\*m' of dipole; known are e\\*Å, e\\*bohr, Debye"),
        ("Ha", "takes each quantity once, as in energy=Ha"),
        ("energy=Ha,energy=eV", "takes each quantity once"),
    ],
)
def test_what_is_not_known(text, message):
    with pytest.raises(ValueError, match=message):
        parse_units(text)


def test_atomic_units_with_gradients(tmp_path):
    path = write(tmp_path / "au.xyz", crystal(1, stress=text_of(STRESS)))
    (plain,) = read_structures(path)
    units = parse_units("energy=Ha,forces=-Ha/bohr,stress=-GPa,length=bohr")
    (read,) = read_structures(path, ReadOptions(units=units))
    assert read.energy == pytest.approx(plain.energy * au.Hartree)
    assert np.allclose(read.forces, -plain.forces * au.Hartree / au.Bohr)
    assert np.allclose(read.stress, -STRESS * au.GPa)
    assert np.allclose(read.positions, plain.positions * au.Bohr)
    assert np.allclose(read.cell, CELL * au.Bohr)


def test_energy_per_atom_in_kcal(tmp_path):
    path = write(tmp_path / "k.xyz", crystal(0))
    (read,) = read_structures(path, ReadOptions(units=Units({"energy": "kcal/mol/atom"})))
    assert read.energy == pytest.approx(-30.0 * au.kcal / au.mol)
