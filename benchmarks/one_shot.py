#!/usr/bin/env python3
"""Measure what one-shot pruning costs: validation loss after every axis alone, in every way there is, and after all.

Calibrates once, then plans, applies and evaluates every variant in this process; no pruned checkpoint is written, its
tensors are made as the evaluation reads them. See docs/plans.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.calibration_run import add_calibration_arguments
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import add_load_arguments, load_options, positive, tool_parser

RECIPE = Path(__file__).resolve().parents[1] / "examples" / "slimqwen" / "recipes" / "demo.yaml"


def parse_args() -> argparse.Namespace:
    """Command line."""
    from benchmarks.one_shot_variants import ALL, TARGETS

    parser = tool_parser(__doc__.splitlines()[0])
    add_load_arguments(parser, "prune")
    parser.add_argument("--recipe", type=Path, default=RECIPE, metavar="YAML", help="target sizes, and the last row")
    parser.add_argument("--stats", type=Path, metavar="FILE", help="statistics made before, not --calibration-data")
    parser.add_argument(
        "--validation-data", type=Path, required=True, metavar="DATA", help="what the losses are measured on, likewise"
    )
    parser.add_argument("--validation-samples", type=positive, metavar="N", help="use N at random; all if not given")
    parser.add_argument("--only", choices=(*TARGETS, ALL), nargs="+", default=[*TARGETS, ALL], help="axes to measure")
    parser.add_argument("--save", type=Path, metavar="FILE", help="new file for the table as Markdown")
    add_calibration_arguments(parser, required=False)
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, measure, report."""
    from megatron_slim.errors import SlimError
    from megatron_slim.files import refuse_existing, write_atomic

    if args.save is not None:
        refuse_existing(args.save)
    if (args.stats is None) == (args.calibration_data is None):
        what = "both are given" if args.stats else "nothing to plan from"
        raise SlimError(what, fix="give one of --calibration-data and --stats")
    from benchmarks.one_shot_run import markdown, measure

    results = measure(args, load_options(args))
    table = markdown(results)
    if args.save is not None:
        write_atomic(args.save, table)
    print(table)
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
