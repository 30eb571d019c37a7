#!/usr/bin/env python3
"""Measure what pruning decides by: importances of hidden dimensions, layers, experts, neurons and heads.

One process streams through the model; under tools/torchrun.py the model is laid out over all processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import add_load_arguments, load_options, run_tool, tool_parser
from megatron_slim.pruning.calibration_commands import (
    add_calibration_arguments,
    add_layout_arguments,
    calibration_options,
    layout_options,
    run_calibrate,
    run_rank,
)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_load_arguments(parser, "measure")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="new file, such as calibration.stats")
    add_calibration_arguments(parser, required=True)
    add_layout_arguments(parser)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process, or as one of many."""
    layout, options = layout_options(arguments), calibration_options(arguments)
    if layout is None:
        return run_calibrate(arguments.load, arguments.save, options, **load_options(arguments))
    return run_rank(arguments.load, arguments.save, options, layout, **load_options(arguments))


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: main(arguments), as_json=arguments.json and os.environ.get("RANK", "0") == "0")
