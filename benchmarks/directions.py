"""Every direction of conversion and pruning, run round by round with the raw reads and writes of its bytes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.models import Needed, model_bytes, needed_by_plan, read_config, shape_of, write_recipe, write_statistics
from benchmarks.processes import ROOT, Run, StartUp, python, run, start_up
from benchmarks.storage import drop_cache, files_of, fill_cache, raw_read, raw_write
from megatron_slim.cli.terminal import say

HF, TORCH_DIST = "hf", "torch_dist"
CONVERT, PRUNE = "convert", "prune"
# What a tool has imported when it begins to read.
IMPORTS = {
    CONVERT: ("megatron_slim.checkpoint.convert",),
    PRUNE: ("megatron_slim.pruning.pipeline", "megatron_slim.pruning.apply", "megatron_slim.pruning.plan_reader"),
}


@dataclass(frozen=True)
class Direction:
    """One thing that the tools do: which of them, from which format to which."""

    tool: str
    source: str
    target: str


DIRECTIONS = {
    "hf_to_torch_dist": Direction(CONVERT, HF, TORCH_DIST),
    "torch_dist_to_hf": Direction(CONVERT, TORCH_DIST, HF),
    "hf_to_pruned_hf": Direction(PRUNE, HF, HF),
    "hf_to_pruned_torch_dist": Direction(PRUNE, HF, TORCH_DIST),
    "torch_dist_to_pruned_torch_dist": Direction(PRUNE, TORCH_DIST, TORCH_DIST),
}
LOAD_ALL = "load_all"
SAMPLE_SECONDS = 0.02
# A virtual machine gives free pages back to its host after two seconds, and takes time for each that it gets again.
# Whatever is measured bears that alike, and nothing profits from what ran before it.
SETTLE_SECONDS = 4


@dataclass
class Measured:
    """All samples, one per timed round.

    Attributes:
        runs: by direction (or ``load_all``) and whether it verified.
        sampled: the same commands, verifying, with their memory watched, one run each.
        load_all_seconds: from the first read to the end of the save.
        reads: raw reads, seconds by bytes and threads.
        writes: raw writes, seconds by bytes and threads.
        start_ups: by tool.
        resident: share of the source in the page cache before each timed run.
        needed: by direction, what must be read and written.
    """

    runs: dict[tuple[str, bool], list[Run]] = field(default_factory=lambda: defaultdict(list))
    sampled: dict[str, Run] = field(default_factory=dict)
    load_all_seconds: list[float] = field(default_factory=list)
    reads: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    writes: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    start_ups: dict[str, list[StartUp]] = field(default_factory=lambda: defaultdict(list))
    resident: list[float] = field(default_factory=list)
    needed: dict[str, Needed] = field(default_factory=dict)


class _Bench:
    """Sources, plan and options of a run."""

    def __init__(self, source: Path, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.sources = {HF: source, TORCH_DIST: work / TORCH_DIST}
        self.plan, self.out = work / "plan.json", work / "out"
        self.threads = sorted({1, args.processes or len(os.sched_getaffinity(0))})
        self.found = Measured()

    def prepare(self) -> None:
        """What the wanted directions need: the model as torch_dist, a plan that prunes depth, width and experts."""
        hf, stats, recipe = self.sources[HF], self.work / "stats.safetensors", self.work / "recipe.yaml"
        wanted = [DIRECTIONS[name] for name in self.args.only]
        nbytes = model_bytes(shape_of(read_config(hf)))
        whole = pruned = Needed(nbytes, nbytes, nbytes)
        if any(direction.source == TORCH_DIST for direction in wanted):
            run(_tool("convert_checkpoint", hf, self.sources[TORCH_DIST]))
        if any(direction.tool == PRUNE for direction in wanted):
            write_statistics(hf, stats)
            write_recipe(read_config(hf), recipe)
            run(_tool("plan_pruning", hf, self.plan, "--stats", stats, "--recipe", recipe))
            pruned = needed_by_plan(self.plan)
        for name, direction in zip(self.args.only, wanted, strict=True):
            self.found.needed[name] = pruned if direction.tool == PRUNE else whole

    def command(self, name: str, verify: bool) -> list[str]:
        """The command line of a direction."""
        if name == LOAD_ALL:
            options = ("--load", self.sources[HF], "--save", self.out, "--threads", self.threads[-1])
            return python(ROOT / "benchmarks" / "load_all.py", *options)
        direction = DIRECTIONS[name]
        more: list[object] = [] if verify else ["--no-verify"]
        if self.args.processes:
            more += ["--processes", self.args.processes]
        load = self.sources[direction.source]
        if direction.tool == PRUNE:
            return _tool("prune_checkpoint", load, self.out, "--plan", self.plan, "--to", direction.target, *more)
        return _tool("convert_checkpoint", load, self.out, "--to", direction.target, *more)

    def commands(self) -> Iterator[tuple[str, bool]]:
        """All that is measured, in the order of a round."""
        if not self.args.no_load_all:
            yield LOAD_ALL, False
        for name in self.args.only:
            yield name, True
            yield name, False

    def source_of(self, name: str) -> Path:
        """What a direction reads."""
        return self.sources[HF if name == LOAD_ALL else DIRECTIONS[name].source]

    def settle(self, source: Path) -> float:
        """All writes done, and the page cache as it was asked for; returns the share of the source in it."""
        os.sync()
        share = drop_cache(source) if self.args.cache == "cold" else fill_cache(source)
        time.sleep(SETTLE_SECONDS)
        return share


def measure(source: Path, work: Path, args: argparse.Namespace) -> Measured:
    """Round 0 watches memory and writes every block of the disk that later rounds write; the others are timed."""
    bench = _Bench(source, work, args)
    bench.prepare()
    for name, verify in bench.commands():
        if not verify and name != LOAD_ALL:
            continue
        say(f"memory of {name}")
        bench.settle(bench.source_of(name))
        bench.found.sampled[name] = run(bench.command(name, verify), sample_seconds=SAMPLE_SECONDS)
        if name == LOAD_ALL:
            _check_opens(bench)
        shutil.rmtree(bench.out)
    for number in range(1, args.repeats + 1):
        say(f"round {number} of {args.repeats}")
        _raw_round(bench)
        for tool in sorted({DIRECTIONS[name].tool for name in args.only}):
            bench.found.start_ups[tool].append(start_up(IMPORTS[tool]))
        for name, verify in bench.commands():
            bench.found.resident.append(bench.settle(bench.source_of(name)))
            outcome = run(bench.command(name, verify))
            bench.found.runs[name, verify].append(outcome)
            if name == LOAD_ALL:
                bench.found.load_all_seconds.append(_told(outcome)["seconds"])
            shutil.rmtree(bench.out)
    return bench.found


def _raw_round(bench: _Bench) -> None:
    needed = bench.found.needed.values()
    reads = sorted({nbytes for each in needed for nbytes in (each.kept, each.rows)})
    writes = sorted({each.written for each in needed})
    for threads in bench.threads:
        for nbytes in reads:
            bench.settle(bench.sources[HF])
            seconds = raw_read(files_of(bench.sources[HF]), nbytes, threads=threads)
            bench.found.reads[nbytes, threads].append(seconds)
        for nbytes in writes:
            bench.settle(bench.sources[HF])
            bench.found.writes[nbytes, threads].append(raw_write(bench.work / "raw", nbytes, threads=threads))


def _tool(name: str, load: Path, save: Path, *more: object) -> list[str]:
    return python(ROOT / "tools" / f"{name}.py", "--load", load, "--save", save, *more)


def _told(outcome: Run) -> dict[str, float]:
    return dict(json.loads(outcome.stdout.splitlines()[-1]))


def _check_opens(bench: _Bench) -> None:
    """What the other way has written is a whole checkpoint of the same model."""
    from megatron_slim.checkpoint.distributed import DistCheckpoint

    DistCheckpoint.open(bench.out, bench.sources[HF])
