#!/usr/bin/env python3
"""Seconds that the planner takes: searching layouts, and building the modules of all distinct ranks of the best one.

Everything is counted from the published model and the recipe of its 23A2B student; see docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

RECIPE = Path(__file__).resolve().parents[1] / "examples/slimqwen/recipes/qwen3_next_80a3b_to_23a2b.yaml"


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=positive, nargs="+", default=[256, 2048], metavar="N", help="of each plan")
    parser.add_argument("--gpu-type", choices=("h100", "h200", "b200"), default="h100", help="of which kind")
    parser.add_argument(
        "--pp", type=positive, nargs="+", default=[8], metavar="N", help="what is built: the best with it"
    )
    parser.add_argument("--ep", type=positive, nargs="+", default=[], metavar="N", help="likewise; default: all")
    parser.add_argument("--processes", type=positive, default=2, help="to build in")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Plan for each number of GPUs, and build."""
    from megatron_slim.planning.build import Request, build_ranks, prepare
    from megatron_slim.planning.hardware import GPUS
    from megatron_slim.planning.layouts import Settings, Wanted
    from megatron_slim.planning.search import Job, Search
    from megatron_slim.planning.sources import Asked, find_models

    models = find_models(Asked(recipe=RECIPE))
    prepare()  # imports, which every training process has to wait for too
    plans: dict[str, dict[str, Any]] = {}
    for gpus in args.gpus:
        settings = Settings(global_batch=max(1024, gpus))
        job = Job(models.student, models.teacher, settings, gpus, GPUS[args.gpu_type])
        started = time.monotonic()
        found = Search(job).run(Wanted(pp=args.pp, ep=args.ep))
        searched = time.monotonic() - started
        if not found.ranked:
            raise SlimError(f"nothing fits on {gpus} GPUs", fix="--pp, --gpu-type")
        best = found.ranked[0]
        started = time.monotonic()
        request = Request(job.student, job.teacher, best.layout, best.stages, settings)
        ranks = build_ranks(request, processes=args.processes)
        plans[str(gpus)] = {
            "layout": best.layout.name,
            "search_seconds": searched,
            "layouts": len(found.ranked) + len(found.rejected),
            "build_seconds": time.monotonic() - started,
            "distinct_ranks": len(ranks),
            "parameters": sum(rank.student.total + rank.teacher.total for rank in ranks),
        }
        if not args.json:
            print(gpus, *(f"{key} {value}" for key, value in plans[str(gpus)].items()), sep="\n  ")
    return {"build_seconds": max(plan["build_seconds"] for plan in plans.values()), "plans": plans}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
