#!/usr/bin/env python3
"""The figures of docs/one_gpu.md: disk, memory and hours of each step from a published model to its healed student.

All are estimates of the planner and products of sizes; nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import tool_parser

RECIPES = ("qwen3_next_80a3b_to_23a2b", "qwen3_5_35a3b_to_19a3b")
TOKENS, GLOBAL_BATCH = 100_000_000, 64
DOWNLOAD = 1e9 / 8  # bytes a second of a line of 1 Gb/s
STEPS = ("download", "calibrate", "prune", "record", "export", "serve")


def parse_args() -> argparse.Namespace:
    """Command line."""
    return tool_parser(__doc__.splitlines()[0]).parse_args()


def steps(recipe: str) -> list[dict[str, Any]]:
    """Of every step: GB that it adds on disk, GB of the host's memory and of the GPU's, hours; None: not counted."""
    from megatron_slim.architecture.flops import teacher_flops
    from megatron_slim.architecture.table import count_parameters
    from megatron_slim.packaged import find_recipe
    from megatron_slim.planning.hardware import GIB, GPUS
    from megatron_slim.planning.preparation import ASSUMED, calibration, conversion
    from megatron_slim.planning.sources import Asked, find_models
    from megatron_slim.teacher_cache.recording import ROUND_TOKENS

    models, gpu = find_models(Asked(recipe=find_recipe(Path(recipe)))), GPUS["h100"]
    assert models.source is not None
    source, student = (2e-9 * count_parameters(each).total for each in (models.source, models.student))
    pass_, prune = calibration(models.source, gpu), conversion(models.source)["prune to Hugging Face"]
    flops = teacher_flops(models.source, 4096, runs_mtp=True)
    recording = sum(flops.layers) * TOKENS / (gpu.bf16 * ASSUMED["bf16_share_of_peak"])
    reading = math.ceil(TOKENS / ROUND_TOKENS) * 1e9 * source / ASSUMED["disk_bytes_per_second"]
    row = 2e-9 * models.source.hidden_size  # of a token and head
    states, waiting = (1 + models.source.mtp_num_layers) * TOKENS * row, min(TOKENS, ROUND_TOKENS) * row
    host, fits = pass_.host_with_work_dir * GIB / 1e9, pass_.gpu_gib * GIB / 1e9
    rows: tuple[tuple[float | None, ...], ...] = (
        (source, None, None, 1e9 * source / DOWNLOAD / 3600),
        (None, host, fits, pass_.minutes / 60),
        (student, prune["host_gb"], None, prune["minutes"] / 60),
        (states, waiting, None, (recording + reading) / 3600),
        (student, None, None, None),
        (None, None, student, None),
    )
    return [
        {"step": step, **dict(zip(("disk", "host", "gpu", "hours"), row, strict=True))}
        for step, row in zip(STEPS, rows, strict=True)
    ]


def choices(recipe: str, gpu: str) -> list[dict[str, Any]]:
    """What `megatron-slim plan-parallelism --gpus 1 --teacher-cache` proposes: the first of each kind of states."""
    from dataclasses import replace

    from megatron_slim.packaged import find_recipe
    from megatron_slim.planning.hardware import GPUS
    from megatron_slim.planning.layouts import Settings, Wanted
    from megatron_slim.planning.report import days
    from megatron_slim.planning.search import Job
    from megatron_slim.planning.sources import Asked, find_models
    from megatron_slim.planning.storage import STORAGES
    from megatron_slim.planning.subsets import subsets

    models = find_models(Asked(recipe=find_recipe(Path(recipe))))
    settings = replace(Settings(), global_batch=GLOBAL_BATCH, teacher_head_only=True)
    found = subsets(Job(models.student, models.teacher, settings, 1, GPUS[gpu]), Wanted())
    rows = []
    for states in STORAGES:
        best = next(each for each in found if each.job.settings.states == states)
        rows.append(
            {
                "gpu": gpu.upper(),
                "states": states,
                "train_only": best.name,
                "trained": best.trained / 1e9,
                "gb": best.candidate.needed / 1e9,
                "host": best.host / 1e9,
                "hours": 24 * days(best.candidate.step, best.job, TOKENS),
            }
        )
    return rows


def _number(value: float | None) -> str:
    """A figure of a table, rounded as far as an estimate goes.

    >>> _number(163.2), _number(2.05), _number(0.04), _number(None)
    ('163', '2.0', '0.04', '')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def tables(recipe: str) -> list[str]:
    """Lines of the page, without the heads of its tables."""
    lines = []
    for row in steps(recipe):
        cells = [row["step"], *(_number(row[name]) for name in ("disk", "host", "gpu", "hours"))]
        lines.append(f"| {' | '.join(cells)} |")
    for row in (row for gpu in ("h100", "h200") for row in choices(recipe, gpu)):
        cells = [row["gpu"], row["states"], f"`{row['train_only']}`", f"{row['trained']:.2f}B"]
        cells += [_number(row["gb"]), _number(row["host"] or None), _number(row["hours"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All tables, printed unless ``--json`` is given."""
    found = {recipe: tables(recipe) for recipe in RECIPES}
    if not args.json:
        for recipe, lines in found.items():
            print(recipe, *lines, sep="\n")
    return found


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
