"""Make a complete pruning plan from a recipe and statistics, to read before anything is pruned."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.given_statistics import FLAG, add_statistics_arguments, given_statistics
from megatron_slim.cli.pruning_run import add_phase_argument, run_plan
from megatron_slim.cli.search_arguments import add_search_arguments, measuring
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import RECIPE_HELP, add_load_arguments, load_options
from megatron_slim.errors import SlimError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "plan for")
    add_statistics_arguments(parser)
    parser.add_argument("--recipe", type=Path, required=True, metavar="RECIPE", help=RECIPE_HELP)
    add_phase_argument(parser)
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="new file, such as plan.json")
    add_search_arguments(parser)


def plan(args: argparse.Namespace) -> JsonObject:
    """Check the arguments and make the plan."""
    if (args.stats is None) == (args.carry_statistics is None):
        what = f"--stats and {FLAG} exclude one another" if args.stats else "nothing to plan from"
        raise SlimError(what, fix=f"give one of --stats and {FLAG}")
    given = given_statistics(args)
    assert given is not None
    return run_plan(
        args.load,
        given,
        args.recipe,
        args.save,
        phase=args.phase,
        measuring=measuring(args),
        **load_options(args),
    )


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, plan, argv, prog)
