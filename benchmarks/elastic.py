#!/usr/bin/env python3
"""Measure what training several nested sizes together costs, compared with training each of them alone.

All are runs of tools/pretrain.py against one teacher, in turns: each budget alone, as its slice; each budget alone in
an elastic run; all budgets in every step. What counts is Megatron's own time per iteration, and the anonymous memory of
the process. Then a slice is cut, compared with plain reads and writes of its bytes. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import WARM_UP, kernels, seconds_of, shapes, training_command, write_models
from benchmarks.processes import python, run, start_up
from megatron_slim.architecture.flops import student_flops, teacher_flops
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
# As 23A2B and 12A1B are of 80A3B, in widths and experts; layers are equal, as published elastic models have them.
BUDGETS: dict[str, dict[str, int]] = {
    "large": {},
    "middle": {"hidden_size": 160, "num_moe_experts": 24, "moe_ffn_hidden_size": 56},
    "small": {"hidden_size": 128, "num_moe_experts": 16, "moe_ffn_hidden_size": 48, "moe_router_topk": 6},
}
TOGETHER, ELASTIC = "together", "elastic "
SAMPLE_SECONDS = 0.1
IMPORTS = ("torch", "megatron_slim.pruning.elastic_slices")  # before a slice is read; left out of its ratio


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/elastic"), help="where a slice is cut; the disk measured"
    )
    parser.add_argument("--seq-length", type=positive, default=1024, help="tokens of a sample")
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="samples of a forward pass")
    parser.add_argument("--micro-batches", type=positive, default=1, help="of a step")
    parser.add_argument("--iterations", type=positive, default=5, help=f"of a run, after {WARM_UP} that do not count")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind; the medians are compared")
    parser.add_argument("--slice-gb", type=float, default=2.0, help="of the slice that is cut; 0 cuts none")
    parser.add_argument("--extra", default="", help="further arguments of tools/pretrain.py, for all")
    return parser.parse_args(argv)


def flags_of(kind: str) -> list[str]:
    """What a run's command line says about budgets."""
    if kind == TOGETHER:
        return ["--elastic", "together"]
    if not kind.startswith(ELASTIC):
        return []
    name = kind.removeprefix(ELASTIC)
    return ["--elastic", "in-turn", "--elastic-shares", ",".join(str(int(name == each)) for each in BUDGETS)]


def write_all(folder: Path) -> None:
    """The teacher, an elastic student, and its slices as students of their own."""
    from megatron_slim.testing import make_elastic

    models = shapes("eighth")
    write_models(folder, models)
    make_elastic(folder / "student", BUDGETS)
    for name in BUDGETS:
        own = folder / name
        own.mkdir()
        (own / "teacher").symlink_to(folder / "teacher")
        command = ("slice", "--load", folder / "student", "--budget", name, "--save", own / "student")
        run(python("-m", "megatron_slim", *command))


def one_run(folder: Path, args: argparse.Namespace, kind: str) -> tuple[list[float], int]:
    """Seconds of every counted iteration, and the most memory that was in use."""
    models = folder / kind if kind in BUDGETS else folder
    iterations, batch = WARM_UP + args.iterations, args.micro_batch_size * args.micro_batches
    size = args.seq_length, args.micro_batch_size, batch
    command = [*training_command(models, iterations, *size, teacher=True), *flags_of(kind), *args.extra.split()]
    done = run(command, sample_seconds=SAMPLE_SECONDS)
    found = seconds_of(done.stdout)
    if len(found) != iterations:
        raise SlimError(f"{len(found)} of {iterations} iterations in the log of a run")
    return found[WARM_UP:], done.peak_anonymous


def operations() -> float:
    """What a step of all budgets costs over the sum of one of each, by operations alone."""
    from megatron_slim.pruning.elastic import find_elastic
    from megatron_slim.testing import make_elastic

    models, used = shapes("eighth"), kernels()
    teacher = teacher_flops(models["teacher"], 1024, used, runs_mtp=True).total
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), {"student": models["student"]})
        elastic = find_elastic(make_elastic(Path(folder) / "student", BUDGETS))
    assert elastic is not None
    students = [student_flops(each.plan.target_shape, 1024, used).total for each in elastic.budgets]
    return float((teacher + sum(students)) / (len(students) * teacher + sum(students)))


def cut(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Time and memory of cutting a slice, and what the whole file holds over the largest budget alone."""
    from benchmarks import models, storage
    from megatron_slim.testing import make_elastic

    work = args.dir / "work"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    try:
        config = models.scaled_config(8, 1024, args.slice_gb * 1e9 * 2.2)
        models.write_model(work / "parent", config, sparse=False)
        shape = models.shape_of(config)
        largest = storage.bytes_of(work / "parent")
        target = {"hidden_size": 768, "num_moe_experts": shape.num_moe_experts * 5 // 8}
        make_elastic(work / "parent", {"large": {}, "small": target})
        yield "file_over_largest", storage.bytes_of(work / "parent") / largest
        ratios, peaks, idle = [], [], start_up(IMPORTS)
        for number in range(args.repeats):
            saved = work / f"slice-{number}"
            storage.drop_cache(work / "parent")
            command = ("slice", "--load", work / "parent", "--budget", "small", "--save", saved)
            done = run(python("-m", "megatron_slim", *command), sample_seconds=SAMPLE_SECONDS)
            kept = storage.bytes_of(saved)
            shutil.rmtree(saved)
            storage.drop_cache(work / "parent")
            plain = storage.raw_read(storage.files_of(work / "parent"), kept, threads=2)
            plain += storage.raw_write(work / "raw", kept, threads=2)
            ratios.append((done.seconds - idle.seconds) / plain)
            peaks.append(done.peak_anonymous - idle.anonymous)
        yield "slice_gb", kept / 1e9
        yield "slice_over_raw_io", statistics.median(ratios)
        yield "slice_peak_gb", max(peaks) / 1e9
    finally:
        shutil.rmtree(work, ignore_errors=True)


def ratios_of(seconds: Mapping[str, float], peaks: Mapping[str, int]) -> dict[str, float]:
    """What is claimed, of medians and peaks by kind of run."""
    own = {name: seconds[f"{ELASTIC}{name}"] / seconds[name] for name in BUDGETS}
    memory = {kind: peaks[kind] / peaks["large"] for kind in peaks if kind not in BUDGETS}
    return {
        "joint_over_separate": seconds[TOGETHER] / sum(seconds[name] for name in BUDGETS),
        "joint_over_separate_by_operations": operations(),
        "step_over_own": max(own.values()),
        **{f"step_over_own_{name}": value for name, value in own.items()},
        "memory_over_largest": max(value for kind, value in memory.items() if kind != TOGETHER),
        "memory_over_largest_together": memory[TOGETHER],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of run, in turns."""
    kinds = [*BUDGETS, *(f"{ELASTIC}{name}" for name in BUDGETS), TOGETHER]
    samples, peaks = defaultdict[str, list[float]](list), defaultdict[str, int](int)
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        for _ in range(args.repeats):
            for kind in kinds:
                found, peak = one_run(Path(folder), args, kind)
                samples[kind] += found
                peaks[kind] = max(peaks[kind], peak)
    results: dict[str, Any] = ratios_of({kind: statistics.median(found) for kind, found in samples.items()}, peaks)
    results |= dict(cut(args)) if args.slice_gb else {}
    if not args.json:
        for name, value in results.items():
            print(f"{name}: {value:.3g}")
    return {**results, "tokens": args.seq_length * args.micro_batch_size * args.micro_batches, "samples": samples}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
