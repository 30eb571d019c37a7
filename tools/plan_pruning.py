#!/usr/bin/env python3
"""Decide what survives: a complete plan, to read before anything is pruned, from a recipe and statistics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import add_load_arguments, load_options, run_tool, tool_parser
from megatron_slim.evaluation.candidates import add_search_arguments, measuring
from megatron_slim.pruning.commands import add_stage_argument, run_plan


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_load_arguments(parser, "plan for")
    parser.add_argument(
        "--stats",
        type=Path,
        required=True,
        metavar="FILE",
        help="statistics, or the pruned checkpoint that keeps them",
    )
    parser.add_argument("--recipe", type=Path, required=True, metavar="YAML", help="what the model is to become")
    add_stage_argument(parser)
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="new file, plan.json")
    add_search_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(
        lambda: run_plan(
            arguments.load,
            arguments.stats,
            arguments.recipe,
            arguments.save,
            stage=arguments.stage,
            measuring=measuring(arguments),
            **load_options(arguments),
        ),
        as_json=arguments.json,
    )
