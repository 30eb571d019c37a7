"""Write one budget of an elastic checkpoint as a checkpoint of its own, every weight bit for bit."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import (
    VERIFICATION,
    add_load_arguments,
    add_write_arguments,
    load_options,
    write_options,
)
from megatron_slim.errors import SlimError
from megatron_slim.files import refuse_existing

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "slice")
    parser.add_argument("--budget", metavar="NAME", help="which of its budgets")
    parser.add_argument("--save", type=Path, metavar="DIR", help="new directory for the result")
    parser.add_argument("--to", choices=("hf", "torch_dist"), default="hf", help="format of the result")
    parser.add_argument("--list", action="store_true", help="print a table of the budgets, and write nothing")
    add_write_arguments(parser)


def slice_budget(args: argparse.Namespace) -> JsonObject:
    """Check the arguments, then list or slice."""
    if args.list and (args.budget is not None or args.save is not None):
        raise SlimError("--list shows all budgets and writes nothing", fix="leave --budget and --save out")
    if not args.list:
        if args.budget is None:
            raise SlimError("no budget", fix="give --budget NAME; --list shows the names")
        if args.save is None:
            raise SlimError("no output directory", fix="give --save, or --list")
        refuse_existing(args.save)
    from rich.console import Console

    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.pruning.elastic_plans import budgets_table, summaries
    from megatron_slim.pruning.elastic_slices import elastic_at, write_slice

    elastic = elastic_at(args.load)
    if args.list:
        Console().print(budgets_table(elastic.budgets))
        return {"load": str(args.load), "budgets": summaries(elastic.budgets)}
    budget = elastic.named(args.budget)
    source = open_checkpoint(args.load, **load_options(args))
    log_left_out(source)
    written = write_slice(source, elastic, args.budget, args.save, to=args.to, **write_options(args))
    Console().print(budgets_table([elastic.budgets[0], budget] if budget != elastic.budgets[0] else [budget]))
    ending = VERIFICATION[written["verified"]]
    logger.info(f"{args.save}: budget {args.budget}, {written['tensors']} tensors as {args.to}, {ending}")
    return {"load": str(args.load), "save": str(args.save), "budget": args.budget, **written}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, slice_budget, argv, prog)
