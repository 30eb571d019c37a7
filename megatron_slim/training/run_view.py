"""The scalars of a run read back from tensorboard, as numbers and as tables (no torch)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.distillation.terms import LOSS_TERMS, SUFFIX, LossTerm
from megatron_slim.errors import SlimError
from megatron_slim.training.run_figures import KINDS

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = (
    "throughput/tokens_per_second_per_gpu",
    "throughput/student_tflops_per_gpu",
    "throughput/teacher_tflops_per_gpu",
    "mfu/student",
    "mfu/teacher",
    "pipeline/slowest_over_mean",
    "pipeline/computing",
    "experts/max_over_mean",
    "experts/without_tokens",
    "loss/kd_over_lm",
)
PARTS = tuple(kind.replace(" ", "_") for kind in KINDS)

Series = Mapping[str, Mapping[int, float]]  # value by iteration, by tag


def read_run(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars of a run, all its starts together; what was done again counts as it was done last.

    Args:
        directory: ``--tensorboard-dir`` of the run, or a directory above it (``SAVE`` of pretrain_distill.sh).

    Raises:
        SlimError: there are none.
    """
    if not directory.is_dir():
        raise SlimError("no such directory", where=str(directory), fix="give SAVE or the --tensorboard-dir")
    events = directory / "tensorboard" if (directory / "tensorboard").is_dir() else directory
    if not any(events.glob("*tfevents*")):
        raise SlimError("no tensorboard events of a run", where=str(events), fix="give SAVE or the --tensorboard-dir")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in accumulator.Tags()["scalars"]:
        points = sorted(accumulator.Scalars(tag), key=lambda point: float(point.wall_time))
        # A step in which no prediction of a head counts has no loss: Megatron logs 0 / 0.
        found[tag] = {int(point.step): float(point.value) for point in points if math.isfinite(point.value)}
    found = {tag: points for tag, points in found.items() if points}
    if not any(tag.startswith("slim/") for tag in found):
        raise SlimError(
            "the events hold nothing of slim/",
            where=str(events),
            fix="give a run of megatron-slim distill that has logged a step",
        )
    return found


def loss_names(logged: Iterable[str]) -> list[str]:
    """Names of loss terms among tags: those of `LOSS_TERMS` in its order, then those of budgets and of others."""
    tags = set(logged)
    known = [term.name for term in LOSS_TERMS.values()]
    return [name for name in (*known, *sorted(tags - {*known})) if name in tags and name.endswith(SUFFIX)]


def _term(name: str) -> LossTerm | None:
    """The term of a tag, which may have the name of a budget in front."""
    short = name.rpartition("/")[2]
    return next((term for term in LOSS_TERMS.values() if term.name == short), None)


def in_nats(name: str) -> bool:
    """Whether a term is known to be in nats per token; else it has a scale of its own."""
    term = _term(name)
    return term is not None and term.in_nats


def drawn_names(names: list[str]) -> list[str]:
    """Which terms are drawn: all; of several budgets, which have many, those of the main head in the loss."""
    if not any("/" in name for name in names):
        return names
    terms = {name: _term(name) for name in names}
    return [name for name, term in terms.items() if term is not None and not term.mtp and term.weight is not None]


def line_style(name: str) -> str:
    """How a term is drawn: main head, MTP heads, what is logged alone, and what is not of the heads or not known."""
    term = _term(name)
    if term is None or term.of_layers:
        return "-."
    return ":" if term.weight is None else "--" if term.mtp else "-"


def stages(run: Series) -> dict[str, dict[str, float]]:
    """Of every virtual stage, at the last log: seconds per iteration by part."""
    found: dict[str, dict[str, float]] = {}
    for tag, points in run.items():
        if match := re.fullmatch(r"slim/stage_seconds/(\w+)/stage_(\d+)", tag):
            part, stage = match.groups()
            found.setdefault(stage, {})[part] = points[max(points)]
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def layers(run: Series, what: str) -> dict[str, Mapping[int, float]]:
    """A figure of experts, ``max_over_mean`` or ``without_tokens``, by layer: the trunk's, then the MTP blocks.

    Of several budgets one after the other, each with its name in front.
    """
    found: dict[tuple[str, bool, int, str], Mapping[int, float]] = {}
    for tag, points in run.items():
        if match := re.fullmatch(rf"slim/(?:([^/]+)/)?experts/{what}/(\w+)", tag):
            budget, layer = match[1] or "", match[2]
            found[budget, not layer.startswith("layer"), len(layer), layer] = points
    return {f"{key[0]} {key[-1]}".strip(): found[key] for key in sorted(found)}


def _figures(run: Series) -> list[str]:
    """`FIGURES`, those of each budget with its name in front."""
    ends = {name: re.compile(rf"slim/((?:[^/]+/)?{name})") for name in FIGURES}
    return [match[1] for pattern in ends.values() for tag in run if (match := pattern.fullmatch(tag))]


def summary(run: Series) -> JsonObject:
    """What ``--json`` prints: first, last, least and most of every curve, and stages and experts at the last log."""
    curves = {
        name: {
            "first": points[min(points)],
            "last": points[max(points)],
            "least": min(points.values()),
            "most": max(points.values()),
        }
        for name in (*loss_names(run), *_figures(run))
        if (points := run.get(name) or run.get(f"slim/{name}"))
    }
    last = {
        what: {name: points[max(points)] for name, points in layers(run, what).items()}
        for what in ("max_over_mean", "without_tokens")
    }
    memory = {
        tag.rpartition("_")[2]: points[max(points)]
        for tag, points in run.items()
        if tag.startswith("slim/memory_gb/pipeline_rank_")
    }
    progress = {
        tag.removeprefix("slim/progress/"): points[max(points)]
        for tag, points in run.items()
        if tag.startswith("slim/progress/")
    }
    return {
        "iteration": max(run["slim/progress/fraction"]),
        "progress": progress,
        "curves": curves,
        "stages": stages(run),
        "memory_gb": memory,
        "experts": last,
    }


def tables(found: Document) -> list[Table]:
    """The summary as tables: curves, stages, experts."""
    from rich.table import Table

    table = Table("", "first", "last", "least", "most", title=f"iteration {found['iteration']}")
    for name, curve in found["curves"].items():
        table.add_row(name, *(f"{value:.5g}" for value in curve.values()))
    parts = Table("stage", *PARTS, "total", title="seconds per iteration")
    for stage, seconds in found["stages"].items():
        parts.add_row(stage, *(f"{seconds[part]:.4g}" if part in seconds else "" for part in (*PARTS, "total")))
    experts = Table("layer", "max/mean", "without tokens", title="experts, the most uneven layers")
    uneven, idle = found["experts"]["max_over_mean"], found["experts"]["without_tokens"]
    for name in sorted(uneven, key=uneven.__getitem__, reverse=True)[:8]:
        experts.add_row(name, f"{uneven[name]:.3f}", f"{idle[name]:.1%}")
    found_tables = [table, parts, experts]
    for each in found_tables:
        for column in each.columns[1:]:
            column.justify = "right"
    return found_tables
