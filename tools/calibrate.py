#!/usr/bin/env python3
"""Measure what pruning decides by: importances and similarities of hidden dimensions, layers and experts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import add_load_arguments, load_options, run_tool, tool_parser
from megatron_slim.pruning.commands import add_calibration_arguments, calibration_options, run_calibrate


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_load_arguments(parser, "measure")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="new file, stats.safetensors")
    add_calibration_arguments(parser, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(
        lambda: run_calibrate(
            arguments.load, arguments.save, calibration_options(arguments), **load_options(arguments)
        ),
        as_json=arguments.json,
    )
