#!/usr/bin/env python3
"""Show a training run: losses, throughput, time of stages and balance of experts, as tables and as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import run_tool, tool_parser
from megatron_slim.training.run_view import run_show


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="SAVE", help="directory of the run, or its --tensorboard-dir")
    parser.add_argument("--save", type=Path, metavar="FILE.png", help="a new file for the picture")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: run_show(arguments.run, save=arguments.save), as_json=arguments.json)
