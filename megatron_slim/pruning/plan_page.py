"""What tools/show_plan.py does: the tables of a plan on a terminal, and a page that holds everything."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_slim.cli import say
from megatron_slim.errors import SlimError
from megatron_slim.files import new_directory, refuse_existing
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.plan_tables import Section, sections
from megatron_slim.pruning.plan_view import check_statistics, ranking_lines, summary
from megatron_slim.pruning.statistics import Statistics

PAGE, RANKING = "index.html", "ranking.jsonl"
TERMINAL_WIDTH = 120  # where standard output is not a terminal

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


def run_show(plan_file: Path, *, stats_file: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    """Print a plan; with ``save``, write it as a page, pictures and a ranking into a new directory.

    Args:
        plan_file: plan.json.
        stats_file: the statistics that the plan follows from; without them no importance is known.
        save: a new directory; needs the statistics.

    Returns:
        `plan_view.summary`, with the paths.

    Raises:
        SlimError: no plan, other statistics, or ``save`` exists.
    """
    if save is not None:
        refuse_existing(save)
        if stats_file is None:
            raise SlimError("pictures and ranking are made of statistics", where="--save", fix="give --stats")
    plan = load_plan(plan_file)
    stats = None
    if stats_file is not None:
        stats = Statistics.load(stats_file)
        check_statistics(plan, stats, where=str(stats_file))
    tables = sections(plan, stats)
    print_sections(tables)
    if save is not None:
        assert stats is not None
        write_page(plan, stats, tables, save)
        say(f"{save}: open {PAGE} in a browser")
    return {"plan": str(plan_file), "save": None if save is None else str(save), **summary(plan, stats)}


def print_sections(tables: Sequence[Section]) -> None:
    """Tables on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, TERMINAL_WIDTH)
    for section in tables:
        if section.rows:
            table = Table(*section.columns, title=section.title, title_justify="left")
            table.columns[0].no_wrap = True
            for column in table.columns[1:]:
                column.justify = "right"
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        if section.note:
            console.print(section.note, markup=False, highlight=False)


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
