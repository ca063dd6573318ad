"""Errors per source against labels computed by hand, and what `megagnn evaluate` refuses."""

import json
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from megagnn.calculator import MegaGNNCalculator
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from megagnn.data.dataset import StructureDataset
from megagnn.data.record import Structure
from megagnn.data.store import write_store
from tests import runs


def evaluate(checkpoint: Path, store: Path, out: Path, *arguments: str) -> dict:
    return everything(checkpoint, store, out, *arguments)["sources"]


def everything(checkpoint: Path, store: Path, out: Path, *arguments: str) -> dict:
    assert main(["evaluate", str(checkpoint), str(store), "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


def structure(number: int = 0, **changes: object) -> Structure:
    """A dimer of copper and silver, labelled."""
    fields = {
        "atomic_numbers": np.array([29, 47], dtype=np.uint8),
        "positions": np.array([[0, 0, 0], [0, 0, 2.5 + 0.02 * number]]),
        "cell": np.zeros((3, 3)),
        "pbc": np.zeros(3, dtype=bool),
        "energy": 1.0 + number,
        "forces": np.full((2, 3), 0.1 * number),
        "source": "clusters",
        "level": "EMT",
        "group": str(number),
    }
    return Structure(**{**fields, **changes})  # type: ignore[arg-type]


def write(path: Path, structures: list[Structure], splits: list[int] | int = 2) -> Path:
    splits = [splits] * len(structures) if isinstance(splits, int) else splits
    write_store(path, structures, splits=np.array(splits, dtype=np.uint8))
    return path


def test_metrics_equal_a_loop_over_structures(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    """Through another door: the ASE calculator on every test structure of one source."""
    metrics = evaluate(checkpoint, store, tmp_path / "metrics.json")
    assert set(metrics) == {"clusters", "crystals"}
    statistics = load_checkpoint(checkpoint).statistics
    calculator = MegaGNNCalculator(checkpoint, source="clusters", dtype="float32")
    errors, baselines, means, forces, zero = [], [], [], [], []
    tests = [s for s in runs.structures() if s.source == "clusters" and int(s.group) // 2 in (5, 11)]
    for s in tests:
        atoms = Atoms(s.atomic_numbers, s.positions, calculator=calculator)
        n = len(atoms)
        references = dict(zip(statistics.elements, statistics.references[0], strict=True))
        errors.append((atoms.get_potential_energy() - s.energy) / n)
        baselines.append((sum(references[z] for z in s.atomic_numbers) - s.energy) / n)
        means.append(statistics.mean_energy[0] - s.energy / n)
        forces.append(atoms.get_forces() - s.forces)
        zero.append(s.forces)
    got = metrics["clusters"]
    assert got["num_test"] == len(tests) == 6
    for key, values in [
        ("energy_{}_mev_per_atom", errors),
        ("baseline_energy_{}_mev_per_atom", baselines),
        ("mean_baseline_energy_{}_mev_per_atom", means),
        ("force_{}_mev_per_angstrom", forces),
        ("baseline_force_{}_mev_per_angstrom", zero),
    ]:
        values = np.concatenate([np.ravel(v) for v in values])
        assert got[key.format("mae")] == pytest.approx(1e3 * np.abs(values).mean(), rel=1e-4)
        assert got[key.format("rmse")] == pytest.approx(1e3 * np.sqrt((values**2).mean()), rel=1e-4)


def test_parity_plot(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "parity.png"
    evaluate(checkpoint, store, tmp_path / "metrics.json", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_other_split_and_weights(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    average = evaluate(checkpoint, store, tmp_path / "a.json", "--split", "valid")
    last = evaluate(checkpoint, store, tmp_path / "b.json", "--split", "valid", "--last-weights")
    key = "energy_mae_mev_per_atom"
    assert average["clusters"][key] != last["clusters"][key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"atomic_numbers": np.array([79, 47], dtype=np.uint8)},
            "Au, which the model has never seen in the source .clusters.; there it knows Cu, Ag",
        ),
        ({"source": "rings"}, r"source\(s\) \['rings'\], the model knows \['clusters', 'crystals'\]"),
        ({"level": "PBE"}, r"level\(s\) \['PBE'\], the model knows \['EMT'\]"),
    ],
    ids=["element", "source", "level"],
)
def test_what_the_model_does_not_know(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    write(tmp_path / "store", [structure(**changes)])
    out = tmp_path / "metrics.json"
    assert main(["evaluate", str(checkpoint), str(tmp_path / "store"), "--json", str(out)]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not out.exists()


def test_an_empty_split_and_an_unreadable_store(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = runs.structures()
    write_store(tmp_path / "train-only", records, splits=np.zeros(len(records), dtype=np.uint8))
    assert main(["evaluate", str(checkpoint), str(tmp_path / "train-only")]) == 2
    assert "the test split of" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_forces_of_fixed_atoms_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """evaluate says why there are no errors of forces, train refuses; a free atom is enough for both."""
    fixed, half = np.array([True, True]), np.array([True, False])
    held = [structure(k, fixed=fixed) for k in range(6)]
    for name, records in (("held", held), ("free", [*held[:-1], structure(5, fixed=half)])):
        store = write(tmp_path / name, records, [0, 1, 2, 0, 2, 2])
        assert main(["evaluate", str(checkpoint), str(store)]) == 0
        said = "no errors of forces: all atoms of the 3 structures with forces are held fixed"
        assert (said in capsys.readouterr().out) == (name == "held")
    out = tmp_path / "run"
    assert runs.train(tmp_path / "held", out, "--loss.stress_weight", "0") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "force_weight is 1 but all atoms of the 2 training structures with forces are held fixed" in error
    assert not out.exists()


def test_a_table_per_file_and_kind(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors of groups add up to those of the source, and each is that of its structures alone."""
    kinds = ["slab", "bulk", "", "bulk", "slab", ""]
    files = ["a.xyz", "a.xyz", "b.xyz", "b.xyz", "b.xyz", "train.xyz"]
    records = [
        structure(k, config_type=kind, file=file)
        for k, (kind, file) in enumerate(zip(kinds, files, strict=True))
    ]
    store = write(tmp_path / "store", records, [2, 2, 2, 2, 2, 0])
    found = everything(checkpoint, store, tmp_path / "m.json", "--max-atoms", "4")
    table = capsys.readouterr().out
    assert set(found["files"]) == {"a.xyz", "b.xyz"}, "the training file has no structure here"
    assert set(found["config_types"]) == {"slab", "bulk", "(none)"}
    assert {name: m["num_test"] for name, m in found["config_types"].items()} == {
        "slab": 2,
        "bulk": 2,
        "(none)": 1,
    }
    for kind in ("files", "config_types"):
        for key in ("energy_mae_mev_per_atom", "force_mae_mev_per_angstrom"):
            total = sum(m["num_test"] * m[key] for m in found[kind].values())
            assert total == pytest.approx(5 * found["sources"]["clusters"][key], rel=1e-9)
    alone = write(tmp_path / "alone", [records[1], records[3]])
    assert evaluate(checkpoint, alone, tmp_path / "n.json")["clusters"] == pytest.approx(
        found["config_types"]["bulk"], rel=1e-6
    )
    assert re.search(r"^config_type +structures", table, re.MULTILINE)
    assert re.search(r"^file +structures", table, re.MULTILINE)
    everything(checkpoint, alone, tmp_path / "n.json")
    assert "config_type" not in capsys.readouterr().out, "of one kind there is nothing to divide"


def test_a_table_per_test_file(checkpoint: Path, tmp_path: Path) -> None:
    """As prepared of files: by their names, and by their folders where names are equal."""
    images = [Atoms("CuAg", positions=[[0, 0, 0], [0, 0, 2.5 + 0.02 * k]]) for k in range(12)]
    for k, atoms in enumerate(images):
        atoms.calc = SinglePointCalculator(atoms, energy=1.0 + 0.01 * k)
        atoms.info["config_type"] = "near" if k < 9 else "far"
    files = [tmp_path / name for name in ("train.xyz", "one/a.xyz", "two/a.xyz", "b.xyz")]
    for k, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        ase.io.write(file, images[3 * k : 3 * k + 3])
    given = [f"clusters={file}" for file in files]
    arguments = ["--test", *given[1:], "--out", str(tmp_path / "store"), "--level", "EMT"]
    split = ["--split", "1,0,0", "--group-by", "frame"]
    assert main(["prepare", given[0], *arguments, *split]) == 0
    found = everything(checkpoint, tmp_path / "store", tmp_path / "m.json")
    names = {str(files[1]): 3, str(files[2]): 3, "b.xyz": 3}
    assert {name: m["num_test"] for name, m in found["files"].items()} == names
    assert {name: m["num_test"] for name, m in found["config_types"].items()} == {"near": 6, "far": 3}


def test_files_of_several_stores(checkpoint: Path, tmp_path: Path) -> None:
    """Stores are told apart by name, their files within them."""
    one = write(tmp_path / "one", [structure(0), structure(1)])
    two = write(tmp_path / "two", [structure(2, file="x.xyz"), structure(3, file="y.xyz")])
    out = tmp_path / "m.json"
    assert main(["evaluate", str(checkpoint), str(one), str(two), "--json", str(out)]) == 0
    files = json.loads(out.read_text())["files"]
    assert {name: m["num_test"] for name, m in files.items()} == {"one": 2, "two/x.xyz": 1, "two/y.xyz": 1}


def test_all_splits_at_once(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    parts = [
        evaluate(checkpoint, store, tmp_path / "m.json", "--split", split)
        for split in ("train", "valid", "test")
    ]
    whole = evaluate(checkpoint, store, tmp_path / "m.json", "--split", "all")
    for source, metrics in whole.items():
        assert metrics["num_test"] == 36 == sum(part[source]["num_test"] for part in parts)
        key = "energy_mae_mev_per_atom"
        total = sum(part[source]["num_test"] * part[source][key] for part in parts)
        assert total == pytest.approx(36 * metrics[key], rel=1e-6)


def test_oversized_structures_that_are_left_out_are_counted(store: Path, tmp_path: Path) -> None:
    """A quarter of each split is larger than the budget."""
    small = ("--data.max_atoms", "5", "--data.oversized", "skip")
    assert runs.train(store, tmp_path / "run", "--train.num_steps", "6", *small) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.safetensors"
    found = everything(checkpoint, store, tmp_path / "m.json")
    num_test = sum(metrics["num_test"] for metrics in found["sources"].values())
    whole = len(StructureDataset([store], "test", 4.0))
    assert found["num_oversized"] == whole - num_test > 0


def test_other_data_than_those_of_a_run_on_a_subset(store: Path, tmp_path: Path) -> None:
    """The training split of another store is taken whole, though the run was on a subset of its own."""
    assert runs.train(store, tmp_path / "run", "--train.num_steps", "6", "--data.num_structures", "9") == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.safetensors"
    other = write(tmp_path / "other", [structure(0), structure(1)], 0)
    own = evaluate(checkpoint, store, tmp_path / "m.json", "--split", "train")
    assert sum(m["num_test"] for m in own.values()) == 9
    found = evaluate(checkpoint, other, tmp_path / "m.json", "--split", "train")
    assert found["clusters"]["num_test"] == 2


def test_unknown_elements_are_left_out_and_counted(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = {"atomic_numbers": np.array([79, 47], dtype=np.uint8)}
    records = [structure(0), structure(1, **gold), structure(2), structure(3, **gold)]
    store = write(tmp_path / "store", records)
    assert main(["evaluate", str(checkpoint), str(store)]) == 2
    message = r"in 2 of 4 structures, holds Au, .* leave these structures out with --skip-unknown, or train"
    assert re.search(message, capsys.readouterr().err)
    found = everything(checkpoint, store, tmp_path / "m.json", "--skip-unknown")
    assert "left out: 2 structures with elements" in capsys.readouterr().out
    assert found["num_left_out"] == 2
    known = write(tmp_path / "known", [records[0], records[2]])
    expected = everything(checkpoint, known, tmp_path / "m.json", "--skip-unknown")
    assert expected["num_left_out"] == 0
    assert found["sources"]["clusters"] == pytest.approx(expected["sources"]["clusters"], rel=1e-6)
    only = write(tmp_path / "only", [records[1]])
    assert main(["evaluate", str(checkpoint), str(only), "--skip-unknown"]) == 2
    assert "no structure whose elements the model knows, of 1" in capsys.readouterr().err


def test_an_element_known_in_another_source_only(store: Path, tmp_path: Path) -> None:
    """Silver among clusters of a run that saw silver in crystals alone has no reference there."""
    copper = [
        s for s in runs.structures() if s.source == "crystals" or np.all(np.asarray(s.atomic_numbers) == 29)
    ]
    data = runs.write_data(tmp_path / "data", copper)
    assert runs.train(data, tmp_path / "run", "--train.num_steps", "6") == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "best.safetensors"
    found = everything(checkpoint, store, tmp_path / "m.json", "--skip-unknown", "--split", "all")
    assert {name: m["num_test"] for name, m in found["sources"].items()} == {"clusters": 18, "crystals": 36}
    assert found["num_left_out"] == 18


def test_data_of_an_unknown_source(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [structure(k, source="mine", level="unknown") for k in range(3)]
    store = write(tmp_path / "store", records)
    assert main(["evaluate", str(checkpoint), str(store)]) == 2
    assert "name the one that applies with --source" in " ".join(capsys.readouterr().err.split())
    found = evaluate(checkpoint, store, tmp_path / "m.json", "--source", "clusters")
    known = write(tmp_path / "known", [structure(k) for k in range(3)])
    assert found == evaluate(checkpoint, known, tmp_path / "m.json")
    other = evaluate(checkpoint, store, tmp_path / "m.json", "--source", "crystals")
    key = "energy_mae_mev_per_atom"
    assert other["crystals"][key] != pytest.approx(found["clusters"][key], rel=1e-3)
    assert main(["evaluate", str(checkpoint), str(store), "--source", "slabs"]) == 2
    assert "['clusters', 'crystals'], got 'slabs'" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(store), "--source", "clusters", "--level", "PBE"]) == 2
    assert "levels of theory ['EMT'], got 'PBE'" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["energy", "forces"])
def test_labels_of_one_kind_only(checkpoint: Path, tmp_path: Path, label: str) -> None:
    """Errors of what is labelled; a column less in the table, and no number in the place of one."""
    store = write(tmp_path / "store", [structure(k, **{label: None}) for k in range(3)])
    metrics = evaluate(checkpoint, store, tmp_path / "m.json")["clusters"]
    assert metrics["num_test"] == 3
    assert ("energy_mae_mev_per_atom" in metrics) == (label != "energy")
    assert ("force_mae_mev_per_angstrom" in metrics) == (label != "forces")
