#!/usr/bin/env python3
"""Plan a training run: which parallel layouts fit on how many GPUs, how fast each should be, and the flags to paste."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import run_tool, tool_parser
from megatron_slim.planning.commands import add_arguments, run_plan


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: run_plan(arguments), as_json=arguments.json)
