#!/usr/bin/env python3
"""Measure what lies between two phases of a progressive schedule whose optimizer is carried, against the disk alone.

Round by round: Megatron trains a student for one step and saves it with its optimizer, `megatron-slim prune
--carry-optimizer` prunes it by a plan, and the next phase loads the result. Each is compared with plain reads and
writes of the same bytes. See docs/benchmarks.md.
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

BYTES_PER_PARAMETER = 14  # weights in bf16, main weights and two moments in fp32


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/switch"), help="where to work; the disk measured")
    parser.add_argument(
        "--size-gb", type=float, default=3.0, help="of the trained checkpoint; three times that is needed"
    )
    parser.add_argument("--layers", type=positive, default=8, help="transformer layers, a multiple of 4")
    parser.add_argument("--hidden-size", type=positive, default=1024, help="all widths keep their proportion to it")
    parser.add_argument("--seq-length", type=positive, default=64, help="tokens of the one step")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds; medians are reported")
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, measure, report; leaves nothing behind."""
    from benchmarks import models, switch_run
    from megatron_slim.errors import SlimError

    config = models.scaled_config(args.layers, args.hidden_size, args.size_gb * 1e9 * 2 / BYTES_PER_PARAMETER)
    nbytes = models.model_bytes(models.shape_of(config)) // 2 * BYTES_PER_PARAMETER
    args.dir.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(args.dir).free) < 3 * nbytes:
        raise SlimError(
            f"{free / 1e9:.1f} GB free, {3 * nbytes / 1e9:.1f} needed", where=str(args.dir), fix="--size-gb"
        )
    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        work.mkdir()
        models.write_model(work / "hf", config, sparse=False)
        results = switch_run.measure(work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not args.json:
        print(switch_run.markdown(results))
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
