"""The command `megagnn report`: one self-contained HTML page of a scaling study, and its figures as files."""

import argparse
import base64
import html
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import megagnn
from megagnn.scaling import compare, rates
from megagnn.scaling.drawing import Drawn, save_figures, write_tensorboard
from megagnn.scaling.figures import draw_all
from megagnn.scaling.fit_command import add_selection, describe, options_of
from megagnn.scaling.laws.analysis import Analysis, Options, analyse
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import read_records, slug

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.35rem; margin-top: 3rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 0; } figure img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
p.missing { color: #7a4a00; background: #fff6e5; padding: .5rem .8rem; border-radius: 4px; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
table { border-collapse: collapse; font-size: .85rem; } td, th { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
"""


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
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{count} runs. Loss: {html.escape(analyses[0].loss_in_words())}. "
        f"Exponents belong to this loss. Made by megagnn {megagnn.__version__}.</p>",
    ]
    for chapter in chapters:
        if len(chapters) > 1:
            parts.append(f"<h2>{html.escape(chapter.title)}</h2>")
        parts += [_figure(one) for one in chapter.drawn]
        parts.append(f"<h3>In numbers</h3><pre>{html.escape(chr(10).join(chapter.text))}</pre>")
        if chapter.analysis is not None:
            parts.append(f"<details><summary>Runs</summary>{_table(chapter.analysis)}</details>")
    return "\n".join([*parts, "</body></html>", ""])


def _figure(drawn: Drawn) -> str:
    title, text = html.escape(drawn.title), html.escape(drawn.text)
    if drawn.figure is None:
        return f'<h3>{title}</h3><p class="missing">{text}</p>'
    image = f'<img alt="{title}" src="{_embedded(drawn)}">'
    return f"<h3>{title}</h3><figure>{image}<figcaption>{text}</figcaption></figure>"


def _embedded(drawn: Drawn) -> str:
    buffer = io.BytesIO()
    assert drawn.figure is not None
    # without a date the page of the same runs is the same
    drawn.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(analysis: Analysis) -> str:
    """One row a run."""
    head = ("run", "width", "depth", "parameters", analysis.options.data_unit, "FLOP", "steps", "seconds")
    cells = "".join(f"<th>{h}</th>" for h in (*head, f"{analysis.loss}, {analysis.unit}"))
    rows = [f"<tr>{cells}</tr>"]
    for record in (*analysis.records, *analysis.other_depths):
        data, loss = getattr(record, analysis.options.data_unit), record.losses[analysis.loss][0]
        values = (
            html.escape(record.run),
            record.width,
            record.depth,
            f"{record.parameters:,}",
            f"{int(data):,}",
            f"{record.flops:.3g}",
            f"{record.steps:,}",
            "" if record.seconds is None else f"{record.seconds:.1f}",
            f"{loss:.5g}",
        )
        rows.append("<tr>" + "".join(f"<td>{v}</td>" for v in values) + "</tr>")
    return f"<table>{''.join(rows)}</table>"
