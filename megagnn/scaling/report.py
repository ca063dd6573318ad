"""The command `megagnn report`: one self-contained HTML page of a scaling study, and its figures as files."""

import argparse
import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import megagnn
from megagnn.drawing import pages
from megagnn.drawing.figures import Drawn, save_figures, write_tensorboard
from megagnn.scaling import compare, rates
from megagnn.scaling.figures import draw_all
from megagnn.scaling.fit_command import add_selection, describe, options_of
from megagnn.scaling.laws.analysis import Analysis, Options, analyse
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import read_records, slug


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn report`."""
    add_selection(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument(
        "--rates", type=Path, nargs="+", metavar="RUNS.jsonl", help="runs of a learning-rate search"
    )
    parser.add_argument(
        "--ablation", type=Path, nargs="+", metavar="RUNS.jsonl", help="runs of recipes between two others"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write every figure as PNG and PDF")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also write the figures as images there"
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn report RUNS.jsonl... --out report.html [--rates RUNS.jsonl...] [--ablation ...] ...`."""
    options = options_of(arguments)
    chapters = chapters_of(read_records(arguments.runs), options)
    if arguments.ablation:
        between = read_records(arguments.ablation)
        lines = rates.describe_recipes(between, options)
        chapters.append(Chapter("Between the recipes", [rates.draw_recipes(between, options)], lines))
    if arguments.rates:
        search = read_records(arguments.rates)
        chapters.append(
            Chapter("Learning rates", [rates.draw(search, options)], rates.describe(search, options))
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(chapters), encoding="utf-8")
    print(f"wrote {arguments.out}")
    drawn = [one for chapter in chapters for one in chapter.drawn]
    if arguments.figures is not None:
        for path in save_figures(drawn, arguments.figures):
            print(f"wrote {path}")
    if arguments.tensorboard is not None:
        write_tensorboard(drawn, arguments.tensorboard)
        print(f"images:  tensorboard --logdir {arguments.tensorboard}")
    return 0


@dataclass(frozen=True)
class Chapter:
    """A recipe's figures, laws and runs; or what compares recipes."""

    title: str
    drawn: Sequence[Drawn]
    text: Sequence[str]
    """Lines of a fixed-width block."""
    analysis: Analysis | None = None


def chapters_of(records: Sequence[RunRecord], options: Options) -> list[Chapter]:
    """One for each recipe, and of several recipes one for each pair.

    Raises:
        ValueError: see `analyse`.
    """
    recipes = [options.recipe] if options.recipe else list(dict.fromkeys(r.recipe for r in records))
    analyses = [analyse(records, replace(options, recipe=recipe)) for recipe in recipes]
    chapters = []
    for analysis in analyses:
        drawn = draw_all(analysis)
        if len(analyses) > 1:
            drawn = [replace(one, name=f"{slug(analysis.records[0].recipe)}-{one.name}") for one in drawn]
        chapters.append(Chapter(f"Recipe {analysis.records[0].recipe}", drawn, describe(analysis), analysis))
    for first, second in itertools.combinations(analyses, 2):
        pair, names = compare.draw(first, second), [a.records[0].recipe for a in (first, second)]
        if len(analyses) > 2:
            pair = replace(pair, name="-".join([pair.name, *map(slug, names)]))
        chapters.append(
            Chapter(f"Side by side: {' and '.join(names)}", [pair], compare.describe(first, second))
        )
    return chapters


def page(chapters: Sequence[Chapter]) -> str:
    """The whole page; figures are embedded, nothing is fetched."""
    analyses = [c.analysis for c in chapters if c.analysis is not None]
    recipes = ", ".join(a.records[0].recipe for a in analyses)
    title = f"Scaling of {analyses[0].loss}, recipe {recipes}"
    count = sum(len(a.records) + len(a.other_depths) for a in analyses)
    parts = [
        f"<p>{count} runs. Loss: {html.escape(analyses[0].loss_in_words())}. "
        f"Exponents belong to this loss. Made by megagnn {megagnn.__version__}.</p>",
    ]
    for chapter in chapters:
        if len(chapters) > 1:
            parts.append(f"<h2>{html.escape(chapter.title)}</h2>")
        parts += [pages.figure(one) for one in chapter.drawn]
        parts.append(f"<h3>In numbers</h3><pre>{html.escape(chr(10).join(chapter.text))}</pre>")
        if chapter.analysis is not None:
            parts.append(f"<details><summary>Runs</summary>{_table(chapter.analysis)}</details>")
    return pages.page(title, parts)


def _table(analysis: Analysis) -> str:
    """One row a run."""
    head = ("run", "width", "depth", "parameters", analysis.options.data_unit, "FLOP", "steps", "seconds")
    rows = []
    for record in (*analysis.records, *analysis.other_depths):
        data, loss = getattr(record, analysis.options.data_unit), record.losses[analysis.loss][0]
        values = (
            html.escape(record.run),
            str(record.width),
            str(record.depth),
            f"{record.parameters:,}",
            f"{int(data):,}",
            f"{record.flops:.3g}",
            f"{record.steps:,}",
            "" if record.seconds is None else f"{record.seconds:.1f}",
            f"{loss:.5g}",
        )
        rows.append(values)
    return pages.table((*head, f"{analysis.loss}, {analysis.unit}"), rows)
