#!/usr/bin/env python3
"""Measure what commands cost before and around their work: imports, help, a tiny conversion and evaluation, a plan.

Every command runs in a process of its own, all in turns, after a first round that is not counted and leaves byte code
and page cache as an earlier use would. Medians are reported, and ratios of medians. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.main import COMMANDS
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.reporting import progress

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
RECIPE = ROOT / "examples" / "slimqwen" / "recipes" / "qwen3_next_80a3b_to_23a2b.yaml"
GROUPS = ("import", "help", "convert", "evaluate", "plan")
# What an evaluation on a CPU needs, in the order in which it imports it.
EVALUATION = (
    "import torch; import megatron_slim.evaluation.perplexity; import megatron_slim.mcore; "
    "import megatron_slim.evaluation.losses"
)
# What is measured -> what is done before each run, and the command.
Commands = Mapping[str, tuple[Callable[[], None], list[str]]]


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.epilog = (
        "With --json: import_seconds (of megatron_slim, the interpreter included), help_seconds (the slowest --help) "
        "and slowest_help, convert_over_torch_import (the slower direction over 'import torch'), "
        "evaluate_over_imports, plan_256_seconds; wall_seconds and cpu_seconds have the medians of every command, "
        "cpu_ratios the two ratios in CPU time, which other programs on the machine disturb less."
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="counted rounds")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=list(GROUPS), help="what to measure")
    return parser.parse_args()


def nothing() -> None:
    """There is nothing to prepare."""


def commands(groups: list[str], work: Path) -> Commands:
    """Every command of these groups by a name, and what makes it run once more."""
    from benchmarks.processes import python

    found: dict[str, tuple[Callable[[], None], list[str]]] = {}
    if "import" in groups:
        found["import megatron_slim"] = nothing, python("-c", "import megatron_slim")
    if "help" in groups:
        for name in ("", *COMMANDS):
            found[f"{name} --help".strip()] = nothing, python("-m", "megatron_slim", *name.split(), "--help")
    if "convert" in groups:
        found["import torch"] = nothing, python("-c", "import torch")
        for direction, source in (("hf_to_torch_dist", "hf"), ("torch_dist_to_hf", "torch_dist")):
            save = work / direction
            command = python(TOOLS / "convert_checkpoint.py", "--load", work / source, "--save", save)
            found[direction] = partial(remove, save), command
    if "evaluate" in groups:
        found["imports of evaluate"] = nothing, python("-W", "ignore", "-c", EVALUATION)
        data = ("--load", work / "hf", "--data", work / "samples.npy")
        found["evaluate"] = nothing, python(TOOLS / "evaluate.py", *data)
    if "plan" in groups:
        found["plan for 256 GPUs"] = nothing, python(TOOLS / "plan_parallelism.py", "--recipe", RECIPE, "--gpus", 256)
    return found


def remove(directory: Path) -> None:
    """Remove the result of the last round, which a conversion would not overwrite."""
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def write_inputs(work: Path) -> None:
    """A tiny checkpoint in both formats, and some samples for it."""
    import numpy as np

    from megatron_slim.checkpoint.convert import hf_to_torch_dist
    from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

    shape = tiny_shape()
    hf_to_torch_dist(write_tiny_checkpoint(work / "hf", shape), work / "torch_dist")
    np.save(work / "samples.npy", np.random.default_rng(0).integers(0, shape.vocab_size, (2, 16)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all commands in turns, and report."""
    from benchmarks.processes import run
    from benchmarks.report import machine

    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # whoever uses the tools has byte code
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if {"convert", "evaluate"} & set(args.only):
            write_inputs(work)
        wanted = commands(args.only, work)
        wall: dict[str, list[float]] = {name: [] for name in wanted}
        cpu: dict[str, list[float]] = {name: [] for name in wanted}
        for number in progress(range(1 + args.repeats), "rounds"):
            for name, (prepare, command) in wanted.items():
                prepare()
                found = run(command)
                if number:
                    wall[name].append(found.seconds)
                    cpu[name].append(found.cpu_seconds)
    medians = [{name: statistics.median(each) for name, each in times.items()} for times in (wall, cpu)]
    results = {**summary(*medians), "wall_seconds": medians[0], "cpu_seconds": medians[1], "machine": machine(ROOT)}
    if not args.json:
        show(results)
    return results


def summary(wall: Mapping[str, float], cpu: Mapping[str, float]) -> dict[str, Any]:
    """The numbers that have a goal, of the groups that were measured."""
    found: dict[str, Any] = {}
    if (name := "import megatron_slim") in wall:
        found["import_seconds"] = wall[name]
    if helps := {name: seconds for name, seconds in wall.items() if name.endswith("--help")}:
        found["slowest_help"] = max(helps, key=helps.__getitem__)
        found["help_seconds"] = helps[found["slowest_help"]]
    found |= ratios(wall)
    if (name := "plan for 256 GPUs") in wall:
        found["plan_256_seconds"] = wall[name]
    return found | {"cpu_ratios": ratios(cpu)}


def ratios(times: Mapping[str, float]) -> dict[str, float]:
    """Conversion over ``import torch``, evaluation over its imports."""
    found = {}
    if "import torch" in times:
        slower = max(times["hf_to_torch_dist"], times["torch_dist_to_hf"])
        found["convert_over_torch_import"] = slower / times["import torch"]
    if "evaluate" in times:
        found["evaluate_over_imports"] = times["evaluate"] / times["imports of evaluate"]
    return found


def show(results: Mapping[str, Any]) -> None:
    """Print what was measured."""
    for name, value in results["wall_seconds"].items():
        print(f"{name:28} {value:6.2f} s, {results['cpu_seconds'][name]:6.2f} s of CPU")
    for name, value in results.items():
        if isinstance(value, float):
            in_cpu_time = results["cpu_ratios"].get(name)
            print(f"{name}: {value:.3g}" + (f" ({in_cpu_time:.3g} in CPU time)" if in_cpu_time is not None else ""))


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
