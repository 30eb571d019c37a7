#!/usr/bin/env python3
"""Measure what distillation costs: a step with teacher and four loss terms over a step of LM training, and the floor.

Both are runs of tools/pretrain.py on the same student, in turns; what counts is Megatron's own time per iteration. The
floor is what the operations alone would cost: 1 + teacher forward / (3 x student forward). With --teacher-ahead
also what a teacher costs that computes ahead, its weights on the host meanwhile. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import PUBLISHED, shape_of
from megatron_slim.cli import positive, run_tool, tool_parser
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
# Published 80A3B -> 23A2B at an eighth of the widths and a sixth of the layers, fewer experts, the same top-k.
_HEADS = {"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
TEACHER = {"hidden_size": 256, "num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 10}
STUDENT = {"hidden_size": 192, "num_hidden_layers": 6, "num_experts": 32, "num_experts_per_tok": 8}
_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
WARM_UP = 2  # iterations that are not counted: the first ones allocate
_SECONDS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=positive, default=1024, help="tokens of a sample")
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="samples of a forward pass")
    parser.add_argument("--vocab-size", type=positive, default=18_992, help="an eighth of the published one")
    parser.add_argument("--iterations", type=positive, default=5, help=f"of a run, after {WARM_UP} that do not count")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind; the medians are compared")
    parser.add_argument("--teacher-ahead", type=positive, metavar="K", help="measure blocks of K iterations, too")
    parser.add_argument("--extra", default="", help="further arguments of tools/pretrain.py, for both")
    return parser.parse_args()


def shapes(vocab_size: int) -> dict[str, Any]:
    """Teacher and student."""
    base = PUBLISHED | _HEADS | _EXPERTS | {"vocab_size": vocab_size, "max_position_embeddings": 8192}
    return {
        name: shape_of(base | sizes | {"layer_types": _TYPES[: sizes["num_hidden_layers"]]})
        for name, sizes in (("teacher", TEACHER), ("student", STUDENT))
    }


def iteration_seconds(models: Path, args: argparse.Namespace, kind: str) -> list[float]:
    """Seconds of every counted iteration of one run; where the teacher computes ahead, means over its blocks."""
    block = args.teacher_ahead if kind == "ahead" else 1
    warm_up = -(-WARM_UP // block) * block
    iterations = warm_up + -(-args.iterations // block) * block
    command = [sys.executable, ROOT / "tools/torchrun.py", "--nproc-per-node", 1, ROOT / "tools/pretrain.py"]
    command += ["--mock-data", "--pretrained-checkpoint", models / "student", "--no-teacher-check"]
    command += ["--seq-length", args.seq_length, "--micro-batch-size", args.micro_batch_size]
    command += ["--global-batch-size", args.micro_batch_size, "--train-iters", iterations]
    command += "--lr 1e-4 --eval-interval 1000 --eval-iters 0 --log-interval 1 --use-distributed-optimizer".split()
    command += ["--teacher-load", models / "teacher"] if kind != "lm" else []
    command += ["--teacher-ahead", block, "--teacher-offload"] if kind == "ahead" else []
    command += args.extra.split()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise SlimError(f"a run ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    found = [float(each) / 1000 for each in _SECONDS.findall(done.stdout)]
    assert len(found) == iterations, done.stdout
    return [statistics.mean(found[start : start + block]) for start in range(warm_up, iterations, block)]


def floor(teacher: Any, student: Any, seq_length: int) -> dict[str, float]:
    """The least that a distilling step costs, in steps of LM training, by operations alone."""
    from megatron_slim.architecture.flops import TORCH, student_work, teacher_work

    forward = student_work(student, seq_length, TORCH).total / 3
    ratio = teacher_work(teacher, seq_length, TORCH, runs_mtp=True).total / forward
    return {"teacher_over_student_forward": ratio, "flop_floor": 1 + ratio / 3}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of run, in turns."""
    from megatron_slim.testing import write_tiny_checkpoint

    models = shapes(args.vocab_size)
    kinds = ("lm", "kd", "ahead") if args.teacher_ahead else ("lm", "kd")
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in models.items():
            write_tiny_checkpoint(Path(folder, name), shape, seed=len(name))
        for _ in range(args.repeats):
            for kind, found in samples.items():
                found += iteration_seconds(Path(folder), args, kind)
    seconds = {kind: statistics.median(found) for kind, found in samples.items()}
    results: dict[str, Any] = {"kd_over_lm": seconds["kd"] / seconds["lm"]}
    if args.teacher_ahead:
        results["ahead_over_kd"] = seconds["ahead"] / seconds["kd"]
    results |= floor(models["teacher"], models["student"], args.seq_length)
    results["over_floor"] = results["kd_over_lm"] / results["flop_floor"]
    if not args.json:
        for name, value in results.items():
            print(f"{name}: {value:.3g}")
    return {**results, "seconds": seconds, "samples": samples}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
