#!/usr/bin/env python3
"""Show a plan: sizes, layers that go, dimensions and experts that stay, as tables, and as a page with pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import run_tool, tool_parser
from megatron_slim.pruning.plan_page import run_show


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan.json, as it lies beside a pruned checkpoint")
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="what it was made of, or their directory: adds importances to tables",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="new directory for index.html, importances.png, experts.png and ranking.jsonl; needs --stats",
    )
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: run_show(arguments.plan, stats_file=arguments.stats, save=arguments.save), as_json=arguments.json)
