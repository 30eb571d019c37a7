"""What comes before training: time and memory of calibration and conversion, estimated (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.architecture.flops import block_flops
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import BF16_BYTES, count_parameters
from megatron_slim.planning.hardware import GIB, GPUS, Gpu
from megatron_slim.streaming.samples import NUM_SAMPLES, SEQ_LENGTH

# Shares of the GPU's peaks are guesses, and so are the others.
ASSUMED = {
    "bf16_share_of_peak": 0.35,
    "fp64_share_of_peak": 0.5,
    "memory_share_of_peak": 0.5,
    "disk_bytes_per_second": 3e9,
    "host_gib_of_interpreter_and_cuda": 4.0,
}
# Measured on 2 cores over the published 80B layout (docs/benchmarks.md): seconds for each GB of the source, verified,
# and GB of memory at the peak, which does not grow with the model.
CONVERSION = {
    "convert to torch_dist": (364 / 162.6, 1.03),
    "prune to Hugging Face": (138 / 162.6, 0.80),
    "prune to torch_dist": (180 / 162.6, 0.92),
}


@dataclass(frozen=True)
class Calibration:
    """A pass of `NUM_SAMPLES` samples over a model, one block at a time on one GPU; nothing is assumed to overlap.

    Attributes:
        flops: operations of the forward pass by what does them.
        seconds: by what takes them.
        host_gib: memory of the host by what fills it.
        gpu_gib: memory of the GPU: a block, its sums, and the activations of a sample.
    """

    flops: dict[str, float]
    seconds: dict[str, float]
    host_gib: dict[str, float]
    gpu_gib: float

    @property
    def minutes(self) -> float:
        """In all."""
        return sum(self.seconds.values()) / 60

    @property
    def host(self) -> float:
        """GiB of the host in all."""
        return sum(self.host_gib.values())

    @property
    def host_with_work_dir(self) -> float:
        """The same with hidden states in files."""
        return self.host - self.host_gib["hidden_states"]


def flops_per_token(shape: ModelShape) -> dict[str, float]:
    """Multiplications and additions of a forward pass per token; embedding, norms and the heads are left out."""
    found = dict.fromkeys(("projections", "routed", "shared_and_router", "attention", "delta_rule"), 0.0)
    for block in shape.blocks:
        flops = block_flops(shape, shape.sublayers_of(block), SEQ_LENGTH)
        found["projections"] += flops["projections"]
        found["routed"] += flops.get("experts", 0.0)
        found["shared_and_router"] += sum(flops.get(name, 0.0) for name in ("shared_experts", "router", "mlp"))
        found["attention"] += flops.get("core_attn", 0.0)
        found["delta_rule"] += flops.get("delta_rule", 0.0)
    return found


def calibration(shape: ModelShape, gpu: Gpu = GPUS["h200"]) -> Calibration:
    """Time and memory of ``megatron-slim calibrate`` on one GPU: counted work over assumed rates, not a measurement."""
    tokens, blocks, experts = NUM_SAMPLES * SEQ_LENGTH, len(list(shape.blocks)), shape.num_moe_experts
    nbytes = BF16_BYTES * count_parameters(shape).total
    flops = {name: tokens * each for name, each in flops_per_token(shape).items()}
    gram = 2.0 * tokens * blocks * experts**2
    # Every routed output is read in bf16, and written and read twice in fp64.
    routed = SEQ_LENGTH * shape.moe_router_topk * shape.hidden_size
    traffic = NUM_SAMPLES * blocks * routed * (2 + 3 * 8)
    seconds = {
        "forward": sum(flops.values()) / (gpu.bf16 * ASSUMED["bf16_share_of_peak"]),
        "gram_of_router_logits": gram / (gpu.fp64 * ASSUMED["fp64_share_of_peak"]),
        "sums_over_expert_outputs": traffic / (gpu.hbm * ASSUMED["memory_share_of_peak"]),
        "reading_weights": nbytes / ASSUMED["disk_bytes_per_second"],
    }
    host = {
        "hidden_states": tokens * shape.hidden_size * BF16_BYTES / GIB,  # on the GPU where there is memory, else here
        "embedding": shape.vocab_size * shape.hidden_size * BF16_BYTES / GIB,
        "token_ids": tokens * 8 / GIB,
        "statistics": 4 * blocks * 4 * experts**2 / GIB,
        "interpreter_and_cuda": ASSUMED["host_gib_of_interpreter_and_cuda"],
    }
    block = nbytes / blocks + routed * (2 + 8) + 8 * experts * (2 * experts + shape.hidden_size)
    return Calibration(flops, seconds, host, block / GIB)


def conversion(shape: ModelShape) -> dict[str, dict[str, float]]:
    """Minutes and GB of memory of each way to convert or prune a model of this size, as measured on 2 cores."""
    gigabytes = BF16_BYTES * count_parameters(shape).total / 1e9
    return {
        name: {"minutes": seconds * gigabytes / 60, "host_gb": memory, "source_gb": gigabytes}
        for name, (seconds, memory) in CONVERSION.items()
    }
