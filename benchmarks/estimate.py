"""Calibrating the published 80B model on one H200: counted operations over assumed rates, not a measurement."""

from __future__ import annotations

from typing import Any

from megatron_slim.architecture.flops import block_flops
from megatron_slim.architecture.shape import ModelShape

SAMPLES, SEQ_LENGTH = 1024, 4096
# Assumptions. Peaks are those of an H200 (bf16 dense, fp64 tensor cores, HBM3e); the shares of them are guesses.
RATES = {
    "bf16_flops_per_second": 989e12,
    "bf16_share_of_peak": 0.35,
    "fp64_flops_per_second": 67e12,
    "fp64_share_of_peak": 0.5,
    "memory_bytes_per_second": 4.8e12,
    "memory_share_of_peak": 0.5,
    "disk_bytes_per_second": 3e9,
    "host_gib_of_interpreter_and_cuda": 4.0,
}


def flops_per_token(shape: ModelShape) -> dict[str, float]:
    """Multiplications and additions of a forward pass per token; embedding, norms and the heads are left out."""
    found = dict.fromkeys(("projections", "routed", "shared_and_router", "attention", "delta_rule"), 0.0)
    for block in shape.blocks:
        flops = block_flops(shape, shape.layer_type(block), SEQ_LENGTH)
        found["projections"] += flops["projections"]
        found["routed"] += flops["experts"]
        found["shared_and_router"] += flops["shared_experts"] + flops["router"]
        found["attention"] += flops.get("core_attn", 0.0)
        found["delta_rule"] += flops.get("delta_rule", 0.0)
    return found


def estimate(shape: ModelShape, model_bytes: int) -> dict[str, Any]:
    """Minutes and host memory, with everything that went into them; nothing is assumed to overlap."""
    tokens, blocks = SAMPLES * SEQ_LENGTH, len(list(shape.blocks))
    flops = {name: tokens * each for name, each in flops_per_token(shape).items()}
    gram = 2.0 * tokens * blocks * shape.num_moe_experts**2
    # Every routed output is read in bf16, and written and read twice in fp64.
    traffic = tokens * blocks * shape.moe_router_topk * shape.hidden_size * (2 + 3 * 8)
    seconds = {
        "forward": sum(flops.values()) / (RATES["bf16_flops_per_second"] * RATES["bf16_share_of_peak"]),
        "gram_of_router_logits": gram / (RATES["fp64_flops_per_second"] * RATES["fp64_share_of_peak"]),
        "sums_over_expert_outputs": traffic / (RATES["memory_bytes_per_second"] * RATES["memory_share_of_peak"]),
        "reading_weights": model_bytes / RATES["disk_bytes_per_second"],
    }
    gib = {
        "hidden_states": tokens * shape.hidden_size * 2 / 2**30,  # on the GPU where there is room, else here
        "embedding": shape.vocab_size * shape.hidden_size * 2 / 2**30,
        "token_ids": tokens * 8 / 2**30,
        "statistics": 4 * blocks * 4 * shape.num_moe_experts**2 / 2**30,
        "interpreter_and_cuda": RATES["host_gib_of_interpreter_and_cuda"],
    }
    return {
        "estimate_80b_minutes": sum(seconds.values()) / 60,
        "estimate_80b_host_gib": sum(gib.values()),
        "estimate_80b_host_gib_with_work_dir": sum(gib.values()) - gib["hidden_states"],
        "estimate_80b": {"flops": flops, "seconds": seconds, "host_gib": gib, "assumed": RATES},
    }
