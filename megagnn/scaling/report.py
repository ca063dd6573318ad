"""The command `megagnn report`: one self-contained HTML page of a scaling study, and its figures as files."""

import argparse
import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import megagnn
from megagnn.scaling.analysis import Analysis, analyse
from megagnn.scaling.drawing import Drawn, save_figures, write_tensorboard
from megagnn.scaling.figures import draw_all
from megagnn.scaling.fit_command import add_selection, describe, options_of
from megagnn.scaling.records import read_records

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
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
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write every figure as PNG and PDF")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="also write the figures as images there"
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn report RUNS.jsonl... --out report.html [--figures DIR] [--tensorboard DIR]`."""
    options = options_of(arguments)
    analysis = analyse(read_records(arguments.runs), options)
    drawn = draw_all(analysis)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page(analysis, drawn), encoding="utf-8")
    print(f"wrote {arguments.out}")
    if arguments.figures is not None:
        for path in save_figures(drawn, arguments.figures):
            print(f"wrote {path}")
    if arguments.tensorboard is not None:
        write_tensorboard(drawn, arguments.tensorboard)
        print(f"images:  tensorboard --logdir {arguments.tensorboard}")
    return 0


def page(analysis: Analysis, drawn: Sequence[Drawn]) -> str:
    """The whole page; figures are embedded, nothing is fetched."""
    title = f"Scaling of {analysis.loss}, recipe {analysis.records[0].recipe}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(analysis.records)} runs. Loss: {html.escape(analysis.loss_in_words())}. "
        f"Exponents belong to this loss. Made by megagnn {megagnn.__version__}.</p>",
    ]
    for one in drawn:
        parts.append(f"<h2>{html.escape(one.title)}</h2>")
        text = html.escape(one.text)
        if one.figure is None:
            parts.append(f'<p class="missing">{text}</p>')
        else:
            parts.append(
                f'<figure><img alt="{html.escape(one.title)}" src="{_embedded(one)}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
    parts.append(f"<h2>Laws</h2><pre>{html.escape(chr(10).join(describe(analysis)))}</pre>")
    parts.append(f"<h2>Runs</h2>{_table(analysis)}")
    return "\n".join([*parts, "</body></html>", ""])


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
    for record, data, loss in zip(analysis.records, analysis.data(), analysis.losses(), strict=True):
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
