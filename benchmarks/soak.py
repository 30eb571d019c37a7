#!/usr/bin/env python3
"""Train the demo model without a break, then again with kills, and see that both end bit for bit the same.

The run is that of examples/slimqwen/pretrain_distill.sh: teacher and student under PP2 x EP2, four processes, fp32.
Of the three kills one ends a single rank, one all processes in the middle of saving a checkpoint, one all processes at
any step; the same command then resumes. Weights, optimizer state, and every loss that either run logged are compared;
a difference ends the benchmark with an error. See docs/training.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import not_negative, positive, tool_parser


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.epilog = (
        "With --json: bit_equal, steps, kills (of each: what, step, seconds until the job had ended, exit_code, "
        "resumed_from), entries_compared, steps_of_logs_compared, losses_of_tensorboard_compared, seconds, "
        "seconds_per_step, model, machine."
    )
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="new directory for models and runs")
    parser.add_argument("--steps", type=positive, default=1000, metavar="N")
    parser.add_argument("--save-interval", type=positive, default=50, metavar="N")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the data and of the steps of the kills")
    parser.add_argument("--model", choices=("demo", "tiny"), default="demo", help="sizes of teacher and student")
    parser.add_argument("--seq-length", type=positive, default=64, metavar="N")
    parser.add_argument("--port", type=positive, default=29631, metavar="N", help="where the ranks meet")
    return parser.parse_args()


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments, run, compare."""
    from megatron_slim.errors import SlimError
    from megatron_slim.files import refuse_existing

    refuse_existing(args.dir)
    if args.steps < 4 * args.save_interval:
        raise SlimError(f"{args.steps} steps are too few for three kills", fix="give a smaller --save-interval")
    from benchmarks.soak_run import run

    results = run(args)
    if not args.json:
        for kill in results["kills"]:
            print(", ".join(f"{name} {value}" for name, value in kill.items()))
        print(f"bit-equal after {args.steps} steps: {results['entries_compared']} entries of the checkpoint")
    return results


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: soak(arguments), as_json=arguments.json)
