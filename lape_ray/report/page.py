"""One HTML page that needs nothing but itself: pictures inside, no script, no request. Standard library only."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2328; margin: 0 auto;
  max-width: 100rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h2 { border-bottom: 1px solid #d0d7de; padding-bottom: .2rem; }
p { max-width: 52rem; } .note { color: #59636e; }
figure { margin: 1rem 0; overflow-x: auto; } figure img { max-width: 100%; height: auto; }
figure.wide img { min-width: 84rem; } figcaption { color: #59636e; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; } th, td { padding: .25rem .8rem; border-bottom: 1px solid #d0d7de; text-align: left; }
td.number, th.number { text-align: right; } thead th { background: #f6f8fa; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { border: 1px solid #d0d7de; padding: .6rem; border-radius: 6px; }
.card b { font-size: 1.25rem; display: block; } .card img { display: block; width: 7rem; image-rendering: auto; }
.card.right { border-color: #1a7f37; } .card.wrong { border-color: #cf222e; }
.small { font-size: .82rem; width: 7rem; }
""".strip()


WIDE_PT = 1200.0
NUMBER = re.compile(r"[+-]?\d[\d,.]*|–|×")


def _escape(text: object) -> str:
    return html.escape(str(text))


def data_uri(data: bytes, mime: str) -> str:
    """Encode `data` as an address that holds it."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


class Page:
    """The parts of a page, collected in their order; `html` is the whole."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{_escape(title)}</h1>"]
        if subtitle:
            self.note(subtitle)

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{_escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{_escape(text)}</p>")

    def note(self, text: str) -> None:
        self._parts.append(f'<p class="note">{_escape(text)}</p>')

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{_escape(text)}</pre>")

    def figure(self, svg: bytes, caption: str) -> None:
        """Add an SVG picture, kept apart from the page's own elements, so that names inside it meet no others.

        A narrow window scrolls a wide one, whose text would become too small to read.
        """
        source = data_uri(svg, "image/svg+xml")
        width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', svg)
        kind = ' class="wide"' if width and float(width[1]) > WIDE_PT else ""
        self._parts.append(
            f'<figure{kind}><img src="{source}" alt="{_escape(caption)}">'
            f"<figcaption>{_escape(caption)}</figcaption></figure>"
        )

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table.

        Columns of nothing but numbers stand to the right; give numbers as text where they need rounding.
        """
        cells = [[str(value) for value in row] for row in rows]
        numbers = [
            any(filled := [row[column] for row in cells if row[column]])
            and all(map(NUMBER.fullmatch, filled))
            for column in range(len(header))
        ]

        def line(tag: str, row: Sequence[str]) -> str:
            kinds = (' class="number"' if number else "" for number in numbers)
            return "".join(f"<{tag}{k}>{_escape(text)}</{tag}>" for k, text in zip(kinds, row, strict=True))

        body = "".join(f"<tr>{line('td', row)}</tr>" for row in cells)
        head = line("th", header)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def facts(self, values: Iterable[tuple[str, str]]) -> None:
        """Add a row of cards: a name and a large value."""
        cards = "".join(
            f'<div class="card">{_escape(name)}<b>{_escape(value)}</b></div>' for name, value in values
        )
        self._parts.append(f'<div class="cards">{cards}</div>')

    def pictures(self, cards: Iterable[tuple[bytes, str, bool]]) -> None:
        """Add a wall of PNG pictures, each with a line of text and whether it is right."""
        parts = [
            f'<div class="card {"right" if right else "wrong"}"><img src="{data_uri(png, "image/png")}" '
            f'alt="{_escape(text)}"><div class="small">{_escape(text)}</div></div>'
            for png, text, right in cards
        ]
        self._parts.append(f'<div class="cards">{"".join(parts)}</div>')

    def html(self) -> str:
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{_escape(self.title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
        )
