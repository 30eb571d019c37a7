#!/usr/bin/env python3
"""Measure the gated delta rule in plain PyTorch against Megatron's and transformers', and all against fp64.

Forward and backward of all three are timed in turns, in one process, on the same values. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.calibration import medians
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from torch import Tensor

    Rule = Callable[..., tuple[Tensor, Tensor | None]]
OURS, MEGATRON, TRANSFORMERS, FLA = "package", "megatron", "transformers", "fla"
# Samples, positions, key heads, value heads, head dimension: as published, a fourth of that, as `kd_step.py` and the
# demo train.
SIZES = ("batch", "seq_length", "key_heads", "value_heads", "head_dim")
CASES = {
    "published": (1, 2048, 16, 32, 128),
    "fourth": (1, 2048, 4, 8, 128),
    "kd_step": (2, 1024, 16, 32, 16),
    "demo": (8, 256, 2, 4, 32),
}
NAMES = ("output", "d_query", "d_key", "d_value", "d_g", "d_beta")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=positive, default=1, help="samples of the comparison")
    parser.add_argument("--seq-length", type=positive, default=2048, help="of the comparison")
    parser.add_argument(
        "--key-heads", type=positive, default=16, help="as published; each serves equally many value heads"
    )
    parser.add_argument("--value-heads", type=positive, default=32, help="as published")
    parser.add_argument("--head-dim", type=positive, default=128, help="of keys and values, as published")
    parser.add_argument(
        "--error-heads", type=positive, default=4, help="value heads, evenly chosen, compared with fp64"
    )
    parser.add_argument(
        "--scaling-lengths", type=positive, nargs="+", default=[1024, 2048, 4096, 8192], help="of the package alone"
    )
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=[], help="sizes to compare speeds for, besides")
    parser.add_argument("--case-threads", type=positive, nargs="+", default=[1, 2], help="of every case")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="on a GPU in bf16, as training there, and with fla"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds; medians are reported")
    return parser.parse_args(argv)


def inputs(length: int, args: argparse.Namespace) -> list[Tensor]:
    """Query, key, value, g and beta as a Gated DeltaNet makes them, [B, T, H, ...].

    Heads forget at rates from 0.001 to 16 per position, evenly spread in the logarithm: Megatron initialises to 1 to
    16, where a state is gone after a position, which would leave nothing of the recurrence to be measured.
    """
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(args.batch, length, *shape, generator=generator)

    query, key = (
        F.normalize(random(args.key_heads, args.head_dim), dim=-1).repeat_interleave(
            args.value_heads // args.key_heads, dim=2
        )
        for _ in range(2)
    )
    value = random(args.value_heads, args.head_dim)
    g = -torch.logspace(-3, math.log10(16), args.value_heads) * F.softplus(random(args.value_heads) + 1)
    beta = random(args.value_heads).sigmoid()
    if args.device == "cpu":
        return [x.requires_grad_() for x in (query, key, value, g, beta)]
    narrow = [x.to("cuda", torch.bfloat16) for x in (query, key, value, beta)]
    return [x.requires_grad_() for x in (*narrow[:3], g.cuda(), narrow[3])]


def step_by_step(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, None]:
    """The rule as it is defined, a position at a time; 64 positions are recomputed at once in the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def positions(state: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for q, k, v, decay, write in zip(*(part.unbind(1) for part in parts), strict=True):
            state = state * decay.exp()[..., None, None]
            error = v - (state * k[..., None]).sum(-2)
            state = state + k[..., None] * (write[..., None] * error)[..., None, :]
            outputs.append((state * q[..., None]).sum(-2) * q.shape[-1] ** -0.5)
        return torch.stack(outputs, 1), state

    state = query.new_zeros(*query.shape[::2], key.shape[-1], value.shape[-1])
    outputs = []
    for parts in zip(*(x.split(64, 1) for x in (query, key, value, g, beta)), strict=True):
        output, state = checkpoint(positions, state, *parts, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs, 1), None


def rules(device_type: str = "cpu") -> dict[str, Rule]:
    """The implementations that there are, all called as Megatron calls them."""
    import megatron_slim.mcore

    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
    from transformers.models.qwen3_next import modeling_qwen3_next

    from megatron_slim.compat import linear_attention

    # What transformers runs where flash-linear-attention is not there, even if it is.
    theirs = modeling_qwen3_next.torch_chunk_gated_delta_rule
    found: dict[str, Rule] = {
        OURS: linear_attention.chunk_gated_delta_rule,
        MEGATRON: torch_chunk_gated_delta_rule,
        TRANSFORMERS: getattr(theirs, "__wrapped__", theirs),
    }
    if device_type == "cuda":
        with contextlib.suppress(ImportError):
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            found[FLA] = chunk_gated_delta_rule
    return found


def value_and_gradients(rule: Rule, values: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Output, and the gradients of its product with ``weights``."""
    import torch

    query, key, value, g, beta = values
    output, _ = rule(query, key, value, g=g, beta=beta)
    return [output.detach(), *torch.autograd.grad(output, values, weights.to(output.dtype))]


def weights_like(value: Tensor) -> Tensor:
    """Random, and the same for the same shape."""
    import torch

    return torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.device)


def relative_errors(implementations: dict[str, Rule], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Norm of the difference from fp64 over the norm, of the output and of every gradient."""
    stride = max(1, args.value_heads // args.error_heads)
    values = [x[:, :, ::stride].detach().requires_grad_() for x in inputs(args.seq_length, args)]
    weights = weights_like(values[2])
    exact = value_and_gradients(step_by_step, [x.detach().double().requires_grad_() for x in values], weights)
    return {
        name: {
            part: float((found.double() - reference).norm() / reference.norm())
            for part, found, reference in zip(NAMES, value_and_gradients(rule, values, weights), exact, strict=True)
        }
        for name, rule in implementations.items()
    }


def speed(implementations: dict[str, Rule], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of forward and backward, and of our forward alone under `torch.no_grad`."""
    import torch

    values = inputs(args.seq_length, args)
    weights = weights_like(values[2])
    contestants: dict[str, Callable[[], Any]] = {
        name: functools.partial(value_and_gradients, rule, values, weights) for name, rule in implementations.items()
    }
    contestants[f"{OURS}_forward_only"] = lambda: torch.no_grad()(implementations[OURS])(*values)
    return medians(contestants, args.repeats)


def speedups(seconds: dict[str, float]) -> dict[str, float]:
    """Of the package over the other two."""
    return {f"speedup_over_{name}": seconds[name] / seconds[OURS] for name in (MEGATRON, TRANSFORMERS)}


def compare_cases(implementations: dict[str, Rule], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Speeds at every size that was asked for, with every number of threads."""
    import torch

    found = []
    for threads in args.case_threads:
        torch.set_num_threads(threads)
        for name in args.cases:
            sizes = dict(zip(SIZES, CASES[name], strict=True))
            seconds = speed(implementations, argparse.Namespace(**{**vars(args), **sizes}))
            found.append({"case": name, "threads": threads, **sizes, **speedups(seconds), "seconds": seconds})
    torch.set_num_threads(args.threads)
    return found


def backward_scaling(rule: Rule, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of the backward pass at every length, and the power of the length that fits them best."""
    import torch

    values = {length: inputs(length, args) for length in args.scaling_lengths}
    samples: dict[int, list[float]] = {length: [] for length in values}
    for _ in range(args.repeats + 1):  # in turns, so that what drifts on the machine hits every length
        for length, tensors in values.items():
            output, _ = rule(*tensors)
            weights = torch.ones_like(output)
            if output.is_cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            torch.autograd.grad(output, tensors, weights)
            if output.is_cuda:
                torch.cuda.synchronize()
            samples[length].append(time.perf_counter() - started)
    seconds = {length: statistics.median(found[1:]) for length, found in samples.items()}
    x, y = [math.log(length) for length in seconds], [math.log(each) for each in seconds.values()]
    slope = statistics.linear_regression(x, y).slope if len(x) > 1 else None  # of one point there is none
    return {"backward_seconds": {str(length): each for length, each in seconds.items()}, "backward_exponent": slope}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    import torch

    from benchmarks.report import machine

    if args.value_heads % args.key_heads:
        raise SlimError(f"{args.value_heads} value heads over {args.key_heads} key heads", fix="choose a multiple")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SlimError("no GPU", where="--device cuda", fix="leave it out")
    torch.set_num_threads(args.threads)
    implementations = rules(args.device)
    seconds = speed(implementations, args)
    errors = relative_errors(implementations, args)
    results = {
        **speedups(seconds),
        "relative_error": max(errors[OURS].values()),
        **({"fla_speedup_over_package": seconds[OURS] / seconds[FLA]} if FLA in seconds else {}),
        **backward_scaling(implementations[OURS], args),
        **({"cases": compare_cases(implementations, args)} if args.cases else {}),
    }
    if not args.json:
        for name, value in results.items():
            print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    settings = {name: value for name, value in vars(args).items() if type(value) in (int, list)}
    return {**settings, **results, "seconds": seconds, "relative_errors": errors, "machine": machine(Path(__file__))}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
