"""Prune a checkpoint in depth, width and experts: calibrate, plan, prune, verify."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.calibration_run import add_calibration_arguments, calibration_options
from megatron_slim.cli.carried_optimizer import add_optimizer_arguments
from megatron_slim.cli.given_statistics import add_statistics_arguments, given_statistics
from megatron_slim.cli.pruning_run import add_phase_argument, refuse_conflicts, run_prune
from megatron_slim.cli.search_arguments import add_search_arguments, measuring
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import RECIPE_HELP, add_load_arguments, add_write_arguments, load_options, write_options
from megatron_slim.recipe_run import moment_rule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "prune")
    parser.add_argument("--save", type=Path, metavar="DIR", help="new directory for the result")
    parser.add_argument("--recipe", type=Path, metavar="RECIPE", help=RECIPE_HELP)
    add_phase_argument(parser)
    add_statistics_arguments(parser)
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="an existing plan, or a pruned checkpoint that has one: nothing is measured or decided",
    )
    parser.add_argument("--to", choices=("hf", "torch_dist"), default="hf", help="format of the result")
    add_optimizer_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="calibrate, plan and print the table; write nothing")
    add_write_arguments(parser)
    add_calibration_arguments(parser, required=False)
    add_search_arguments(parser)


def prune(args: argparse.Namespace) -> JsonObject:
    """Check the arguments and run."""
    refuse_conflicts(args)
    return run_prune(
        args.load,
        args.save,
        to=args.to,
        recipe_file=args.recipe,
        phase=args.phase,
        plan_file=args.plan,
        given=given_statistics(args),
        calibration=calibration_options(args) if args.calibration_data else None,
        dry_run=args.dry_run,
        measuring=measuring(args),
        moments_of_merged=moment_rule(args.carry_optimizer, args.moments_of_merged, args.to),
        reading=load_options(args),
        writing=write_options(args),
    )


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, prune, argv, prog)
