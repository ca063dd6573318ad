"""The command `megagnn fit`: tables of laws, intervals, optima and predictions."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from megagnn.scaling.laws.analysis import (
    DATA_UNITS,
    PUBLISHED,
    Analysis,
    HeldOut,
    LawResult,
    Options,
    analyse,
    hold_out_largest,
    predict,
)
from megagnn.scaling.laws.intervals import Interval
from megagnn.scaling.laws.optimum import optimal_sizes
from megagnn.scaling.laws.record import RunRecord, squared
from megagnn.scaling.records import read_records

FEW = 3  # spare points, below which a bootstrap has little to draw from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn fit`."""
    add_selection(parser)
    parser.add_argument(
        "--predict",
        metavar="N,D",
        action="append",
        default=[],
        help="loss of a run of N parameters on D data, with interval; may be repeated",
    )
    parser.add_argument(
        "--hold-out-largest", action="store_true", help="predict the runs of most compute from the others"
    )
    parser.add_argument(
        "--at-least",
        metavar="N,D",
        help="laws of runs of at least N parameters and D data: where one law does not hold for all sizes",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which runs are fitted, and how; shared with `megagnn report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS.jsonl", help="lines of results")
    parser.add_argument("--loss", metavar="NAME", help="which loss (default: the first that all runs have)")
    parser.add_argument("--recipe", metavar="NAME", help="which runs, where there are several recipes")
    parser.add_argument(
        "--depth", type=int, metavar="L", help="laws of the runs with so many layers only (default: all)"
    )
    parser.add_argument(
        "--data-unit", choices=DATA_UNITS, default=DATA_UNITS[0], help="what D counts (default: structures)"
    )
    parser.add_argument("--level", type=float, default=0.9, help="of intervals (default: 0.9)")
    parser.add_argument("--bootstrap", type=int, default=399, help="replicates (default: 399)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def options_of(arguments: argparse.Namespace) -> Options:
    """From the command line.

    Raises:
        ValueError: a level outside 0..1, or too few replicates for it.
    """
    level, replicates = arguments.level, arguments.bootstrap
    if not 0 < level < 1:
        raise ValueError(f"--level must lie between 0 and 1, got {level:g}")
    least = round(10 / (1 - level))
    if replicates < least:
        raise ValueError(f"--bootstrap must be at least {least} at --level {level:g}, got {replicates}")
    return Options(
        loss=arguments.loss,
        recipe=arguments.recipe,
        depth=arguments.depth,
        data_unit=arguments.data_unit,
        level=level,
        replicates=replicates,
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn fit RUNS.jsonl... [--predict N,D] [--hold-out-largest] [--json OUT]`."""
    options = options_of(arguments)
    points = [_point("--predict", text) for text in arguments.predict]
    records = read_records(arguments.runs)
    if arguments.at_least is not None:
        records = _of_at_least(records, _point("--at-least", arguments.at_least), options)
    analysis = analyse(records, options)
    predictions = {point: predict(analysis, point) for point in points}
    held = hold_out_largest(records, options) if arguments.hold_out_largest else []
    print("\n".join(describe(analysis)))
    print("\n".join(_predictions(analysis, predictions, held)))
    if arguments.json is not None:
        content = to_dict(analysis)
        content["predictions"] = [{"N": n, "D": d, **_interval_dict(i)} for (n, d), i in predictions.items()]
        content["held_out"] = [
            {"run": h.run, "observed": h.observed, **_interval_dict(h.predicted)} for h in held
        ]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {arguments.json}")
    return 0


def _of_at_least(records: list[RunRecord], limits: tuple[float, float], options: Options) -> list[RunRecord]:
    size, data = limits
    chosen = [r for r in records if r.parameters >= size and getattr(r, options.data_unit) >= data]
    if not chosen:
        largest = max(r.parameters for r in records), max(getattr(r, options.data_unit) for r in records)
        raise ValueError(
            f"no run has at least {size:g} parameters and {data:g} {options.data_unit}; the runs reach "
            f"{largest[0]:,} and {largest[1]:,}"
        )
    return chosen


def _point(option: str, text: str) -> tuple[float, float]:
    try:
        size, data = map(float, text.split(","))
    except ValueError:
        size = data = -1.0
    if not (0 < size < math.inf and 0 < data < math.inf):
        raise ValueError(
            f"{option} takes two positive numbers, parameters and data, as 1e7,1e5; got '{text}'"
        )
    return size, data


def show(interval: Interval) -> str:
    """`0.35 [0.31, 0.40]`."""
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def describe(analysis: Analysis) -> list[str]:
    """The results as lines of text."""
    records = analysis.records
    level = 100 * analysis.options.level
    lines = [
        f"{len(records)} runs of the recipe '{records[0].recipe}', loss: {analysis.loss_in_words()}",
        f"D counts {analysis.options.data_unit}; brackets are {level:g} % intervals, "
        f"{analysis.options.replicates} bootstrap replicates over points and seeds",
        "",
    ]
    for results in (analysis.by_size, analysis.by_data):
        for law in results.values():
            lines += describe_law(law)
    if analysis.joint is not None:
        lines += describe_law(analysis.joint)
    if analysis.envelope is not None:
        lines += describe_law(analysis.envelope)
    lines += _optimum(analysis)
    lines += ["", *analysis.missing] if analysis.missing else []
    return [*lines, "", *exponents_note(analysis)]


def describe_law(result: LawResult) -> list[str]:
    """The chosen law with intervals, and by how much the others lose."""
    best = result.choices[0]
    parts = [
        f"{name} = {show(result.intervals[name])}" if name in result.intervals else f"{name} = {value:.4g}"
        for name, value in best.fit.parameters().items()
    ]
    law, seeds = best.fit.law, best.fit.seed_spread()
    lines = [
        f"{result.what}: {law.name}, {law.formula}",
        f"    {', '.join(parts)}",
        f"    {best.fit.num_runs} runs at {len(best.fit.x_GV)} points, scatter of a run "
        f"{100 * best.fit.spread():.1f} %" + ("" if seeds is None else f", of seeds {100 * seeds:.1f} %"),
    ]
    if best.fit.spare < FEW:
        lines.append(f"    only {best.fit.spare} more point(s) than parameters: take the intervals as rough")
    for other in result.choices[1:]:
        name = other.fit.law.name
        text = f"    against {name}: AICc {other.aicc - best.aicc:+.1f}, BIC {other.bic - best.bic:+.1f}"
        if name in result.others:
            exponents = (f"{p} = {show(i)}" for p, i in result.others[name].items())
            text += f"; not excluded, with {', '.join(exponents)}"
        lines.append(text)
    return lines


def _optimum(analysis: Analysis) -> list[str]:
    lines: list[str] = []
    law = analysis.compute_law
    if law is not None and analysis.joint is not None:
        lines.append(
            f"compute: C = {law.k:.3g} N^{law.p:.3f} D^{law.q:.3f} FLOP (scatter {100 * law.scatter:.1f} %)"
        )
        powers = ", ".join(f"{name} ~ C^{show(i)}" for name, i in analysis.optimum.items())
        lines.append(f"compute-optimal, from the joint law: {powers}")
        parameters, top = analysis.joint.fit.parameters(), float(analysis.flops().max())
        for flops in (top, 10 * top):
            size, data, loss = optimal_sizes(parameters, law, flops)
            lines.append(f"    at {flops:.3g} FLOP: N = {size:.3g}, D = {data:.3g}, loss {loss:.4g}")
    for group in analysis.groups:
        found = "not enclosed by the sizes" if group.optimum is None else f"N = {group.optimum:.3g}"
        lines.append(f"iso-FLOP at {group.flops:.3g} FLOP, {len(group.sizes)} runs: minimum {found}")
    if analysis.iso_law is not None:
        iso = analysis.iso_law
        lost = "" if iso.kept == 1 else f"; {100 * (1 - iso.kept):.0f} % of the replicates had no two minima"
        lines.append(f"iso-FLOP: N_opt ~ C^{show(iso.exponent)} through {iso.num_minima} minima{lost}")
    return lines


def exponents_note(analysis: Analysis) -> list[str]:
    """Which loss the exponents belong to, and what others found."""
    kind = squared(analysis.loss)
    note = {
        True: "of a squared error: halve them before comparing with those of absolute errors",
        False: "of an absolute error: those of squared errors are about twice as large",
        None: "of a training objective: compare them only with exponents of the same objective",
    }[kind]
    return [
        f"These exponents are {note}.",
        "Published, each for its own loss and data: "
        + "; ".join(f"{what} {value} ({source})" for what, value, source in PUBLISHED),
    ]


def _predictions(
    analysis: Analysis, predictions: dict[tuple[float, float], Interval], held: list[HeldOut]
) -> list[str]:
    lines = [
        f"prediction at N = {n:.4g}, D = {d:.4g}: {show(interval)} {analysis.unit}"
        for (n, d), interval in predictions.items()
    ]
    for h in held:
        inside = "inside" if h.predicted.covers(h.observed) else "outside"
        lines.append(
            f"held out {h.run}: predicted {show(h.predicted)}, observed {h.observed:.4g} {analysis.unit}, "
            f"{inside}"
        )
    return lines


def _interval_dict(interval: Interval) -> dict[str, Any]:
    """For JSON, which has no infinity: an end that is missing is null."""
    ends = {k: (v if math.isfinite(v) else None) for k, v in (("low", interval.low), ("high", interval.high))}
    return {"value": interval.value, **ends, "level": interval.level}


def to_dict(analysis: Analysis) -> dict[str, Any]:
    """The results for JSON."""
    laws = [*analysis.by_size.values(), *analysis.by_data.values()]
    laws += [law for law in (analysis.joint, analysis.envelope) if law is not None]
    return {
        "recipe": analysis.records[0].recipe,
        "loss": analysis.loss,
        "unit": analysis.unit,
        "data_unit": analysis.options.data_unit,
        "laws": [
            {
                "what": law.what,
                "law": law.fit.law.formula,
                "parameters": law.fit.parameters(),
                "intervals": {name: _interval_dict(i) for name, i in law.intervals.items()},
                "aicc": {choice.fit.law.name: choice.aicc for choice in law.choices},
                "bic": {choice.fit.law.name: choice.bic for choice in law.choices},
            }
            for law in laws
        ],
        "optimal_exponents": {name: _interval_dict(i) for name, i in analysis.optimum.items()},
        "missing": analysis.missing,
    }
