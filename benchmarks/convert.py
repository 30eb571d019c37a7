#!/usr/bin/env python3
"""Measure conversion and pruning against the disk alone, and against loading everything and saving it.

Makes a dense random Qwen3-Next, then times, interleaved and in the same state of the page cache: plain reads and
writes of the same bytes, every direction of conversion and pruning with and without verification, and a conversion
that holds the whole model. Memory is watched in a first round that is not timed. See docs/benchmarks.md.
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


def parse_args() -> argparse.Namespace:
    """Command line."""
    from benchmarks.directions import DIRECTIONS

    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/benchmark"), help="where to work; the disk that is measured"
    )
    parser.add_argument("--size-gb", type=float, default=6.0, help="size of the model; four times that is needed")
    parser.add_argument("--layers", type=positive, default=24, help="transformer layers, a multiple of 4")
    parser.add_argument("--hidden-size", type=positive, default=2048, help="all widths keep their proportion to it")
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="page cache of the source")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--processes", type=positive, help="given to the tools; if not, they choose")
    parser.add_argument("--only", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS), help="directions to measure")
    parser.add_argument("--no-load-all", action="store_true", help="leave out what must hold the model in memory")
    parser.add_argument("--keep", action="store_true", help="keep the synthetic model for the next run")
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, measure, report; leaves nothing behind but a model that is to be kept."""
    from benchmarks import directions, models
    from benchmarks.report import print_table, summarise
    from megatron_slim.errors import SlimError

    config = models.scaled_config(args.layers, args.hidden_size, args.size_gb * 1e9)
    nbytes = models.model_bytes(models.shape_of(config))
    args.dir.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.dir).free) < 4 * nbytes:
        raise SlimError(
            f"{free / 1e9:.1f} GB free, {4 * nbytes / 1e9:.1f} needed", where=str(args.dir), fix="--size-gb"
        )
    source = args.dir / f"model-{args.layers}-{args.hidden_size}-{nbytes}"
    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        if not (source / "config.json").exists():  # written last
            shutil.rmtree(source, ignore_errors=True)
            models.write_model(source, config, sparse=False)
        work.mkdir()
        measured = directions.measure(source, work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not args.keep:
            shutil.rmtree(source, ignore_errors=True)
    results = summarise(measured, models.shape_of(config), args)
    if not args.json:
        print_table(results)
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
