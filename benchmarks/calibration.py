#!/usr/bin/env python3
"""Measure calibration against computing every expert on every token, bare GEMMs, and a loop over pairs of experts.

Both sides of every ratio are timed in turns, in one process, on the same random values, and must give the same numbers.
What the published 80B model takes on one H200 is estimated from counted operations; --published-layers times its layers
on this machine, GPU or not, and says what the model takes here. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser

BLOCK = "model.layers.0"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--experts", type=positive, default=512, help="experts of the MoE layer")
    parser.add_argument("--topk", type=positive, default=10, help="experts of a token")
    parser.add_argument("--hidden-size", type=positive, default=1024, help="half of the published 2048")
    parser.add_argument("--ffn-size", type=positive, default=256, help="of an expert, half of the published 512")
    parser.add_argument("--tokens", type=positive, default=2048, help="in one forward pass of the layer")
    parser.add_argument("--logit-tokens", type=positive, default=8192, help="over which router logits are compared")
    parser.add_argument("--vector-size", type=positive, default=2048, help="of the expert vectors that are compared")
    parser.add_argument("--repeats", type=positive, default=3, help="timed rounds; medians are reported")
    parser.add_argument(
        "--published-layers",
        action="store_true",
        help="only time one layer of each kind at the published sizes on this machine (7 GB on a CPU)",
    )
    parser.add_argument("--layer-tokens", type=positive, default=4096, help="of the one sample that goes through them")
    return parser.parse_args(argv)


def medians(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of every function, run in turns after one round that is not timed, until the GPU is done too."""
    import torch

    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, function in contestants.items():
            started = time.perf_counter()
            function()
            finish()
            if number:
                samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in samples.items()}


