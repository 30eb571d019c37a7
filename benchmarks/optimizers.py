#!/usr/bin/env python3
"""Measure a step of Muon and of Aurora: against Megatron's own Muon, against each other, and in a training step.

All steps are of one process, in turns, on the same weights and gradients, with products in fp32. With --training,
also what a step of training takes with Muon and with Adam. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import WARM_UP, seconds_of, shapes, training_command, write_models
from benchmarks.models import demo_shapes
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from torch import Tensor

MEGATRON, MUON, AURORA, ADAM = KINDS = ("megatron", "muon", "aurora", "adam")
NOISE, DECAYING, FEW_TOKENS = GRADIENTS = ("noise", "decaying", "few-tokens")
FEW = 32  # tokens of which a gradient is made
GOALS = {"step_over_megatron_muon": 0.7, "aurora_over_muon": 2.5, "training_step_over_adam": 1.25}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--student", choices=("eighth", "demo"), default="eighth", help="of kd_step.py, or the demo's")
    parser.add_argument(
        "--gradients",
        choices=GRADIENTS,
        nargs="+",
        default=[NOISE],
        help="normal numbers; singular values 1, 1/2, 1/3, ...; or of so few tokens that they have a low rank",
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds; medians of ratios are reported")
    parser.add_argument("--training", action="store_true", help="also runs of training, with Adam and with Muon")
    parser.add_argument("--seq-length", type=positive, default=1024, help="of a sample of these runs")
    parser.add_argument("--samples", type=positive, default=8, help="of a step of these runs")
    parser.add_argument("--iterations", type=positive, default=3, help=f"that count, after {WARM_UP}")
    return parser.parse_args(argv)


def gradient(shape: tuple[int, ...], kind: str, generator: Any) -> Tensor:
    """Random numbers, of the size that gradients have."""
    import torch

    def random(*extents: int) -> Tensor:
        return torch.randn(extents, generator=generator)

    if kind == FEW_TOKENS:
        return 1e-3 * random(shape[0], FEW) @ random(FEW, shape[1])
    if kind == NOISE:
        return 1e-3 * random(*shape)
    rank = min(shape)
    left, right = (torch.linalg.qr(random(extent, rank))[0] for extent in shape)
    return 1e-3 * (left / torch.arange(1, rank + 1)) @ right.T


class Contest:
    """All optimizers on the same parameters: every matrix of a model, as Megatron has them on one rank."""

    def __init__(self, student: str, kind: str) -> None:
        """Make parameters and gradients, and the optimizers."""
        import megatron_slim.mcore

        import torch

        from megatron_slim.architecture.table import weights
        from megatron_slim.training.matrix_stacks import Row

        self.model = shapes("eighth")["student"] if student == "eighth" else demo_shapes()[1]
        generator = torch.Generator().manual_seed(0)
        self.rows: dict[int, Row] = {}
        self.parameters: list[Any] = []
        for weight in weights(self.model):
            for expert in weight.experts(self.model):
                if len(weight.dims) == 2 and weight.dims[0] != "vocab" and not weight.buffer:
                    shape = weight.shape(self.model)[-2:]
                    parameter: Any = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
                    parameter.grad = gradient(shape, kind, generator)
                    parameter.is_qkv = "linear_qkv" in weight.key
                    self.parameters.append(parameter)
                    self.rows[id(parameter)] = Row(weight, expert)
        self.optimizers = {MEGATRON: self._megatron(), **self._ours(), ADAM: torch.optim.AdamW(self.parameters, 1e-6)}

    def _groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters)}]

    def _megatron(self) -> Any:
        from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

        width = self.model.kv_channels
        queries = self.model.num_attention_heads // self.model.num_query_groups * width
        return TensorParallelMuon(
            self._groups(),
            lr=1e-4,
            momentum=0.9,
            nesterov=False,
            split_qkv=True,
            is_qkv_fn=lambda parameter: parameter.is_qkv,
            qkv_split_shapes=[queries] * (1 + self.model.family.attention_output_gate) + [width, width],
            fp32_matmul_prec="highest",
        )

    def _ours(self) -> dict[str, Any]:
        from megatron_slim.training import matrix_optimizer as ours
        from megatron_slim.training.matrix_stacks import WHOLE, places_of

        def optimizer(update: Any, momentum: float, *, nesterov: bool) -> Any:
            return ours.MatrixOptimizer(
                self._groups(),
                lr=1e-4,
                momentum=momentum,
                weight_decay=0.01,
                nesterov=nesterov,
                update=update,
                places_of=lambda each, group: places_of(
                    each, group, self.rows[id(each)], self.model, WHOLE, every=False
                ),
                adamw=ours.AdamW(),
                steps_idle=False,
                updates=ours.Updates(),
            )

        muon = ours.muon_update(5, "quintic", "shape_scaling", 1.0, "fp32")
        aurora = ours.aurora(2, 0.5, "fp32")
        return {MUON: optimizer(muon, 0.9, nesterov=False), AURORA: optimizer(aurora, 0.95, nesterov=True)}

    def time(self, kind: str) -> float:
        """Seconds of the processor for one step."""
        begin = time.process_time()
        self.optimizers[kind].step()
        seconds = time.process_time() - begin
        if kind in (MUON, AURORA):
            self.optimizers[kind].updates.clear()
        return seconds


def steps(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Seconds of every optimizer, and medians of the ratios of each round."""
    contest = Contest(args.student, kind)
    rounds = [{name: contest.time(name) for name in KINDS} for _ in range(args.repeats + 1)][1:]

    def ratio(of: str, over: str) -> float:
        return statistics.median(each[of] / each[over] for each in rounds)

    return {
        "seconds": {name: statistics.median(each[name] for each in rounds) for name in KINDS},
        "parameters": sum(each.numel() for each in contest.parameters),
        "step_over_megatron_muon": ratio(MUON, MEGATRON),
        "aurora_over_muon": ratio(AURORA, MUON),
    }


