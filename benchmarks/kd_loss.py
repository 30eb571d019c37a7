#!/usr/bin/env python3
"""Measure the fused four-term loss against materialised logits and autograd, and against plain cross entropy.

All contestants get the same hidden states and weights in one process, in turns, and must give the same losses and
gradients. Memory is the peak above what is there before, measured (of the process, or of CUDA's allocator), and for the
full vocabulary counted from the operations. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.calibration import medians
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FULL = {"tokens": 4096, "vocab": 151936, "hidden": 1536, "teacher_hidden": 2048}
COUNTED_CHUNKS = (256, 512, 1024)  # for which memory at FULL is counted; 1024 is the default on a GPU
LM, KD = 0.25, 0.75  # weights of the terms


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line; hidden sizes default to the published ones on a GPU, and to a quarter of them on a CPU."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=positive, help="default: 2048, on a GPU 4096")
    parser.add_argument("--vocab", type=positive, help="default: 32768, on a GPU 151936")
    parser.add_argument("--hidden", type=positive, help="of the student; default: 384, on a GPU 1536")
    parser.add_argument("--teacher-hidden", type=positive, help="default: 512, on a GPU 2048")
    parser.add_argument("--chunk", type=positive, help="tokens of a chunk; default: as in training")
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--no-liger", action="store_true", help="do not compare with Liger, even if it is installed")
    args = parser.parse_args(argv)
    small = {"tokens": 2048, "vocab": 32768, "hidden": 384, "teacher_hidden": 512}
    for name, value in (small if args.device == "cpu" else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


@dataclass(frozen=True)
class Case:
    """Main and MTP head of a student and of a teacher: [T, H] and [T, Ht] each, weights [V, H] and [V, Ht]."""

    hidden: list[Tensor]
    weight: Any
    teacher_hidden: list[Tensor]
    teacher_weight: Tensor
    labels: Tensor

    @staticmethod
    def make(tokens: int, vocab: int, hidden: int, teacher_hidden: int, device: str, dtype: torch.dtype) -> Case:
        """Random values of the size that a trained model's have."""
        import torch

        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        weight: Any = torch.nn.Parameter(random(vocab, hidden) * hidden**-0.5)
        weight.main_grad = torch.zeros(vocab, hidden, device=device, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
        labels = torch.randint(0, vocab, (2, tokens), device=device)
        inputs = [random(tokens, hidden).requires_grad_() for _ in range(2)]
        teacher = [random(tokens, teacher_hidden) for _ in range(2)]
        return Case(inputs, weight, teacher, random(vocab, teacher_hidden) * teacher_hidden**-0.5, labels)

    def tensors(self) -> list[Tensor]:
        """All that is there before a loss is computed."""
        mine = [*self.hidden, self.weight, self.weight.main_grad]
        return [*mine, *self.teacher_hidden, self.teacher_weight, self.labels]

    def gradients(self) -> list[Tensor]:
        """Copies of the gradients, which are then cleared."""
        found = [*(each.grad.clone() for each in self.hidden if each.grad is not None), self.weight.main_grad.clone()]
        for each in self.hidden:
            each.grad = None
        self.weight.main_grad.zero_()
        return found


def naive(case: Case, *, distil: bool = True) -> Tensor:
    """Whole logits of both models, autograd, and the weight's gradient added to main_grad as DDP's hook does."""
    import torch
    import torch.nn.functional as F

    total: Any = 0.0
    for head in range(2):
        logits = (case.hidden[head] @ case.weight.T).float()
        total = total + (LM if distil else 1.0) * F.cross_entropy(logits, case.labels[head])
        if distil:
            with torch.no_grad():
                p = (case.teacher_hidden[head] @ case.teacher_weight.T).float().softmax(-1)
            total = total - KD * (p * logits.log_softmax(-1)).sum(-1).mean()
            del p
        del logits
    total.backward()
    case.weight.main_grad.add_(case.weight.grad)
    case.weight.grad = None
    return total.detach()


def fused(case: Case, chunk: int | None, *, distil: bool = True, main: bool = False) -> Tensor:
    """What training runs; with ``main`` both heads are supervised by the teacher's main head."""
    import torch

    from megatron_slim.distillation.divergences import KDLoss
    from megatron_slim.distillation.fused import DistillationInputs, Target, default_chunk, fused_losses
    from megatron_slim.distillation.output_layer import OutputLayer
    from megatron_slim.distillation.vocabulary import VocabShard

    shard = VocabShard.of(None, *2 * (case.weight.shape[0],))
    targets: tuple[Target, ...] = (Target(None, ((0, 0), (1, 0))),)
    if distil and main:
        targets = (Target(case.teacher_hidden[0], ((0, 0), (1, 1))),)
    elif distil:
        targets = tuple(Target(hidden, ((head, 0),)) for head, hidden in enumerate(case.teacher_hidden))
    teacher = OutputLayer(case.teacher_weight, shard) if distil else None
    inputs = DistillationInputs(case.labels, targets, teacher, KDLoss(), chunk or default_chunk(case.weight.device))
    ones = torch.full(case.labels.shape, 1 / case.labels.shape[1], device=case.weight.device)
    a, b = ((LM if distil else 1.0) * ones, (KD if distil else 0.0) * ones)
    lm, kd, _ = fused_losses(OutputLayer(case.weight, shard), case.hidden, inputs, (a, b))
    total = (a * lm + b * kd).sum()
    total.backward()
    case.weight.grad = None
    return total.detach()


def same_results(case: Case, chunk: int | None) -> None:
    """Both ways give the same losses and gradients, up to the rounding of the weights' type."""
    import torch

    for distil in (True, False):
        (loss, *wanted), (other, *found) = (
            [function().double(), *case.gradients()]
            for function in (lambda: naive(case, distil=distil), lambda: fused(case, chunk, distil=distil))  # noqa: B023
        )
        exact = case.weight.dtype == torch.float32
        torch.testing.assert_close(other, loss, rtol=1e-5 if exact else 1e-2, atol=0.0)
        for one, two in zip(found, wanted, strict=True):
            # Of a random model's gradients the largest count: they are differences of nearly equal numbers.
            assert float((one - two).norm() / two.norm()) < (1e-4 if exact else 2e-2)


def peak_above(function: Callable[[], Any], device: str) -> int | None:
    """Bytes that the function needs at its peak beyond what is there before; None where that cannot be measured."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except OSError:
        return None
    before = _status("VmHWM")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def counted(function: Callable[[Case], Any], sizes: dict[str, int], dtype: torch.dtype) -> int:
    """Peak bytes of a function, from the operations that it runs on tensors without content."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks.live_bytes import LiveBytes

    with FakeTensorMode():
        case = Case.make(**sizes, device="cpu", dtype=dtype)  # a backward of fake CUDA tensors needs a driver
        live = LiveBytes()
        live.know(*case.tensors())
        with live:
            function(case)
    return live.peak


def full_vocabulary(*chunks: int) -> dict[str, Any]:
    """Peak bytes at the published sizes, bf16 with fp32 main_grad: naive, and fused as on a GPU by rows of a chunk."""
    import torch

    from megatron_slim.distillation import fused as module

    whole = counted(naive, FULL, torch.bfloat16)
    with mock.patch.object(module, "block_rows", lambda layer: sys.maxsize):  # blocks within a chunk are the CPU's
        found = {chunk: counted(partial(fused, chunk=chunk), FULL, torch.bfloat16) for chunk in chunks}
    return {
        "memory_over_naive_full_vocab": found[chunks[0]] / whole,
        "full_vocab_bytes": {"naive": whole, **{f"fused_chunk_{chunk}": size for chunk, size in found.items()}},
    }


def liger(case: Case) -> dict[str, Callable[[], Any]] | None:
    """Liger's fused linear distillation loss and ours, on the case that both have: one head, cross entropy and JSD."""
    import torch

    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    from megatron_slim.distillation.divergences import KDLoss
    from megatron_slim.distillation.fused import DistillationInputs, Target, default_chunk, fused_losses
    from megatron_slim.distillation.loss_options import JSD
    from megatron_slim.distillation.output_layer import OutputLayer
    from megatron_slim.distillation.vocabulary import VocabShard

    theirs = LigerFusedLinearJSDLoss(weight_hard_loss=LM, weight_soft_loss=KD)

    def run_theirs() -> None:
        loss = theirs(case.hidden[0], case.weight, case.teacher_hidden[0], case.teacher_weight, case.labels[0])
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        case.weight.grad = None

    def run_ours() -> None:
        shard = VocabShard.of(None, *2 * (case.weight.shape[0],))
        labels = case.labels[:1]
        inputs = DistillationInputs(
            labels,
            (Target(case.teacher_hidden[0], ((0, 0),)),),
            OutputLayer(case.teacher_weight, shard),
            KDLoss(JSD),
            default_chunk(labels.device),
        )
        a, b = (torch.full(labels.shape, size / labels.shape[1], device=labels.device) for size in (LM, KD))
        lm, kd, _ = fused_losses(OutputLayer(case.weight, shard), case.hidden[:1], inputs, (a, b))
        (a * lm + b * kd).sum().backward()
        case.weight.grad = None

    return {"liger": run_theirs, "ours": run_ours}


def compare_with_liger(both: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Time what `liger` gave."""
    seconds = medians(both, repeats)
    return {"liger_seconds": seconds, "speedup_over_liger": seconds["liger"] / seconds["ours"]}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    import torch

    from benchmarks.report import machine
    from megatron_slim.errors import SlimError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SlimError("no GPU", where="--device cuda", fix="leave it out")
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    case = Case.make(args.tokens, args.vocab, args.hidden, args.teacher_hidden, args.device, dtype)
    same_results(case, args.chunk)
    ways: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(case),
        "fused": lambda: fused(case, args.chunk),
        "fused_teacher_main": lambda: fused(case, args.chunk, main=True),
        "plain_ce": lambda: naive(case, distil=False),
        "fused_ce": lambda: fused(case, args.chunk, distil=False),
    }
    memory = {name: peak_above(function, args.device) for name, function in ways.items()}
    seconds = medians(ways, args.repeats)
    results: dict[str, Any] = {
        "time_over_naive": seconds["fused"] / seconds["naive"],
        "time_over_naive_teacher_main": seconds["fused_teacher_main"] / seconds["naive"],
        "time_over_plain_ce": seconds["fused"] / seconds["plain_ce"],
        "time_over_plain_ce_teacher_main": seconds["fused_teacher_main"] / seconds["plain_ce"],
        "ce_time_over_plain_ce": seconds["fused_ce"] / seconds["plain_ce"],
    }
    if memory["naive"] and memory["fused"] is not None:  # 0 where what was freed before is enough: tiny cases
        results["memory_over_naive"] = memory["fused"] / memory["naive"]
    results |= full_vocabulary(*COUNTED_CHUNKS)
    if args.no_liger:
        results["liger"] = "not compared"
    elif both := liger(case):
        results |= compare_with_liger(both, args.repeats)
    else:
        results["liger"] = "not installed: not compared"
    if not args.json:
        for name, value in results.items():
            print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
        for name, value in seconds.items():
            peak = memory[name]
            print(f"{name}: {value:.3f} s" + (f", {peak / 1e6:.0f} MB" if peak is not None else ""))
    where = {"threads": torch.get_num_threads(), "machine": machine(Path())}
    return {**results, "seconds": seconds, "peak_bytes": memory, "device": args.device, **where}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
