#!/usr/bin/env python3
"""Slowest pipeline rank over the mean, by operations: layers divided evenly, and by --pipeline-layout auto.

Nothing is run: the operations are those of a training step of the published 80B teacher and a student of SlimQwen's
sizes, counted from the architecture table (`megatron_slim.architecture.flops`). See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import PUBLISHED, shape_of
from megatron_slim.architecture.flops import student_flops, teacher_flops
from megatron_slim.architecture.pipeline_layout import Stages, balanced, even_layers
from megatron_slim.architecture.shape import layer_pattern

# Layers, hidden size, experts, top-k (arXiv 2605.08738, table 6; 36 layers as the text has it).
STUDENTS = {"23A2B": (36, 1536, 256, 8), "6A1B": (20, 1280, 128, 8)}
PIPELINES = ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2))


def measure(student: str, ranks: int, virtual: int, seq_length: int) -> dict[str, Any]:
    """Both divisions of one student and its teacher over one pipeline."""
    teacher = shape_of(PUBLISHED)
    layers, hidden, experts, topk = STUDENTS[student]
    shape = teacher.replace(
        num_layers=layers,
        layer_types=layer_pattern(layers, 4),
        hidden_size=hidden,
        num_moe_experts=experts,
        moe_router_topk=topk,
    )
    works = student_flops(shape, seq_length), teacher_flops(teacher, seq_length, runs_mtp=True)
    stages, even = ranks * virtual, None
    if layers % stages == teacher.num_layers % stages == 0:
        divided = (even_layers(layers, stages), even_layers(teacher.num_layers, stages))
        even = Stages(ranks, *works, *divided).slowest_over_mean
    started = time.monotonic()
    found = balanced(*works, ranks, virtual)
    assert found is not None
    return {
        "even": even,
        "auto": found.slowest_over_mean,
        "floor": found.floor,
        "student_layers": found.student_layers,
        "teacher_layers": found.teacher_layers,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Count, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    results = {
        f"{student} PP{ranks}{f' VPP{virtual}' if virtual > 1 else ''}": measure(
            student, ranks, virtual, args.seq_length
        )
        for student in STUDENTS
        for ranks, virtual in PIPELINES
    }
    for name, each in results.items():
        even = "-" if each["even"] is None else f"{each['even']:.3f}"
        print(f"{name:<15} even {even:>5}  auto {each['auto']:.3f}  floor {each['floor']:.3f}", file=sys.stderr)
    if args.json:
        reachable = [each["auto"] for each in results.values() if each["floor"] == 1.0]
        print(json.dumps({"slowest_over_mean": max(reachable), "layouts": results}))


if __name__ == "__main__":
    main()
