"""The rounds of `switch`: save, prune, load, each with the raw reads and writes of its bytes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.directions import IMPORTS, PRUNE, SAMPLE_SECONDS, SETTLE_SECONDS
from benchmarks.models import Needed, needed_by_plan, read_config, write_recipe, write_statistics
from benchmarks.processes import ROOT, Run, free_port, python, run, start_up
from benchmarks.report import machine
from benchmarks.storage import bytes_of, drop_cache, files_of, raw_read, raw_write
from megatron_slim.cli.terminal import say

SAVE, LOAD = "save", "load"
PARTS = (SAVE, PRUNE, LOAD)
RESHARDABLE = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


class _Bench:
    """Where everything is, and all samples."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.trained, self.plan, self.pruned = work / "run_1", work / "plan.json", work / "student_2"
        self.raw: dict[tuple[str, int, int], list[float]] = defaultdict(list)  # by kind, bytes, threads
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def settle(self, directory: Path) -> None:
        """All writes done, nothing of a directory in memory."""
        os.sync()
        drop_cache(directory)
        time.sleep(SETTLE_SECONDS)

    def train(self, student: Path, *more: object) -> dict[str, float]:
        """One step, and the seconds of what was timed in it."""
        file, one = self.work / "seconds.json", (1,) * 3
        command = [ROOT / "tools" / "torchrun.py", "--nproc-per-node", 1, "--master-port", free_port()]
        command += [ROOT / "benchmarks" / "switch_train.py", file, "--mock-data", "--bf16", *RESHARDABLE]
        sizes = zip(("--micro-batch-size", "--global-batch-size", "--train-iters"), one, strict=True)
        command += [word for size in sizes for word in size]
        command += ["--seq-length", self.args.seq_length, "--lr", "1e-4", "--eval-iters", 0, "--eval-interval", 1000]
        run(python(*command, "--pretrained-checkpoint", student, *more))
        return dict(json.loads(file.read_text()))

    def save(self) -> float:
        """Train the student and have Megatron save it; seconds of the saving."""
        shutil.rmtree(self.trained, ignore_errors=True)
        os.sync()
        return self.train(self.work / "hf", "--save", self.trained, "--save-interval", 1)["save_checkpoint"]

    def make_plan(self) -> None:
        """A plan that prunes depth, width and experts, by statistics drawn at random."""
        stats, recipe = self.work / "stats.safetensors", self.work / "recipe.yaml"
        write_statistics(self.trained, stats)
        write_recipe(read_config(self.work / "hf"), recipe)
        self.plan.unlink(missing_ok=True)
        command = (ROOT / "tools" / "plan_pruning.py", "--load", self.trained, "--save", self.plan)
        run(python(*command, "--stats", stats, "--recipe", recipe))

    def prune(self, *, sample_seconds: float | None = None) -> Run:
        """Prune what was trained."""
        shutil.rmtree(self.pruned, ignore_errors=True)
        self.settle(self.trained)
        command = (ROOT / "tools" / "prune_checkpoint.py", "--load", self.trained, "--save", self.pruned)
        options = ("--plan", self.plan, "--to", "torch_dist", "--carry-optimizer")
        return run(python(*command, *options), sample_seconds=sample_seconds)

    def load(self) -> float:
        """Begin the next phase with the result; seconds of Megatron's loading."""
        self.settle(self.pruned)
        found = self.train(self.pruned, "--carry-optimizer")
        return found["load_checkpoint"] + found["load"]

    def measure_raw(self, needed: Needed, sizes: Mapping[str, int]) -> None:
        """Plain reads and writes of the same bytes."""
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            for nbytes in (sizes[SAVE], sizes[PRUNE]):
                self.settle(self.trained)
                self.raw["write", nbytes, threads].append(raw_write(self.work / "raw", nbytes, threads=threads))
            for directory, nbytes in ((self.trained, needed.rows), (self.pruned, sizes[LOAD])):
                self.settle(directory)
                self.raw["read", nbytes, threads].append(raw_read(files_of(directory), nbytes, threads=threads))

    def fastest(self, kind: str, nbytes: int) -> float:
        """Median of the number of threads that has the best."""
        return min(median(found) for (of, size, _), found in self.raw.items() if (of, size) == (kind, nbytes))


