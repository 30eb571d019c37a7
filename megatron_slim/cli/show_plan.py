"""Show a plan: sizes, dropped layers, kept dimensions and experts, as tables, and as a page with pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.terminal import wide_console
from megatron_slim.cli.tool import run_command
from megatron_slim.errors import SlimError
from megatron_slim.extras import require
from megatron_slim.files import refuse_existing
from megatron_slim.pruning import plan_tables
from megatron_slim.pruning.plan_page import PAGE, write_page
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.plan_view import check_statistics, summary
from megatron_slim.pruning.statistics import Statistics

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, or a pruned checkpoint that has one")
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="the statistics that the plan was made from, or a pruned checkpoint that has them: adds importances to "
        "the tables",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="new directory for index.html, importances.png, experts.png and ranking.jsonl; needs --stats",
    )


def show(args: argparse.Namespace) -> JsonObject:
    """Print a plan; with ``--save``, write it as a page, pictures and a ranking into a new directory.

    Returns:
        `plan_view.summary`, with the paths.

    Raises:
        SlimError: there is no plan, the statistics are others, or ``--save`` exists.
    """
    if args.save is not None:
        refuse_existing(args.save)
        require("plots", "matplotlib", "the page of a plan")
        if args.stats is None:
            raise SlimError("pictures and ranking are made of statistics", where="--save", fix="give --stats")
    plan = load_plan(args.plan)
    stats = None
    if args.stats is not None:
        stats = Statistics.load(args.stats)
        check_statistics(plan, stats, where=str(args.stats))
    shown = plan_tables.sections(plan, stats)
    plan_tables.show(shown, wide_console())
    if args.save is not None:
        assert stats is not None
        write_page(plan, stats, shown, args.save)
        logger.info(f"{args.save}: open {PAGE} in a browser")
    return {"plan": str(args.plan), "save": None if args.save is None else str(args.save), **summary(plan, stats)}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, show, argv, prog)
