#!/usr/bin/env python3
"""Prune a Qwen3-Next checkpoint in depth, width and experts: calibrate, plan, apply, verify."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import (
    add_load_arguments,
    add_write_arguments,
    load_options,
    run_tool,
    tool_parser,
    write_options,
)
from megatron_slim.evaluation.candidates import add_search_arguments, measuring
from megatron_slim.pruning.calibration_commands import add_calibration_arguments, calibration_options
from megatron_slim.pruning.commands import add_stage_argument, refuse_conflicts, run_prune


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_load_arguments(parser, "prune")
    parser.add_argument("--save", type=Path, metavar="DIR", help="new directory for the result")
    parser.add_argument("--recipe", type=Path, metavar="YAML", help="what the model is to become")
    add_stage_argument(parser)
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="made before, or the pruned checkpoint that keeps them: nothing is measured",
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan made before: nothing is measured or decided")
    parser.add_argument("--to", choices=("hf", "torch_dist"), default="hf", help="format of the result")
    parser.add_argument("--dry-run", action="store_true", help="measure, plan, print the table, write nothing")
    add_write_arguments(parser)
    add_calibration_arguments(parser, required=False)
    add_search_arguments(parser)
    return parser.parse_args()


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments and run."""
    refuse_conflicts(args)
    return run_prune(
        args.load,
        args.save,
        to=args.to,
        recipe_file=args.recipe,
        stage=args.stage,
        plan_file=args.plan,
        stats_file=args.stats,
        calibration=calibration_options(args) if args.calibration_data else None,
        dry_run=args.dry_run,
        measuring=measuring(args),
        reading=load_options(args),
        writing=write_options(args),
    )


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: prune(arguments), as_json=arguments.json)
