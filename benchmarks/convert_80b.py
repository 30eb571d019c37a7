#!/usr/bin/env python3
"""Run the real tools over the complete published layout of Qwen3-Next-80B-A3B on a machine much smaller than that.

All 75,944 tensors in 41 shards, with their names, types and shapes, as files of holes: 163 GB that read as zeros and
take a few megabytes. What the tools write is zeros too and is dug away behind them. Reports time, memory, bytes read
and whether every tensor arrived. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser

PUBLISHED_COUNTS = {"shards": 41, "tensors": 75_944, "mtp_tensors": 1_553, "parameters": 81_324_862_720}
DEFAULT_DIRECTIONS = ("hf_to_torch_dist", "hf_to_pruned_hf", "hf_to_pruned_torch_dist")


def parse_args() -> argparse.Namespace:
    """Command line."""
    from benchmarks.directions import DIRECTIONS

    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark-80b"), help="where to work")
    parser.add_argument("--layers", type=positive, help="for a quick look: this many of the 48 layers")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=N", help="for a quick look: other sizes in config.json"
    )
    parser.add_argument("--only", choices=DIRECTIONS, nargs="+", default=DEFAULT_DIRECTIONS, help="what to run")
    parser.add_argument("--processes", type=positive, help="given to the tools; if not, they choose")
    parser.add_argument("--no-verify", action="store_true", help="given to the tools")
    parser.add_argument("--max-disk-gb", type=positive, default=40, help="stop when a result takes more than this")
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Make the layout, plan, run every direction; leaves nothing behind."""
    from benchmarks.layout_run import LayoutRun
    from benchmarks.report import print_layout_table

    if args.dir.exists() and any(args.dir.iterdir()):
        from megatron_slim.errors import SlimError

        raise SlimError("is not empty", where=str(args.dir), fix="choose another --dir or remove it")
    args.dir.mkdir(parents=True, exist_ok=True)
    try:
        results = LayoutRun(args, expected=None if args.layers or args.set else PUBLISHED_COUNTS).results()
    finally:
        shutil.rmtree(args.dir)
    if not args.json:
        print_layout_table(results)
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