def training(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of training with Adam and with Muon, in turns.

    Raises:
        SlimError: a run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), shapes("eighth"))
        found = {name: [*_iterations(args, Path(folder), name)] for name in (ADAM, MUON)}
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {
        "tokens": args.seq_length * args.samples,
        "seconds": medians,
        "training_step_over_adam": medians[MUON] / medians[ADAM],
    }


def _iterations(args: argparse.Namespace, models: Path, optimizer: str) -> Iterator[float]:
    command = training_command(models, WARM_UP + args.iterations, args.seq_length, 2, args.samples, teacher=True)
    command = [word for word in command if word != "--use-distributed-optimizer"]  # which Muon has in bf16 alone
    done = subprocess.run(
        [*command, "--optimizer", optimizer], capture_output=True, text=True, env=os.environ, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise SlimError(f"a run with {optimizer} ended with exit code {done.returncode}: {last}")
    yield from seconds_of(done.stdout)[WARM_UP:]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything."""
    import torch

    from megatron_slim.compat.cpu_memory import TRAINING, keep_freed_memory

    torch.set_num_threads(args.threads)
    keep_freed_memory(TRAINING)  # as training does
    results: dict[str, Any] = {"by_gradients": {kind: steps(args, kind) for kind in args.gradients}}
    first = results["by_gradients"][args.gradients[0]]
    results |= {name: first[name] for name in ("step_over_megatron_muon", "aurora_over_muon")}
    if args.training:
        results["training"] = training(args)
        results["training_step_over_adam"] = results["training"]["training_step_over_adam"]
    results |= {"student": args.student, "threads": args.threads, "goals": GOALS}
    if not args.json:
        show(results, print)
    return results


def show(results: dict[str, Any], write: Callable[[str], None]) -> None:
    """A line for every kind of gradients."""
    for kind, found in results["by_gradients"].items():
        each = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in found["seconds"].items())
        write(f"{kind}: {each}")
    for name, goal in GOALS.items():
        if name in results:
            write(f"{name}: {results[name]:.2f} (goal: {goal})")


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    run_tool(lambda: measure(args), as_json=args.json)


if __name__ == "__main__":
    main()
