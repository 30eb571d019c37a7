"""Measure what pruning is based on: importances of hidden dimensions, layers, experts, neurons and heads.

One process streams through the model; under megatron-slim torchrun the model is sharded over all processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.calibration_run import (
    add_calibration_arguments,
    add_layout_arguments,
    calibration_options,
    layout_options,
    run_calibrate,
    run_rank,
)
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import add_load_arguments, load_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "measure")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="new file, such as calibration.stats")
    add_calibration_arguments(parser, required=True)
    add_layout_arguments(parser)


def calibrate(arguments: argparse.Namespace) -> JsonObject:
    """Measure in this process, or as one of many."""
    layout, options = layout_options(arguments), calibration_options(arguments)
    if layout is None:
        return run_calibrate(arguments.load, arguments.save, options, **load_options(arguments))
    return run_rank(arguments.load, arguments.save, options, layout, **load_options(arguments))


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, calibrate, argv, prog)
