"""The tables of a plan, for a terminal and for a page (no torch)."""

from __future__ import annotations

import io
import statistics as averages
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.fp8_sizes import RECIPES, size_violations
from megatron_slim.architecture.parallelism import layout_violations
from megatron_slim.page import Section
from megatron_slim.pruning import report
from megatron_slim.pruning.plan_view import Axis, ranked_axes, summary
from megatron_slim.pruning.statistics import LAYER_KINDS, Statistics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatron_slim.pruning.plan import Plan

TEXT_WIDTH = 120
LAYERS, AXES = "Removed layers", "Ranked axes"


def table(section: Section) -> Table:
    """A section as a table of rich."""
    from rich.table import Table

    found = Table(*section.columns, title=section.title, title_justify="left")
    found.columns[0].no_wrap = True
    for column in found.columns[1:]:
        column.justify = "right"
    for row in section.rows:
        found.add_row(*row)
    return found


def text(plan: Plan, stats: Statistics | None = None) -> str:
    """The tables of a plan as plain text."""
    from rich.console import Console

    stream = io.StringIO()
    show(sections(plan, stats), Console(width=TEXT_WIDTH, file=stream, color_system=None, force_jupyter=False))
    return stream.getvalue()


def show(shown: Sequence[Section], console: Console) -> None:
    """Tables and notes on ``console``."""
    for section in shown:
        if section.rows:
            console.print(table(section))
        if section.note:
            console.print(section.note, markup=False, highlight=False)


def _section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Section:
    """A table without the columns that are empty in every row, as those of statistics are without them."""
    filled = [i for i in range(len(columns)) if not i or any(row[i] for row in rows)]
    return Section(title, tuple(columns[i] for i in filled), tuple(tuple(row[i] for i in filled) for row in rows), note)


def sections(plan: Plan, stats: Statistics | None) -> list[Section]:
    """The tables of a plan, in the order in which a person reads them."""
    numbers = summary(plan, stats)
    return [
        _size_section(numbers),
        _recipe_section(plan),
        *_search_section(plan),
        _layer_section(numbers),
        *_axis_sections(plan, stats, numbers),
        _fp8_section(plan),
    ]


def _size_section(numbers: JsonObject) -> Section:
    rows = report.rows(numbers["before"], numbers["after"])
    renamed = [("bytes in bf16" if label == report.LABELS["bytes"] else label, *cells) for label, *cells in rows]
    return _section("Sizes", ("", "before", "after", "left"), renamed)


def _fp8_section(plan: Plan) -> Section:
    """Where the result could be trained in FP8; a hint, for in bf16 every size can."""
    shape = plan.target_shape
    columns = [tp for tp in (1, 2, 4, 8) if not layout_violations(shape, tp=tp, etp=1)]
    rows = []
    for recipe in RECIPES:
        fits = [not size_violations(shape, recipe, tp=tp) for tp in columns]
        rows.append((recipe, *("fits" if fit else "no" for fit in fits)))
    reasons = [sentence for recipe in RECIPES for sentence in size_violations(shape, recipe)[:1]]
    return _section("Training in FP8", ("recipe", *(f"tp {tp}" for tp in columns)), rows, "".join(reasons[:1]))


def _recipe_section(plan: Plan) -> Section:
    recipe = {key: value for key, value in plan.recipe.to_dict().items() if isinstance(value, dict)}
    rows = [(f"{section}.{key}", str(value)) for section, keys in recipe.items() for key, value in keys.items()]
    return _section("Recipe", ("", "asked for"), rows)


def _search_section(plan: Plan, most: int = 10) -> Iterator[Section]:
    """The best candidates of a budget, and the one that was chosen."""
    if plan.search is None:
        return
    rows = [
        (
            f"{rank}{' chosen' if rank == plan.search.chosen + 1 else ''}",
            *(f"{size:,}" for size in row.sizes.values()),
            *(f"{row.params:,}", f"{row.active_params:,}", f"{row.memory_gb:.3g}", f"{row.score:.4f}"),
            "" if row.loss is None else f"{row.loss:.4f}",
        )
        for rank, row in enumerate(plan.search.candidates, start=1)
        if rank <= most or rank == plan.search.chosen + 1
    ]
    columns = ("candidate", *plan.search.candidates[0].sizes, "parameters", "active", "GB in bf16", "score", "loss")
    note = f"of {plan.search.count} candidates, the best by score; parameters and active without MTP"
    yield _section("Sizes under the budget", columns, rows, note)


def _layer_section(numbers: JsonObject) -> Section:
    rows = [
        (str(entry["layer"]), entry["type"].removesuffix("_attention"), *(_number(entry[kind]) for kind in LAYER_KINDS))
        for entry in numbers["dropped_layers"]
    ]
    columns = ("layer", "attention", "cosine of input and output", "block influence")
    return _section(LAYERS, columns, rows, numbers["depth_reason"])


def _axis_sections(plan: Plan, stats: Statistics | None, numbers: JsonObject) -> Iterator[Section]:
    axes = ranked_axes(plan, stats)
    rows = [
        _axis_row([axis for axis in axes if axis.name == name]) for name in dict.fromkeys(axis.name for axis in axes)
    ]
    yield _section(AXES, AXIS_COLUMNS, rows)
    yield _section(
        "Experts by block", EXPERT_COLUMNS, [_expert_row(entry) for entry in numbers["experts"]], EXPERT_NOTE
    )


AXIS_COLUMNS = ("axis", "ranked in", "kept", "of", "share of importance kept", "least of any place")
EXPERT_COLUMNS = (
    *("block", "kept", "unchanged", "absorbed", "dropped", "largest", "importance", "routing"),
    *("least kept", "best gone"),
)
EXPERT_NOTE = (
    "kept: survivors, unchanged: survivors that absorb nothing, bit for bit, absorbed: experts merged into a "
    "survivor, dropped: removed experts, largest: the most experts merged into one; importance, routing: share "
    "that the survivors had of all; least kept, best gone: expert and importance on either side of the cut."
)


def _axis_row(axes: Sequence[Axis]) -> tuple[str, ...]:
    first, shares = axes[0], [axis.importance_share for axis in axes]
    known = [value for value in shares if value is not None]
    place = first.place if len(axes) == 1 else f"{len(axes)} blocks"
    kept = (f"{len(first.kept):,}", f"{first.size:,}")
    least = _percent(min(known)) if len(known) > 1 else ""
    return (first.name, place, *kept, _percent(averages.fmean(known) if known else None), least)


def _expert_row(entry: JsonObject) -> tuple[str, ...]:
    counts = (str(entry[key]) for key in ("kept", "unchanged", "absorbed", "dropped", "largest_group"))
    shares = (_percent(entry[key]) for key in ("importance_share", "routing_share"))
    return (entry["block"], *counts, *shares, _edge(entry["least_kept"]), _edge(entry["most_dropped"]))


def _edge(edge: JsonObject | None) -> str:
    return "" if edge is None else f"{edge['index']}: {edge['importance']:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
