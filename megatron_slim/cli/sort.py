"""Sort an elastic checkpoint: the first of every axis become those of its smaller budgets, the function stays."""

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
    positive,
    write_options,
)
from megatron_slim.errors import SlimError
from megatron_slim.files import refuse_existing

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "sort")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="new directory for the result")
    parser.add_argument("--to", choices=("hf", "torch_dist"), default="hf", help="format of the result")
    parser.add_argument("--undo", action="store_true", help="give a sorted checkpoint the order that it had before")
    parser.add_argument(
        "--expert-parallel",
        type=positive,
        metavar="R",
        help="spread the experts of every budget evenly over R ranks; they are then not the first ones",
    )
    add_write_arguments(parser)


def sort(args: argparse.Namespace) -> JsonObject:
    """Check the arguments and sort, or undo it."""
    if args.undo and args.expert_parallel is not None:
        raise SlimError("--undo and --expert-parallel exclude one another", fix="leave one out")
    refuse_existing(args.save)
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.pruning.elastic_slices import elastic_at, write_sorted, write_unsorted

    elastic = elastic_at(args.load)
    source = open_checkpoint(args.load, **load_options(args))
    log_left_out(source)
    options = {"to": args.to, **write_options(args)}
    if args.undo:
        written = write_unsorted(source, elastic, args.save, **options)
    else:
        written = write_sorted(source, elastic, args.save, expert_parallel=args.expert_parallel or 1, **options)
    how = "in its former order" if args.undo else "sorted"
    logger.info(f"{args.save}: {written['tensors']} tensors {how}, as {args.to}, {VERIFICATION[written['verified']]}")
    return {"load": str(args.load), "save": str(args.save), "sorted": not args.undo, **written}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, sort, argv, prog)
