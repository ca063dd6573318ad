"""Labels of other people and programs, all of them right: nothing is found in them."""

from pathlib import Path

import ase
import pytest

from megagnn.cli import main
from megagnn.data.formats import ReadOptions, read_structures
from megagnn.data.near_frames import slopes
from megagnn.data.plausibility import LabelCheck

ARCHIVE = Path(__file__).parents[2] / "examples" / "data" / "three-sources.tar.xz"
TEST_DATA = Path(ase.__file__).parent / "test" / "testdata"
OUTPUTS = (
    "aims/issue_3345_spin_md_light.out",
    "aims/md.out",
    "aims/relax.out",
    "aims/singlepoint.out",
    "aims/numerical_stress.out",
    "castep/md.castep",
    "gpaw_expected_text_output",
    "qbox_04_md_ntc.reference.xml",
    "qbox_test.xml",
    "vasp/OUTCAR_example_1",
    "vasp/vasprun_dfpt.xml",
    "vasp/vasprun_pstress.xml",
)
OF_EACH = 800


def test_the_embedded_sources():
    checks: dict[str, LabelCheck] = {}
    counts: dict[str, int] = {}
    for index, structure in enumerate(read_structures(ARCHIVE, ReadOptions(), None)):
        source = structure.source
        counts[source] = counts.get(source, 0) + 1
        if counts[source] <= OF_EACH:
            checks.setdefault(source, LabelCheck(source)).add(structure, "data", index)
    assert len(checks) == 3
    for check in checks.values():
        assert check.faults() == []
        of_forces = slopes(check._frames.pairs())[0]
        assert of_forces is not None
        assert of_forces.num_pairs >= 5  # the check did look
        assert 0.85 < of_forces.value < 1.15


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_programs(name, tmp_path, capsys):
    file = TEST_DATA / name
    assert file.exists(), f"this release of ASE lacks {name}: name another output"
    format_of = ["--ase-format", "aims-output"] if name.startswith("aims") else []
    assert main(["prepare", str(file), "--out", str(tmp_path / "out"), "--split", "1,0,0", *format_of]) == 0
    printed = capsys.readouterr()
    told = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    assert [line for line in told if "do not determine the reference energies" not in line] == []
