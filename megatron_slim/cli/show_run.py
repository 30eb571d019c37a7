"""Show a training run: losses, throughput, time of stages and balance of experts, as tables and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.terminal import wide_console
from megatron_slim.cli.tool import run_command
from megatron_slim.extras import require
from megatron_slim.files import refuse_existing, write_atomic
from megatron_slim.training.run_view import read_run, summary, tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", type=Path, metavar="SAVE", help="directory of the run, or its --tensorboard-dir")
    parser.add_argument("--save", type=Path, metavar="FILE.png", help="a new file for the picture")


def show(args: argparse.Namespace) -> JsonObject:
    """Print a run; with ``--save``, draw it into a new PNG file.

    Returns:
        `run_view.summary`, with the picture's path.

    Raises:
        SlimError: there is no run, or ``--save`` exists.
    """
    require("plots", "tensorboard", "show-run")
    if args.save is not None:
        require("plots", "matplotlib", "a picture")
        refuse_existing(args.save)
    run = read_run(args.run)
    found = summary(run)
    wide_console().print(*tables(found), sep="\n")
    if args.save is None:
        return found
    from megatron_slim.training.run_plots import picture

    write_atomic(args.save, picture(run))
    return {**found, "picture": str(args.save)}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, show, argv, prog)
