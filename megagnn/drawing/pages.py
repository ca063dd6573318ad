"""One self-contained HTML page: figures are embedded, nothing is fetched."""

import base64
import html
import io
from collections.abc import Sequence

from megagnn.drawing.figures import Drawn

STYLE = """
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


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of parts that are HTML; the title and what is beside them is escaped here."""
    name = html.escape(title)
    head = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
        f"<style>{STYLE}{style}</style></head><body>",
        f"<h1>{name}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>", ""])


def figure(drawn: Drawn) -> str:
    """A figure with title and caption, or the sentence that says why there is none."""
    title, text = html.escape(drawn.title), html.escape(drawn.text)
    if drawn.figure is None:
        return f'<h3>{title}</h3><p class="missing">{text}</p>'
    image = f'<img alt="{title}" src="{_embedded(drawn)}">'
    return f"<h3>{title}</h3><figure>{image}<figcaption>{text}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _embedded(drawn: Drawn) -> str:
    buffer = io.BytesIO()
    assert drawn.figure is not None
    # without a date the page of the same content is the same
    drawn.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
