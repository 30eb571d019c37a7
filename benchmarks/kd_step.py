#!/usr/bin/env python3
"""Measure what distillation costs: a step with teacher and four loss terms over a step of LM training, and the floor.

Both are runs of tools/pretrain.py on the same student, in turns; what counts is Megatron's own time per iteration. The
floor is what the operations alone would cost: 1 + teacher forward / (3 x student forward). With --teacher-ahead
also what a teacher costs that computes ahead, its weights on the host meanwhile. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import PUBLISHED, shape_of
from benchmarks.processes import free_port, python
from megatron_slim.architecture.flops import FUSED, TORCH, TORCH_ON_GPU, Kernels, student_flops, teacher_flops
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
# Published 80A3B -> 23A2B, fewer experts, the same top-k: for a CPU at an eighth of the widths and a sixth of the
# layers; for one GPU at the published widths, a period of layers of each.
_HEADS = {"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_EXPERTS = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
_EIGHTH = {**_HEADS, **_EXPERTS, "vocab_size": 18_992, "num_experts_per_tok": 10}
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "eighth": {
        "teacher": _EIGHTH | {"hidden_size": 256, "num_hidden_layers": 8, "num_experts": 64},
        "student": _EIGHTH | {"hidden_size": 192, "num_hidden_layers": 6, "num_experts": 32, "num_experts_per_tok": 8},
    },
    "published": {
        "teacher": {"hidden_size": 2048, "num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 10},
        "student": {"hidden_size": 1536, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 8},
    },
}
_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2
LM, KD, AHEAD = KINDS = ("lm", "kd", "ahead")
LR = 1e-4
PRETRAIN = (ROOT / "tools/pretrain.py",)
WARM_UP = 2  # iterations that are not counted: the first ones allocate
_SECONDS = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--seq-length", type=positive, default=1024, help="tokens of a sample")
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="samples of a forward pass")
    parser.add_argument("--widths", choices=SIZES, default="eighth", help="of both models, against the published ones")
    parser.add_argument("--vocab-size", type=positive, help="default: as the widths")
    parser.add_argument("--iterations", type=positive, default=5, help=f"of a run, after {WARM_UP} that do not count")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind; the medians are compared")
    parser.add_argument("--teacher-ahead", type=positive, metavar="K", help="measure blocks of K iterations, too")
    parser.add_argument("--extra", default="", help="further arguments of tools/pretrain.py, for both")
    return parser.parse_args(argv)


def shapes(widths: str, vocab_size: int | None = None) -> dict[str, Any]:
    """Teacher and student."""
    base = PUBLISHED | {"max_position_embeddings": 8192}
    given = {} if vocab_size is None else {"vocab_size": vocab_size}
    return {
        name: shape_of(base | sizes | given | {"layer_types": _TYPES[: sizes["num_hidden_layers"]]})
        for name, sizes in SIZES[widths].items()
    }


def write_models(directory: Path, models: Mapping[str, Any]) -> None:
    """Checkpoints of random weights."""
    from megatron_slim.testing import write_tiny_checkpoint

    for name, shape in models.items():
        write_tiny_checkpoint(directory / name, shape, seed=len(name))


def training_command(
    models: Path,
    iterations: int,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    *,
    teacher: bool,
    script: Sequence[object] = PRETRAIN,
    data: Sequence[object] = ("--mock-data",),
) -> list[str]:
    """One process that trains the student, logging every iteration."""
    command = [ROOT / "tools/torchrun.py", "--nproc-per-node", 1, "--master-port", free_port(), *script]
    command += [*data, "--pretrained-checkpoint", models / "student", "--no-teacher-check"]
    command += ["--seq-length", seq_length, "--micro-batch-size", micro_batch_size]
    command += ["--global-batch-size", global_batch_size, "--train-iters", iterations, "--lr", LR]
    command += "--eval-interval 1000 --eval-iters 0 --log-interval 1 --use-distributed-optimizer".split()
    return python(*command, *(["--teacher-load", models / "teacher"] if teacher else []))


def seconds_of(output: str) -> list[float]:
    """Of every iteration that a run's output logs."""
    return [float(each) / 1000 for each in _SECONDS.findall(output)]


def train(models: Path, args: argparse.Namespace, kind: str, iterations: int) -> str:
    """What one run of training prints; its kind is one of `KINDS`.

    Raises:
        SlimError: it failed.
    """
    size = args.seq_length, args.micro_batch_size
    command = training_command(models, iterations, *size, args.micro_batch_size, teacher=kind != LM)
    command += ["--teacher-ahead", str(args.teacher_ahead), "--teacher-offload"] if kind == AHEAD else []
    command += args.extra.split()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        print("" if args.json else f"{done.stdout}\n{done.stderr}", end="", flush=True)
        raise SlimError(f"a run ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def iteration_seconds(models: Path, args: argparse.Namespace, kind: str) -> list[float]:
    """Seconds of every counted iteration of one run; where the teacher computes ahead, means over its blocks."""
    block = args.teacher_ahead if kind == AHEAD else 1
    warm_up = -(-WARM_UP // block) * block
    iterations = warm_up + -(-args.iterations // block) * block
    output = train(models, args, kind, iterations)
    found = seconds_of(output)
    assert len(found) == iterations, output
    return [statistics.mean(found[start : start + block]) for start in range(warm_up, iterations, block)]


def kernels() -> Kernels:
    """How the runs compute what has no weights, by what is installed here."""
    import torch

    cuda = torch.cuda.is_available()
    plain = TORCH_ON_GPU if cuda else TORCH
    delta = FUSED if cuda and importlib.util.find_spec("fla") else plain
    attention = FUSED if cuda and importlib.util.find_spec("transformer_engine") else plain
    return dataclasses.replace(attention, delta_rule_chunk=delta.delta_rule_chunk, solves_keys=delta.solves_keys)


def floor(teacher: Any, student: Any, seq_length: int) -> dict[str, float]:
    """The least that a distilling step costs, in steps of LM training, by operations alone."""
    used = kernels()
    forward = student_flops(student, seq_length, used).total / 3
    ratio = teacher_flops(teacher, seq_length, used, runs_mtp=True).total / forward
    return {"teacher_over_student_forward": ratio, "flop_floor": 1 + ratio / 3}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All kinds of run, in turns."""
    models = shapes(args.widths, args.vocab_size)
    samples: dict[str, list[float]] = {kind: [] for kind in (KINDS if args.teacher_ahead else KINDS[:-1])}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), models)
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
