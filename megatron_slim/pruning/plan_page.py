"""A plan as a page that holds everything: tables, pictures, and a ranking next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_slim.files import new_directory
from megatron_slim.page import Section, document, fact_html, picture_html, section_html
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan_view import ranking_lines
from megatron_slim.pruning.statistics import Statistics

PAGE, RANKING = "index.html", "ranking.jsonl"


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
    parts = [fact_html(name, value) for name, value in hashes.items()]
    # The pictures come before the last table, which has a row for every block.
    parts += [section_html(section) for section in tables[:-1]]
    parts += [picture_html(name.partition(".")[0].capitalize(), content) for name, content in pictures.items()]
    parts += [section_html(section) for section in tables[-1:]]
    return document("Pruning plan", parts)