def needed_for_state(plan: Path) -> Needed:
    """What a pruning of weights in bf16 and state in fp32 must move; moments of merged experts are their base's."""
    parts = [needed_by_plan(plan), needed_by_plan(plan, 4), *[needed_by_plan(plan, 4, merged=False)] * 2]
    return Needed(*(sum(getattr(part, name) for part in parts) for name in ("kept", "rows", "written")))


def measure(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Round 0 watches the memory of the pruning and writes every block of the disk; the others are timed."""
    bench, starts = _Bench(work, args), []
    say("memory of prune")
    bench.save()
    bench.make_plan()
    needed = needed_for_state(bench.plan)
    watched = bench.prune(sample_seconds=SAMPLE_SECONDS)
    for number in range(1, args.repeats + 1):
        say(f"round {number} of {args.repeats}")
        bench.seconds[SAVE].append(bench.save())
        bench.make_plan()
        starts.append(start_up(IMPORTS[PRUNE]))
        bench.seconds[PRUNE].append(bench.prune().seconds - starts[-1].seconds)
        bench.seconds[LOAD].append(bench.load())
        sizes = {SAVE: bytes_of(bench.trained), PRUNE: bytes_of(bench.pruned), LOAD: bytes_of(bench.pruned)}
        bench.measure_raw(needed, sizes)
    read, write = bench.fastest("read", needed.rows), bench.fastest("write", sizes[PRUNE])
    raw = {
        SAVE: bench.fastest("write", sizes[SAVE]),
        PRUNE: max(read, write),
        LOAD: bench.fastest("read", sizes[LOAD]),
    }
    seconds = {part: median(bench.seconds[part]) for part in PARTS}
    interpreter = min(each.anonymous for each in starts)
    return {
        "over_raw_io": sum(seconds.values()) / sum(raw.values()),
        "parts": {
            part: {
                "seconds": seconds[part],
                "samples": bench.seconds[part],
                "raw_io_seconds": raw[part],
                "over_raw_io": seconds[part] / raw[part],
            }
            for part in PARTS
        },
        "prune_raw": {"read": read, "write": write, "over_read_then_write": seconds[PRUNE] / (read + write)},
        "bytes": {"trained": sizes[SAVE], "rows_read": needed.rows, "kept": needed.kept, "pruned": sizes[PRUNE]},
        "peak_anonymous_bytes": watched.peak_anonymous,
        "interpreter_anonymous_bytes": interpreter,
        "peak_above_interpreter_fraction": (watched.peak_anonymous - interpreter) / sizes[SAVE],
        "repeats": args.repeats,
        "machine": machine(args.dir),
    }


def median(values: Iterable[float]) -> float:
    """Their median."""
    return float(statistics.median(values))


def markdown(results: Mapping[str, Any]) -> str:
    """For a person."""
    lines = ["| part | seconds | raw I/O s | ratio |", "|---|---:|---:|---:|"]
    for name, part in results["parts"].items():
        lines.append(f"| {name} | {part['seconds']:.2f} | {part['raw_io_seconds']:.2f} | {part['over_raw_io']:.2f} |")
    lines.append(f"\nover_raw_io: {results['over_raw_io']:.3g}")
    above = results["peak_anonymous_bytes"] - results["interpreter_anonymous_bytes"]
    share = results["peak_above_interpreter_fraction"]
    lines.append(f"memory of the pruning above the interpreter: {above / 1e6:.0f} MB, {share:.1%} of the checkpoint")
    return "\n".join(lines)
