"""Slurm's short forms, literal examples."""

import pytest

from megagnn.launch.hostlist import expand_counts, expand_hosts


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b.cluster.org", ["a", "b.cluster.org"]),
        ("node[7]", ["node7"]),
        ("node[01-03,07],login", ["node01", "node02", "node03", "node07", "login"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[099-101]-ib", ["n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]c[3,5]", ["r1c3", "r1c5", "r2c3", "r2c5"]),
        ("gpu-a[1-2],gpu-b[4]", ["gpu-a1", "gpu-a2", "gpu-b4"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node[1-", r"cannot read the host list 'node\[1-': expected a form like"),
        ("node]1", "expected a form like"),
        ("", "expected a form like"),
        ("a,,b", "expected a form like"),
        ("node[3-1]", "'3-1' is no number and no rising range"),
        ("node[a-c]", "'a-c' is no number"),
        ("node[]", "'' is no number"),
    ],
)
def test_bad_hosts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_hosts(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x1),10(x3)", [1, 2, 10, 10, 10])]
)
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "4(2)", "x2", "4,,3"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the tasks per node '.*': expected a form like 4\(x2"):
        expand_counts(text)