def moe_layer(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A layer of random weights, its model's shape, and the generator of the weights."""
    import torch
    from megatron.core.transformer.spec_utils import build_module

    from benchmarks.models import PUBLISHED, shape_of
    from megatron_slim.architecture.layer_specs import layer_spec
    from megatron_slim.streaming.block import block_config

    sizes = {"hidden_size": args.hidden_size, "num_experts": args.experts, "num_experts_per_tok": args.topk}
    shape = shape_of(PUBLISHED | sizes | {"moe_intermediate_size": args.ffn_size})
    config = block_config(shape, torch.float32)
    layer = build_module(layer_spec(shape.sublayers_of(BLOCK), config), config=config, layer_number=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.mlp.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return layer, shape, generator


def expert_pass(args: argparse.Namespace) -> dict[str, Any]:
    """A layer with everything that calibration listens to, against all experts on all tokens."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from megatron_slim.pruning.importance import block_statistics
    from megatron_slim.pruning.recorder import BlockRecorder
    from megatron_slim.pruning.statistics import importance_key

    layer, shape, generator = moe_layer(args)
    hidden = torch.randn(args.tokens, 1, args.hidden_size, generator=generator)
    found: dict[str, Any] = {}

    def ours() -> None:
        recorder = BlockRecorder(BLOCK, shape, layer)
        layer.mlp(hidden)
        recorder.sums["tokens"] += args.tokens  # counted by the layer, of which only the experts run here
        results = dict(block_statistics(BLOCK, shape, recorder.sums, layer.mlp.router.weight))
        found["ours"] = results[importance_key(BLOCK, "reap")]
        for module in layer.modules():  # or the next round would be listened to twice
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    def every_expert() -> None:
        x = hidden[:, 0]
        logits = x @ layer.mlp.router.weight.T
        chosen = logits.topk(args.topk)
        gates = torch.zeros_like(logits).scatter_(1, chosen.indices, chosen.values.softmax(-1))
        saliency = torch.zeros(args.experts)
        for number, expert in enumerate(layer.mlp.experts.local_experts):
            gate, up = (x @ expert.linear_fc1.weight.T).chunk(2, dim=-1)
            output = (F.silu(gate) * up) @ expert.linear_fc2.weight.T
            active = gates[:, number] > 0
            saliency[number] = (gates[:, number] * output.norm(dim=-1)).sum() / active.sum().clamp(min=1)
        found["every"] = saliency.numpy()

    seconds = medians({"package": ours, "every_expert": every_expert}, args.repeats)
    np.testing.assert_allclose(found["ours"], found["every"], rtol=1e-5)
    return {"speedup_over_all_experts": seconds["every_expert"] / seconds["package"], "expert_pass_seconds": seconds}


def similarities(args: argparse.Namespace) -> dict[str, Any]:
    """Cosines of router logits and of expert vectors, against their bare GEMMs and against a loop over pairs."""
    import torch
    import torch.nn.functional as F

    from megatron_slim.expert_metrics import cosine_from_gram, cosine_matrix

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(args.logit_tokens, args.experts, generator=generator, dtype=torch.float64)
    vectors = torch.randn(args.experts, args.vector_size, generator=generator, dtype=torch.float64)
    columns = logits.T.contiguous()
    found: dict[str, Any] = {}

    def package() -> None:
        found["package"] = cosine_from_gram(logits.T @ logits), cosine_matrix(vectors)

    def gemm() -> None:
        found["gemm"] = logits.T @ logits, vectors @ vectors.T

    def pair_loop() -> None:
        matrices = torch.eye(args.experts, dtype=torch.float64), torch.eye(args.experts, dtype=torch.float64)
        for matrix, rows in zip(matrices, (columns, vectors), strict=True):
            for i in range(args.experts):
                for j in range(i):
                    matrix[i, j] = matrix[j, i] = F.cosine_similarity(rows[i], rows[j], dim=0)
        found["loop"] = matrices

    seconds = medians({"package": package, "gemm": gemm}, 4 * args.repeats)
    seconds |= medians({"package_beside_loop": package, "pair_loop": pair_loop}, 1)
    for one, other in zip(found["package"], found["loop"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    return {
        "similarity_over_gemm": seconds["package"] / seconds["gemm"],
        "speedup_over_pair_loop": seconds["pair_loop"] / seconds["package_beside_loop"],
        "similarity_seconds": seconds,
    }


def published_layers(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Seconds of a layer of each kind with everything that calibration listens to, and of the whole model from them.

    Args:
        args: the command line.
        changes: keys of config.json that are not to be the published ones.
    """
    import torch
    from megatron.core.transformer.spec_utils import build_module

    from benchmarks.models import PUBLISHED, model_bytes, shape_of
    from megatron_slim.architecture.layer_specs import layer_spec
    from megatron_slim.compat.runtime import default_dtype
    from megatron_slim.planning.preparation import ASSUMED
    from megatron_slim.pruning.recorder import BlockRecorder
    from megatron_slim.streaming.block import block_config, rotary_embedding
    from megatron_slim.streaming.samples import NUM_SAMPLES, SEQ_LENGTH

    shape, dtype, device = shape_of(PUBLISHED | changes), default_dtype(), torch.device(torch.cuda.current_device())
    config, rotary = block_config(shape, dtype), rotary_embedding(shape, args.layer_tokens)
    hidden = torch.randn(args.layer_tokens, 1, shape.hidden_size, dtype=dtype, device=device)
    seconds: dict[str, float] = {}
    for kinds, block in {shape.sublayers_of(block): block for block in shape.blocks}.items():
        layer = build_module(layer_spec(kinds, config), config=config, layer_number=1).cuda().eval()
        for parameter in layer.parameters():
            parameter.normal_(0, max(parameter.shape) ** -0.5)

        def one_pass(block: str = block, layer: Any = layer) -> None:
            BlockRecorder(block, shape, layer)
            layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            for module in layer.modules():  # or the next round would be listened to twice
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()

        seconds |= medians({"/".join(kinds): one_pass}, args.repeats)
        del layer, one_pass
    passes = NUM_SAMPLES * SEQ_LENGTH / args.layer_tokens
    computing = passes * sum(seconds["/".join(shape.sublayers_of(block))] for block in shape.blocks)
    reading = model_bytes(shape) / ASSUMED["disk_bytes_per_second"]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"measured_80b_minutes": (computing + reading) / 60, "layer_seconds": seconds, "device": name}


def estimate() -> dict[str, Any]:
    """The published model on one H200: minutes and host memory, with everything that went into them."""
    from megatron_slim.architecture.published import QWEN3_NEXT_80A3B
    from megatron_slim.planning.preparation import ASSUMED, calibration

    found = calibration(QWEN3_NEXT_80A3B.shape)
    return {
        "estimate_80b_minutes": found.minutes,
        "estimate_80b_host_gib": found.host,
        "estimate_80b_host_gib_with_work_dir": found.host_with_work_dir,
        "estimate_80b": {
            "flops": found.flops,
            "seconds": found.seconds,
            "host_gib": found.host_gib,
            "assumed": ASSUMED,
        },
    }


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, estimate and report."""
    import megatron_slim.mcore

    import torch

    from megatron_slim.compat import runtime

    runtime.init_single_process()
    with torch.no_grad():
        if args.published_layers:
            results = published_layers(args)
        else:
            results = expert_pass(args) | similarities(args) | estimate()
    if not args.json:
        for name, value in results.items():
            if isinstance(value, float):
                print(f"{name}: {value:.3g}")
    return {**results, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: benchmark(arguments), as_json=arguments.json)
