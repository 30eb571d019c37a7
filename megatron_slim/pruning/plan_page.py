"""A plan as a page that holds everything: tables, pictures, and a ranking next to it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slim.files import new_directory
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan_tables import Section
from megatron_slim.pruning.plan_view import ranking_lines
from megatron_slim.pruning.statistics import Statistics

PAGE, RANKING = "index.html", "ranking.jsonl"

# The page may load nothing, whatever a name in the plan holds.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Pruning plan</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.scroll { overflow-x: auto; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Pruning plan</h1>
"""


def write_page(plan: Plan, stats: Statistics, tables: Sequence[Section], directory: Path) -> None:
    """Write page, pictures and ranking into a new directory, which appears whole; same plan, same bytes."""
    from megatron_slim.pruning.plan_plots import figures

    pictures = figures(plan, stats)
    with new_directory(directory) as temporary:
        for name, content in pictures.items():
            (temporary / name).write_bytes(content)
        (temporary / RANKING).write_text("".join(ranking_lines(plan, stats)), encoding="utf-8")
        (temporary / PAGE).write_text(page(plan, tables, pictures), encoding="utf-8")


def page(plan: Plan, tables: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Tables and pictures as one HTML document that refers to nothing outside itself."""
    hashes = {"plan": plan.sha256, "source": plan.source_sha256, "statistics": plan.stats_sha256}
    parts = [f"<p>{name} <code>{html.escape(value)}</code></p>\n" for name, value in hashes.items()]
    # The pictures come before the last table, which has a row for every block.
    parts += [_section_html(section) for section in tables[:-1]]
    parts += [_picture_html(name, content) for name, content in pictures.items()]
    parts += [_section_html(section) for section in tables[-1:]]
    return f"{_HEAD}{''.join(parts)}</body>\n</html>\n"


def _picture_html(name: str, content: bytes) -> str:
    title, data = html.escape(name.partition(".")[0].capitalize()), base64.b64encode(content).decode()
    return f'<h2>{title}</h2>\n<p><img alt="{title}" src="data:image/png;base64,{data}"></p>\n'


def _section_html(section: Section) -> str:
    lines = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.rows:
        lines += ['<div class="scroll"><table>', _row_html("th", section.columns)]
        lines += [*(_row_html("td", row) for row in section.rows), "</table></div>"]
    if section.note:
        lines.append(f"<p>{html.escape(section.note)}</p>")
    return "\n".join(lines) + "\n"


def _row_html(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
