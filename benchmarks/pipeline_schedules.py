#!/usr/bin/env python3
"""Simulate pipeline schedules of distillation: the teacher inline, against one that runs ahead in blocks or bubbles.

What stages cost is counted from the published model and its 23A2B student. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pipeline_simulator import Pipeline, simulate
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

STUDENT = {"num_hidden_layers": 36, "hidden_size": 1536, "num_experts": 256, "num_experts_per_tok": 8}
BYTES = 2  # bf16
PARTS = 6


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--pipeline-size", type=positive, nargs="+", default=[8, 4, 16], metavar="P")
    parser.add_argument("--micro-batches", type=positive, nargs="+", default=[32, 16, 64], metavar="M")
    parser.add_argument("--virtual-stages", type=positive, nargs="+", default=[1, 2, 4], metavar="V")
    parser.add_argument(
        "--teacher-over-student",
        type=float,
        nargs="+",
        default=[1.0, 3.0],
        metavar="T",
        help="in addition to the counted ratio",
    )
    parser.add_argument("--block", type=positive, default=4, metavar="K", help="steps of --teacher-ahead")
    parser.add_argument("--steps", type=positive, default=4, help="simulated once nothing changes from one to the next")
    parser.add_argument("--micro-batch-tokens", type=positive, default=4096, help="for the memory of hidden states")
    return parser.parse_args()


def forward_flops(config: dict[str, Any]) -> tuple[float, float]:
    """Per token, of the transformer blocks that a pipeline is divided into, and of MTP blocks and heads."""
    from benchmarks.models import shape_of
    from megatron_slim.planning.preparation import flops_per_token

    shape = shape_of(config)
    trunk = sum(flops_per_token(replace(shape, mtp_num_layers=0)).values())
    heads = (1 + shape.mtp_num_layers) * 2 * shape.hidden_size * shape.vocab_size
    return trunk, sum(flops_per_token(shape).values()) - trunk + heads


def stage_costs(p: int, v: int, t: float | None, even: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every stage forward, backward and of the teacher; a rank's forward pass takes 1 on average.

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
    return forward, [2 * each for each in forward], spread(*(scale * each for each in teacher))


def quickest_ahead(inline: Pipeline, parts: int, steps: int) -> dict[str, Any]:
    """The best of the schedules whose teacher runs ahead by at most a step, its stages cut into ``parts``."""
    m = inline.micro_batches
    schedules = [
        replace(inline, ahead=ahead, lead=lead, parts=parts)
        for ahead in (max(1, m // 2), m)
        for lead in (0, 1, inline.ranks)
    ]
    outcomes = [(simulate(each, steps), each) for each in schedules]
    best, schedule = min(outcomes, key=lambda pair: round(pair[0].seconds, 9))
    return {
        "seconds": best.seconds,
        "idle": best.idle,
        "ahead": schedule.ahead,
        "lead": schedule.lead,
        "held_micro_batches": best.held,
    }


def compare(p: int, m: int, v: int, t: float | None, even: bool, args: argparse.Namespace) -> dict[str, Any]:
    """A row: the teacher inline, ahead in whole stages, and ahead in sixths of a stage, a layer of 48 over 8 ranks."""
    from benchmarks.models import PUBLISHED

    inline = Pipeline(p, m, *stage_costs(p, v, t, even), virtual=v)
    base = simulate(inline, args.steps)
    # Every so many steps look the same.
    block = simulate(replace(inline, ahead=args.block * m, block=args.block), args.block)
    found = {"whole": quickest_ahead(inline, 1, args.steps), "in_parts": quickest_ahead(inline, PARTS, args.steps)}
    sizes = {"p": p, "m": m, "v": v, "t": sum(inline.teacher) / sum(inline.forward), "even_stages": even}
    gigabytes = args.micro_batch_tokens * PUBLISHED["hidden_size"] * BYTES / 1e9
    return {
        **sizes,
        "inline_seconds": base.seconds,
        "inline_idle": base.idle,
        "block_over_inline": block.seconds / base.seconds,
        "ahead_over_inline": found["whole"]["seconds"] / base.seconds,
        "ahead_in_parts_over_inline": found["in_parts"]["seconds"] / base.seconds,
        "held_gb": max(each["held_micro_batches"] for each in found.values()) * gigabytes,
        "bound_over_inline": least_seconds(inline, args.steps) / base.seconds,
        "schedules": found,
    }


def least_seconds(inline: Pipeline, steps: int) -> float:
    """No schedule is quicker than the rank with most to do, nor than a student whose teacher takes no time."""
    costs = [f + b + t for f, b, t in zip(inline.forward, inline.backward, inline.teacher, strict=True)]
    busiest = max(sum(costs[rank :: inline.ranks]) for rank in range(inline.ranks))
    alone = simulate(replace(inline, teacher=[0.0] * inline.stages), steps)
    return max(inline.micro_batches * busiest, alone.seconds)


def cases(args: argparse.Namespace) -> list[tuple[int, int, int, float | None, bool]]:
    """The first of every list is the case in question; the others are changed one at a time."""
    p, m, v = args.pipeline_size[0], args.micro_batches[0], args.virtual_stages[0]
    found: list[tuple[int, int, int, float | None, bool]] = [(p, m, v, None, True), (p, m, v, None, False)]
    found += [(p, m, each, None, True) for each in args.virtual_stages[1:]]
    found += [(p, each, v, None, True) for each in args.micro_batches[1:]]
    found += [(each, m, v, None, True) for each in args.pipeline_size[1:]]
    return found + [(p, m, v, each, True) for each in args.teacher_over_student]


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate every case and report."""
    for p, m, v, _, _ in cases(args):
        if v > 1 and m % p:
            raise SlimError(f"{m} micro-batches with virtual stages over {p} ranks", fix="choose a multiple")
    rows = [compare(*case, args) for case in cases(args)]
    keys = ("block_over_inline", "ahead_over_inline", "ahead_in_parts_over_inline", "bound_over_inline", "held_gb")
    results = {key: rows[0][key] for key in keys} | {"cases": rows}
    if not args.json:
        columns = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        print(" | ".join(columns))
        for row in rows:
            print(" | ".join(f"{row[key]:.3g}" for key in columns))
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
