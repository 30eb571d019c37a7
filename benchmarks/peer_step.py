#!/usr/bin/env python3
"""Compare a training step on a CPU with the same step of transformers' model, torch's losses and AdamW.

Both sides train the same random student on the same tokens, with and without a teacher, in processes of their own and
in turns, with one thread and with two. Their losses must agree, so that it is the same work. The step with all four
terms and MTP blocks is compared with transformers' step of two terms. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import kd_step, processes
from benchmarks.models import demo_shapes
from benchmarks.peer_step_run import KD_LAMBDA, RECORD
from benchmarks.processes import python
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.distillation import terms
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.errors import SlimError

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "benchmarks/peer_step_run.py"
LM, KD, FOUR_TERMS, PEER_LM, PEER_KD = "lm", "kd", "four_terms", "peer_lm", "peer_kd"
KINDS = (LM, PEER_LM, KD, PEER_KD, FOUR_TERMS)
WARM_UP = kd_step.WARM_UP  # steps that are not counted
# Of losses, relative: fp32 on both sides, sums in another order. The second step has one update of the weights behind
# it. Adam turns the rounding of gradients that are nearly zero into whole steps, and then other experts are chosen.
TOLERANCE, LATER_TOLERANCE = 1e-5, 1e-3
_LM, _KD = (re.compile(rf"\| {name}: ([\d.E+-]+)") for name in (LOSS_TERMS["lm"].name, LOSS_TERMS["kd"].name))


@dataclass(frozen=True)
class Size:
    """Models and tokens of a step."""

    models: dict[str, Any]
    seq_length: int
    micro_batch_size: int
    micro_batches: int


def sizes() -> dict[str, Size]:
    """An eighth of the published widths with 1,024 tokens a step, and the demo's training."""
    demo = dict(zip(("teacher", "student"), demo_shapes(), strict=True))
    return {"eighth": Size(kd_step.shapes("eighth"), 1024, 1, 1), "demo": Size(demo, 256, 4, 2)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=sizes(), default=list(sizes()))
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=positive, default=6, help=f"of a run, after {WARM_UP} that do not count")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind; the medians are compared")
    parser.add_argument("--experts", help="transformers' experts_implementation; default: its own")
    return parser.parse_args(argv)


def run(command: list[str], threads: int) -> str:
    """Standard output of a process."""
    return processes.run(command, variables={"OMP_NUM_THREADS": str(threads)}).stdout


def train(folder: Path, size: Size, kind: str, steps: int, threads: int, *, recorded: Path | None = None) -> str:
    """What our training prints; with ``recorded`` its micro-batches are written there."""
    batch = size.micro_batch_size * size.micro_batches
    sample = size.seq_length, size.micro_batch_size, batch
    script = kd_step.PRETRAIN if recorded is None else (RUN, RECORD, recorded)
    command = kd_step.training_command(folder, steps, *sample, teacher=kind != LM, script=script)
    command += "--lr-decay-style constant --moe-aux-loss-coeff 0".split()
    if kind != LM:
        command += f"{terms.KD_LAMBDA.flag}-start {KD_LAMBDA} {terms.KD_LAMBDA.flag}-end {KD_LAMBDA}".split()
    if kind != FOUR_TERMS:
        command += ["--without-mtp", *(["--teacher-without-mtp"] if kind == KD else [])]
    return run(command, threads)


def ours(folder: Path, size: Size, kind: str, steps: int, threads: int) -> list[tuple[float, float, float]]:
    """Seconds and losses of every step."""
    output = train(folder, size, kind, steps, threads)
    seconds = kd_step.seconds_of(output)
    lm = [float(each) for each in _LM.findall(output)]
    kd = [float(each) for each in _KD.findall(output)] or [0.0] * steps
    assert len(seconds) == len(lm) == len(kd) == steps, output
    return list(zip(seconds, lm, kd, strict=True))


def peers(folder: Path, size: Size, kind: str, threads: int, experts: str | None) -> list[tuple[float, float, float]]:
    """The same of transformers."""
    command = python(RUN, "--student", folder / "student", "--batches", folder / "batches.npy")
    command += ["--micro-batches", str(size.micro_batches)]
    command += ["--teacher", str(folder / "teacher")] if kind == PEER_KD else []
    command += ["--experts", experts] if experts else []
    return [tuple(step) for step in json.loads(run(command, threads).splitlines()[-1])]


def check_losses(found: dict[str, list[tuple[float, float, float]]]) -> None:
    """Both sides computed the same.

    Raises:
        SlimError: they did not.
    """
    for one, other in ((LM, PEER_LM), (KD, PEER_KD)):
        for step, (mine, theirs) in enumerate(zip(found.get(one, []), found.get(other, []), strict=False)):
            tolerance = TOLERANCE if step < WARM_UP else LATER_TOLERANCE
            for a, b in zip(mine[1:], theirs[1:], strict=True):
                if abs(a - b) > tolerance * abs(b):
                    raise SlimError(f"step {step} of {one}: a loss of {a} here and {b} of transformers")


def rounds(folder: Path, size: Size, threads: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All kinds of run, in turns, again and again."""
    steps = WARM_UP + args.steps
    for _ in range(args.repeats):
        found = {}
        for kind in args.kinds:
            mine = kind in (LM, KD, FOUR_TERMS)
            found[kind] = (
                ours(folder, size, kind, steps, threads) if mine else peers(folder, size, kind, threads, args.experts)
            )
        check_losses(found)
        yield found


def compare(folder: Path, size: Size, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios at one size with one number of threads, and the samples behind them."""
    samples: dict[str, list[float]] = {kind: [] for kind in args.kinds}
    for found in rounds(folder, size, threads, args):
        for kind, steps in found.items():
            samples[kind] += [seconds for seconds, *_ in steps[WARM_UP:]]
    seconds = {kind: statistics.median(each) for kind, each in samples.items()}
    pairs = {"peer_over_ours_lm": (PEER_LM, LM), "peer_over_ours_kd": (PEER_KD, KD)}
    pairs["four_terms_over_peer_kd"] = (FOUR_TERMS, PEER_KD)
    ratios = {
        name: seconds[above] / seconds[below]
        for name, (above, below) in pairs.items()
        if above in seconds and below in seconds
    }
    return {**ratios, "seconds": seconds, "samples": samples}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    from benchmarks.report import machine

    results: dict[str, Any] = {}
    for name in args.sizes:
        size = sizes()[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            kd_step.write_models(folder, size.models)
            train(folder, size, LM, WARM_UP + args.steps, max(args.threads), recorded=folder / "batches.npy")
            for threads in args.threads:
                found = results[f"{name}, threads {threads}"] = compare(folder, size, threads, args)
                if not args.json:
                    ratios = (f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, float))
                    times = (f"{kind} {value:.3f} s" for kind, value in found["seconds"].items())
                    print(f"{name}, threads {threads}:", ", ".join([*ratios, *times]), flush=True)
    return {**results, "machine": machine(ROOT)}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: measure(arguments), as_json=arguments.json)
