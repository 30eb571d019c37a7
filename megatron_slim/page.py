"""Pages that hold everything: tables, pictures and text as one HTML document that loads nothing (no torch)."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The page may load nothing, whatever a name in it holds. On a phone a table that is still too wide scrolls by itself.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }}
th:first-child, td:first-child, .text th, .text td {{ text-align: left; }}
img {{ max-width: 100%; }}
.scroll {{ overflow-x: auto; }}
h1, h2, p, code, .text td:last-child {{ overflow-wrap: anywhere; }}
pre {{ background: #f5f5f5; padding: 0.6em 0.8em; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }}
@media (max-width: 40em) {{
  body {{ font-size: 14px; margin: 1em auto; }}
  table {{ font-size: 12px; }}
  th, td {{ padding: 0.2em 0.25em; }}
  th:first-child, td:first-child {{ padding-left: 0; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclass(frozen=True)
class Section:
    """One table; the first column is text, the others are numbers.

    Attributes:
        title: what it shows.
        columns: their headings.
        rows: cells, as many as columns.
        note: a sentence below it.
        text: on a page, the other columns are text as well.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: bool = False


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of pieces that the functions below have made."""
    return f"{_HEAD.format(title=html.escape(title))}{''.join(parts)}</body>\n</html>\n"


def section_html(section: Section) -> str:
    """A table with its heading and its note."""
    lines = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.rows:
        lines += [
            '<div class="scroll"><table class="text">' if section.text else '<div class="scroll"><table>',
            _row_html("th", section.columns),
        ]
        lines += [*(_row_html("td", row) for row in section.rows), "</table></div>"]
    if section.note:
        lines.append(f"<p>{html.escape(section.note)}</p>")
    return "\n".join(lines) + "\n"


def _row_html(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def picture_html(title: str, content: bytes, *, width: str = "100%") -> str:
    """PNG bytes with a heading; ``width``, in CSS, is the most that it is shown with."""
    name, data = html.escape(title), base64.b64encode(content).decode()
    image = f'<img alt="{name}" style="max-width: min(100%, {width})" src="data:image/png;base64,{data}">'
    return f"<h2>{name}</h2>\n<p>{image}</p>\n"


def fact_html(name: str, value: str) -> str:
    """A value of any length with its name: a path, a hash."""
    return f"<p>{html.escape(name)} <code>{html.escape(value)}</code></p>\n"


def text_html(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>\n"


def code_html(title: str, text: str) -> str:
    """Text as it is, under a heading."""
    return f"<h2>{html.escape(title)}</h2>\n<pre>{html.escape(text)}</pre>\n"


def link_html(text: str, target: str) -> str:
    """A paragraph that is a link to a file next to the page."""
    return f'<p><a href="{html.escape(target)}">{html.escape(text)}</a></p>\n'
