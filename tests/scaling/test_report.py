"""`megagnn fit` and `megagnn report` on synthetic studies."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from megagnn.cli import main
from megagnn.scaling import compare, rates
from megagnn.scaling.figures import draw_all
from megagnn.scaling.laws.analysis import Options, analyse, hold_out_largest, select
from megagnn.scaling.laws.intervals import Interval
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.report import chapters_of, page
from tests.scaling.synthetic import LAW, law, study, write

FAST = ("--bootstrap", "100")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("study") / "runs.jsonl", study())


def test_fit(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.json"
    arguments = (
        "--predict",
        "1e7,1e5",
        "--hold-out-largest",
        "--json",
        str(out),
        "--level",
        "0.99",
        "--bootstrap",
        "1000",
    )
    assert main(["fit", str(runs), *arguments]) == 0
    text = capsys.readouterr().out
    for expected in (
        "40 runs of the recipe 'synthetic', loss: force_mae [eV/Å], absolute error",
        "L(N) at D = 3.2e+04: ",
        "L(N, D): joint, L_inf + A N^-a + B D^-b",
        "those of squared errors are about twice as large",
        "0.26 (Frey et al. 2023)",
        "iso-FLOP: N_opt ~ C^",
    ):
        assert expected in text
    values = json.loads(out.read_text())
    joint = next(entry for entry in values["laws"] if entry["what"] == "L(N, D)")
    for name in ("a", "b", "L_inf"):
        interval = Interval(**joint["intervals"][name])
        assert interval.covers(LAW[name]), name
    assert Interval(**values["optimal_exponents"]["N_opt"]).covers(LAW["b"] / (LAW["a"] + LAW["b"]))
    predicted = values["predictions"][0]
    assert predicted["low"] < law(1e7, 1e5) < predicted["high"]
    assert [h["run"] for h in values["held_out"]] == ["w256-l3-n32000-s0", "w256-l3-n32000-s1"]


def test_held_out_runs_do_not_enter_their_prediction() -> None:
    records, options = study(), Options(replicates=100)
    changed = [
        dataclasses.replace(r, losses={"force_mae": (7.0, "eV/Å")}) if "w256-l3-n32000" in r.run else r
        for r in records
    ]
    before, after = hold_out_largest(records, options), hold_out_largest(changed, options)
    assert [h.predicted for h in before] == [h.predicted for h in after]
    assert {h.observed for h in after} == {7.0}


def test_a_squared_loss_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(runs), "--loss", "energy_mse", *FAST]) == 0
    text = capsys.readouterr().out
    assert "energy_mse [(eV/atom)^2], squared error" in text
    assert "halve them before comparing" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--loss", "mae"),
            r"the loss must be one that every run has, \['force_mae', 'energy_mse'\], got 'mae'",
        ),
        (("--recipe", "other"), "no run has the recipe 'other'; there are: synthetic"),
        (("--level", "90"), "--level must lie between 0 and 1, got 90"),
        (("--bootstrap", "20"), "--bootstrap must be at least 100 at --level 0.9, got 20"),
        (("--predict", "1e7"), "--predict takes two positive numbers"),
        (("--at-least", "1e4"), "--at-least takes two positive numbers"),
        (("--at-least", "1e9,1"), "no run has at least 1e\\+09 parameters and 1 structures; the runs reach"),
    ],
)
def test_wrong_options(
    runs: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(runs), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_laws_of_the_larger_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs below the limits, on which the error is another, change nothing."""
    records = study(widths=(16, 32, 64, 128, 256), data=(500, 4000, 32000, 256000), seeds=1)
    least = sorted({r.parameters for r in records})[1]
    small = {"force_mae": (7.0, "eV/Å"), "energy_mse": (7.0, "(eV/atom)^2")}
    spoilt = [
        dataclasses.replace(r, losses=small) if r.parameters < least or r.structures < 4000 else r
        for r in records
    ]
    told = []
    for name, chosen in (("whole", records), ("spoilt", spoilt)):
        runs = write(tmp_path / f"{name}.jsonl", chosen)
        extra = ["--at-least", f"{least},4000", "--predict", "1e8,1e6"]
        assert main(["fit", str(runs), *extra, *FAST]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert f"{4 * 3} runs of the recipe" in told[0]


def test_recipes_and_units_are_not_mixed() -> None:
    records = study(widths=(16, 32), data=(500,), seeds=1)
    other = dataclasses.replace(records[0], recipe="other")
    with pytest.raises(ValueError, match="several recipes, other, synthetic; choose one with --recipe"):
        select([*records, other], Options())
    unit = dataclasses.replace(records[0], losses={"force_mae": (1.0, "meV/Å")})
    with pytest.raises(ValueError, match="'force_mae' comes in different units, eV/Å, meV/Å"):
        select([*records, unit], Options())


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = study(widths=(16, 32, 64, 128), depths=(2, 4), data=(500, 4000, 32000), seeds=1)
    techniques = [dataclasses.replace(r, technique="save", memory_gib=1.0, seconds=10.0) for r in records]
    techniques += [
        dataclasses.replace(r, run=r.run + "-r", technique="recompute", memory_gib=0.3) for r in records[:6]
    ]
    runs = write(tmp_path / "runs.jsonl", techniques)
    page, figures, board = tmp_path / "out" / "report.html", tmp_path / "figures", tmp_path / "board"
    arguments = ("--out", str(page), "--figures", str(figures), "--tensorboard", str(board), *FAST)
    assert main(["report", str(runs), *arguments]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/svg+xml;base64,") == 8
    assert 'class="missing"' not in text
    assert not re.search(r'(src|href)="(?!data:)', text), "the page fetches something"
    assert {p.suffix for p in figures.iterdir()} == {".png", ".pdf"}
    assert len(list(figures.iterdir())) == 16
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    assert len(events.Tags()["images"]) == 8


def test_what_is_missing_is_a_sentence(tmp_path: Path) -> None:
    """Four runs of one depth and one data size, without memory."""
    analysis = analyse(study(widths=(16, 32, 64, 128), data=(500,), seeds=1), Options(replicates=100))
    drawn = {one.name: one for one in draw_all(analysis)}
    assert {name for name, one in drawn.items() if one.figure is not None} == {
        "loss-size",
        "frontier",
        "exponents",
    }
    assert drawn["loss-data"].text == "All runs have one data size."
    assert "one depth (3 layers)" in drawn["depth-width"].text
    assert "Fewer than two techniques" in drawn["techniques"].text
    assert "at least three model sizes of equal compute" in drawn["iso-flop"].text
    with pytest.raises(ValueError, match="all runs are of one size"):
        hold_out_largest(analysis.records[:1], Options())


def test_one_run_alone(tmp_path: Path) -> None:
    """Nothing can be fitted, and the page says so."""
    runs = write(tmp_path / "runs.jsonl", study(widths=(16,), data=(500,), seeds=1))
    assert main(["report", str(runs), "--out", str(tmp_path / "report.html"), *FAST]) == 0
    assert (tmp_path / "report.html").read_text().count('class="missing"') == 8


def test_recipes_side_by_side(tmp_path: Path) -> None:
    """Two recipes, one of them 10 % worse everywhere; other depths are in one figure and in no law."""
    ours = study(widths=(16, 32, 64, 128), depths=(3,), seeds=1)
    theirs = [
        dataclasses.replace(
            r, run="t" + r.run, recipe="the other", losses={k: (1.1 * v, u) for k, (v, u) in r.losses.items()}
        )
        for r in ours
    ]
    deep = [
        dataclasses.replace(r, run=f"deep{r.run}", depth=9, losses={"force_mae": (9.0, "eV/Å")}) for r in ours
    ]
    options = Options(replicates=100, depth=3)
    chapters = chapters_of([*ours, *theirs, *deep], options)
    assert [c.title for c in chapters] == [
        "Recipe synthetic",
        "Recipe the other",
        "Side by side: synthetic and the other",
    ]
    first, second = (c.analysis for c in chapters[:2])
    assert first is not None
    assert second is not None
    assert first.joint is not None
    alone = analyse(ours, options)
    assert alone.joint is not None
    assert first.joint.fit.predict((1e5, 1e4)) == alone.joint.fit.predict((1e5, 1e4))
    found = compare.matches(first, second)
    assert len(found) == 16
    assert [m.ratio for m in found] == pytest.approx([1.1] * 16)
    text = page(chapters)
    assert text.count("data:image/svg+xml;base64,") == 7 + 6 + 1
    assert len({one.name for c in chapters for one in c.drawn}) == 8 + 8 + 1
    third = [dataclasses.replace(r, recipe="a third") for r in ours]
    names = [one.name for c in chapters_of([*ours, *theirs, *third], options) for one in c.drawn]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"no run has 5 layers; there are runs of 3; set --depth L"):
        analyse(ours, dataclasses.replace(options, depth=5))


def test_two_families_at_equal_sizes_and_compute() -> None:
    """Models of other widths are matched by their parameters. One recipe is ahead below 1e12 FLOP."""
    ours = study(widths=(16, 32, 64, 128), seeds=1, noise=0.0)
    theirs = [
        dataclasses.replace(
            r,
            recipe="the other",
            width=2 * r.width,
            parameters=round(1.1 * r.parameters),
            losses={k: (v * (r.flops / 1e12) ** -0.05, u) for k, (v, u) in r.losses.items()},
        )
        for r in ours
    ]
    # nearer to a size of ours than theirs is, and then too far from any
    near = [
        dataclasses.replace(r, parameters=round(1.05 / 1.1 * r.parameters)) for r in theirs if r.width == 64
    ]
    far = [dataclasses.replace(r, parameters=round(1.3 * r.parameters)) for r in ours if r.width == 128]
    both = [*ours, *theirs, *near, *far]
    first, second = (analyse(both, Options(recipe=r, replicates=100)) for r in ("synthetic", "the other"))
    found = compare.matches(first, second)
    assert len(found) == 16
    assert {round(m.parameters[1] / m.parameters[0], 2) for m in found} == {1.05, 1.1}
    equal = compare.at_equal_compute(first, second)
    assert equal is not None
    (crossing,) = equal.crossings()
    assert crossing == pytest.approx(1e12, rel=0.05)
    before, after = (equal.at(f * crossing) for f in (0.1, 10.0))
    assert before[1] / before[0] == pytest.approx(10**0.05, rel=0.02)
    assert after[1] / after[0] == pytest.approx(10**-0.05, rel=0.02)
    text = "\n".join(compare.describe(first, second))
    assert first.frontier_points is not None
    flops, losses = first.frontier_points
    worse = dataclasses.replace(first, frontier_points=(flops, 2 * losses))
    assert f"they cross at {crossing:.2g} FLOP" in text
    assert "'synthetic' is ahead at all of it" in "\n".join(compare.describe(first, worse))
    dearer = dataclasses.replace(first, frontier_points=(1e6 * flops, losses))
    assert compare.at_equal_compute(first, dearer) is None
    assert "have no compute in common" in "\n".join(compare.describe(first, dearer))
    # without a size in common the frontiers are drawn all the same; without either nothing is
    others = analyse(
        [dataclasses.replace(r, steps=r.steps + 1) for r in theirs],
        Options(recipe="the other", replicates=100),
    )
    assert compare.matches(first, others) == []
    drawn = compare.draw(first, others)
    assert drawn.figure is not None
    assert len(drawn.figure.axes[1].lines) == 4
    assert "have no size in common; right, all runs" in drawn.text
    without = dataclasses.replace(others, frontier_points=None)
    assert compare.at_equal_compute(first, without) is None
    assert compare.draw(first, without).figure is None


def search(power: float = -0.5) -> list[RunRecord]:
    """A learning-rate search whose best rate goes with a power of the width."""
    shape = study(widths=(16, 64, 256), data=(500,), seeds=1)
    return [
        dataclasses.replace(
            r,
            run=f"{r.run}-{rate}",
            learning_rate=rate,
            losses={"force_mae": (1 + math.log(rate / (8e-3 * (r.width / 16) ** power)) ** 2, "eV/Å")},
        )
        for r in shape
        for rate in (2.5e-4 * 2**k for k in range(10))
    ]


@pytest.mark.parametrize("power", [0.0, -0.5, -1.0])
def test_best_rates(power: float) -> None:
    records = search(power)
    assert rates.drift(records, "force_mae") == pytest.approx(power, abs=0.02)
    cost = rates.cost_of_transfer(records, "force_mae")
    assert cost == pytest.approx(1 + math.log(16**power) ** 2, rel=0.1)
    at_end = [r for r in records if r.learning_rate < 1e-3]
    assert "by width: 16: at an end" in rates.describe(at_end, Options())[0]
    deep = [dataclasses.replace(r, width=16, depth=r.width) for r in records]
    assert rates.drift(deep, "force_mae") == rates.drift(records, "force_mae")
    assert "by depth: 16: " in rates.describe(deep, Options())[0]
    assert "the shallowest model's best rate costs the deepest" in rates.describe(deep, Options())[-1]


def test_search_and_ablation_on_the_page(tmp_path: Path) -> None:
    """Two recipes that differ in their best rate and loss, each in a line and a point; ends are marked."""
    first = search()
    second = [
        dataclasses.replace(
            r,
            run="b" + r.run,
            recipe="with a part",
            losses={"force_mae": (r.losses["force_mae"][0] / 2, "eV/Å")},
        )
        for r in first
        if r.learning_rate <= 4e-3
    ]
    found, loss, unit = rates.best_of([*first, *second], Options())
    assert (loss, unit, len(found)) == ("force_mae", "eV/Å", 6)
    assert [b.rate for b in found[:3]] == pytest.approx([8e-3, 4e-3, 2e-3])
    assert [b.at_end for b in found] == [False, False, False, True, True, False]
    lines = rates.describe_recipes([*first, *second], Options())
    assert lines[1].split()[-1] == "1.00"
    assert lines[-2].split()[-1] == "0.50"
    assert lines[-1].startswith("*")
    grid, made = write(tmp_path / "grid.jsonl", study(seeds=1)), write(tmp_path / "search.jsonl", first)
    between = write(tmp_path / "between.jsonl", [*first, *second])
    page = tmp_path / "report.html"
    extra = ["--rates", str(made), "--ablation", str(between), "--figures", str(tmp_path / "figures")]
    assert main(["report", str(grid), "--out", str(page), *extra, *FAST]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.index("Between the recipes") < text.index("Learning rates")
    assert {"ablation.png", "rates.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}
