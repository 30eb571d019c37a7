#!/usr/bin/env python3
"""Simulate pipeline schedules of distillation: the teacher inline, against a teacher that fills the bubbles.

What stages cost is counted from the published model and its 23A2B student. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_simulator import Outcome, Pipeline, simulate
from megatron_slim.cli import positive, run_tool, tool_parser
from megatron_slim.errors import SlimError

STUDENT = {"num_hidden_layers": 36, "hidden_size": 1536, "num_experts": 256, "num_experts_per_tok": 8}
BYTES = 2  # bf16


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--pipeline-size", type=positive, nargs="+", default=[8, 4, 16], metavar="P")
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=[32, 16, 64, 128], metavar="M")
    parser.add_argument("--virtual-stages", type=positive, nargs="+", default=[1, 2, 4], metavar="V")
    parser.add_argument(
        "--teacher-over-student", type=float, nargs="+", default=[1.0, 3.0], metavar="T", help="beside the counted ratio"
    )
    parser.add_argument("--steps", type=positive, default=4, help="simulated once nothing changes from one to the next")
    parser.add_argument("--micro-batch-tokens", type=positive, default=4096, help="for the memory of hidden states")
    return parser.parse_args()


def forward_flops(config: dict[str, Any]) -> tuple[float, float]:
    """Per token, of the transformer blocks that a pipeline is divided into, and of MTP blocks and heads."""
    from benchmarks.estimate import flops_per_token
    from benchmarks.models import shape_of

    shape = shape_of(config)
    trunk = sum(flops_per_token(replace(shape, mtp_num_layers=0)).values())
    heads = (1 + shape.mtp_num_layers) * 2 * shape.hidden_size * shape.vocab_size
    return trunk, sum(flops_per_token(shape).values()) - trunk + heads


def stage_costs(p: int, v: int, t: float | None, even: bool) -> dict[str, list[float]]:
    """Seconds of every stage, in units of the student's forward pass over all of them, divided by p.

    Args:
        p: pipeline-parallel size.
        v: virtual stages of a rank.
        t: teacher forward over student forward; counted if None.
        even: as a planner of layouts would have them, instead of equally many layers, with MTP blocks and heads on top
            of those of the last stage.
    """
    from benchmarks.models import PUBLISHED

    student, teacher = forward_flops(PUBLISHED | STUDENT), forward_flops(PUBLISHED)
    scale = 1.0 if t is None else t * sum(student) / sum(teacher)

    def spread(trunk: float, last: float) -> list[float]:
        whole, stages = sum(student), p * v
        if even:
            return [p * (trunk + last) / whole / stages] * stages
        return [p * trunk / whole / stages] * (stages - 1) + [p * (trunk / stages + last) / whole]

    forward = spread(*student)
    return {
        "forward": forward,
        "backward": [2 * each for each in forward],
        "teacher": spread(*(scale * each for each in teacher)),
    }


def best_ahead(inline: Pipeline, steps: int, parts: int) -> tuple[Outcome, dict[str, int]]:
    """The quickest of the schedules whose teacher runs ahead, at most a step's micro-batches."""
    m = inline.micro_batches
    found = [
        (simulate(replace(inline, ahead=ahead, lead=lead, parts=parts), steps), {"ahead": ahead, "lead": lead})
        for ahead in sorted({m // 4, m // 2, m, 2 * m} - {0})
        for lead in sorted({0, 1, inline.ranks // 2, inline.ranks, m // 2})
    ]
    return min(found, key=lambda pair: (round(pair[0].seconds, 9), pair[0].held))


def compare(p: int, m: int, v: int, t: float | None, even: bool, args: argparse.Namespace) -> dict[str, Any]:
    """A row: the inline schedule, and what running ahead makes of it, in whole stages and in pieces of a sixth."""
    inline = Pipeline(p, m, **stage_costs(p, v, t, even), virtual=v)
    base = simulate(inline, args.steps)
    row: dict[str, Any] = {
        "p": p,
        "m": m,
        "v": v,
        "t": sum(inline.teacher) / sum(inline.forward),
        "even": even,
        "inline_seconds": base.seconds,
        "inline_idle": base.idle,
        # All of the teacher's pass for a step, then the student's, as when hidden states are cached ahead.
        "no_bubble_over_inline": (1 - base.idle),
    }
    for name, parts in (("ahead", 1), ("ahead_in_parts", 6)):
        outcome, chosen = best_ahead(inline, args.steps, parts)
        row[f"{name}_over_inline"] = outcome.seconds / base.seconds
        row[f"{name}_schedule"] = chosen
        row[f"{name}_held"] = outcome.held
        row[f"{name}_held_gb"] = outcome.held * args.micro_batch_tokens * 2048 * BYTES / 1e9
    return row
