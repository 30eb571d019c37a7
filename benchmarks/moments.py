#!/usr/bin/env python3
"""Measure what an optimizer that is carried through a pruning is worth: validation loss in the first steps after it.

Phase 1 prunes the teacher in depth and trains; phase 2 prunes the result in width and experts, and trains with a new
optimizer, with one and a warm-up of the phase, and with the moments that were carried, by either rule for merged
experts. All of it once for every seed of the data's order, with the commands that a user gives. See docs/recipes.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="new directory for all runs")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="trained Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="for calibration and training")
    parser.add_argument("--validation-data", type=Path, required=True, metavar="PREFIX")
    parser.add_argument(
        "--recipe", type=Path, metavar="YAML", help="of two phases; the default is for the demo's teacher"
    )
    parser.add_argument("--steps-before", type=positive, default=100, metavar="N", help="of phase 1 (100)")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="of phase 2, a multiple of 10 (100)")
    parser.add_argument("--after", type=positive, nargs="+", default=[10, 30, 100], metavar="N", help="steps to report")
    parser.add_argument("--warmup", type=positive, default=20, metavar="N", help="steps of the phase's warm-up (20)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--seq-length", type=positive, default=256, metavar="N", help="tokens of a sample (256)")
    parser.add_argument("--lr", default="1e-3", help="highest learning rate (1e-3)")
    parser.add_argument("--adam-beta2", default="0.999", help="of Adam (0.999)")
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="data-parallel processes (2)")
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments, run, report."""
    from megatron_slim.errors import SlimError
    from megatron_slim.files import refuse_existing

    refuse_existing(args.dir)
    if wrong := [step for step in args.after if step % 10 or step > args.steps]:
        raise SlimError(f"--after {wrong[0]} is not a multiple of 10 up to --steps", fix="give another")
    from benchmarks.moments_run import markdown, measure

    results = measure(args)
    print(markdown(results))
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
