#!/usr/bin/env python3
"""Measure what Adam, Muon and Aurora are worth after a pruning: validation loss at equal tokens, at rates of their own.

A teacher is pruned once. Every optimizer trains the student with a few learning rates and one seed, and at the best of
them with all seeds. With the commands that a user gives. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import seconds_of
from benchmarks.processes import ROOT, free_port, python, run
from benchmarks.report import machine
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import ADAM, AURORA, MUON, OPTIMIZERS

# Of Adam as the demo has it and above; of the others, 0.2 sqrt(144) = 2.4 times as much, and around it.
RATES = {ADAM: ("1e-3", "2e-3", "4e-3"), MUON: ("5e-3", "1e-2", "2.5e-3"), AURORA: ("5e-3", "1e-2", "2.5e-3")}
BATCH = 8  # samples of a step
_VALIDATION = re.compile(
    rf"validation loss at iteration \d+.*?{LOSS_TERMS['lm'].name} value: ([\d.E+-]+)", re.IGNORECASE
)
DEAD = 1e-3  # of the median importance of a neuron


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="new directory for all runs")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="trained Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="for calibration and training")
    parser.add_argument("--validation-data", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples/slimqwen/recipes/demo.yaml", metavar="YAML")
    parser.add_argument("--steps", type=positive, default=150, metavar="N", help="of every run (150, as the demo)")
    parser.add_argument("--grid", type=positive, default=3, metavar="N", help="learning rates of each optimizer (3)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="how many (3)")
    parser.add_argument("--seq-length", type=positive, default=256, metavar="N", help="tokens of a sample (256)")
    parser.add_argument("--adamw-lr", default="1e-3", help="of what Muon and Aurora leave to AdamW (1e-3)")
    return parser.parse_args()


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Train everything, and print a table."""
    from megatron_slim.files import refuse_existing

    refuse_existing(args.dir)
    args.dir.mkdir(parents=True)
    started = time.monotonic()
    student = args.dir / "student"
    data = ("--calibration-data", args.data, "--num-samples", 64, "--seq-length", args.seq_length)
    run(
        python(
            "-m", "megatron_slim", "prune", "--load", args.teacher, "--recipe", args.recipe, "--save", student, *data
        )
    )
    found = {name: of_optimizer(args, student, name) for name in RATES}
    results = {
        "optimizers": found,
        "steps": args.steps,
        "tokens": args.steps * BATCH * args.seq_length,
        "pruned_dead_neurons": dead_neurons(args, student, args.dir / "pruned.stats"),
        "seconds": round(time.monotonic() - started),
        "machine": machine(args.dir),
    }
    print(markdown(results))
    return results


def of_optimizer(args: argparse.Namespace, student: Path, name: str) -> dict[str, Any]:
    """All runs of one optimizer."""
    grid = {rate: train(args, student, name, rate, 1) for rate in RATES[name][: args.grid]}
    best = min(grid, key=lambda rate: grid[rate]["loss"])
    seeds = [grid[best], *(train(args, student, name, best, seed) for seed in range(2, args.seeds + 1))]
    losses = [each["loss"] for each in seeds]
    last = args.dir / f"{name}_{best}_1"
    return {
        "grid": {rate: each["loss"] for rate, each in grid.items()},
        "rate": best,
        "losses": losses,
        "loss": statistics.mean(losses),
        "spread": statistics.stdev(losses) if len(losses) > 1 else None,
        "seconds_per_step": statistics.median(each["seconds"] for each in [*grid.values(), *seeds[1:]]),
        "state_bytes": state_bytes(student, name),
        "dead_neurons": dead_neurons(args, last, args.dir / f"{name}.stats"),
    }


def train(args: argparse.Namespace, student: Path, name: str, rate: str, seed: int) -> dict[str, float]:
    """One run: its validation loss, and seconds of a step.

    Raises:
        SlimError: it failed.
    """
    save = args.dir / f"{name}_{rate}_{seed}"
    variables: Mapping[str, object] = {
        "TEACHER": args.teacher,
        "STUDENT": student,
        "SAVE": save,
        "DATA": args.data,
        "VALID_DATA": args.validation_data,
        "NPROC_PER_NODE": 1,
        "MASTER_PORT": free_port(),
        "SEQ_LENGTH": args.seq_length,
        "MICRO_BATCH_SIZE": BATCH,
        "GLOBAL_BATCH_SIZE": BATCH,
        "TRAIN_ITERS": args.steps,
        "LR": rate,
        "MIN_LR": float(rate) / 10,
        "LR_WARMUP_ITERS": max(1, args.steps // 8),
        "SAVE_INTERVAL": 10**6,
        "EVAL_INTERVAL": args.steps,
        "EVAL_ITERS": 6,
        "LOG_INTERVAL": 1,
        "PRECISION": "fp32",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHON": python()[0],
    }
    flags = ["--optimizer", name, "--seed", seed, "--no-save-optim"]
    flags += ["--adamw-lr", args.adamw_lr] if OPTIMIZERS[name].has_matrices else []
    script = ROOT / "examples" / "slimqwen" / "pretrain_distill.sh"
    words = ["env", *(f"{key}={value}" for key, value in variables.items()), "bash", script, *flags]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    validation = _VALIDATION.findall(done.stdout)
    if done.returncode or not validation:
        raise SlimError(f"a run with {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return {"loss": float(validation[0]), "seconds": statistics.median(seconds_of(done.stdout)[2:])}


def state_bytes(student: Path, name: str) -> int:
    """Of the optimizer's states, main copies apart (there are none in fp32)."""
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.planning.layouts import Settings, TrainLayout
    from megatron_slim.planning.memory import rank_counts, static_memory
    from megatron_slim.planning.parameters import Count

    shape, layout = open_checkpoint(student).shape, TrainLayout(1)
    (count,) = rank_counts(shape, [shape.num_layers], layout)
    return int(static_memory(count, Count(), layout, Settings(precision="fp32", optimizer=name)).optimizer)


def dead_neurons(args: argparse.Namespace, checkpoint: Path, stats: Path) -> dict[str, int]:
    """Neurons of experts that hardly ever give anything, on validation data."""
    import numpy as np

    from megatron_slim.pruning.statistics import Statistics

    data = ("--calibration-data", args.validation_data, "--num-samples", 32, "--seq-length", args.seq_length)
    run(python("-m", "megatron_slim", "calibrate", "--load", checkpoint, "--save", stats, *data))
    values = np.concatenate(
        [np.ravel(value) for key, value in Statistics.load(stats).tensors.items() if key.endswith("mlp.experts.ffn")]
    )
    return {"dead": int((values < DEAD * np.median(values)).sum()), "of": int(values.size)}


def markdown(results: Mapping[str, Any]) -> str:
    """A row for each optimizer."""
    lines = ["| optimizer | loss by rate | best rate | loss, all seeds | s per step | MB of states | dead neurons |"]
    lines.append("|" + "---|" * 7)
    for name, found in results["optimizers"].items():
        cells: Sequence[str] = (
            f"`{name}`",
            ", ".join(f"{rate}: {loss:.3f}" for rate, loss in found["grid"].items()),
            found["rate"],
            f"{found['loss']:.3f}" + ("" if found["spread"] is None else f" ± {found['spread']:.3f}"),
            f"{found['seconds_per_step']:.2f}",
            f"{found['state_bytes'] / 1e6:.1f}",
            f"{found['dead_neurons']['dead']} of {found['dead_neurons']['of']}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
