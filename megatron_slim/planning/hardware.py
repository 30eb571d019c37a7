"""What GPUs offer, and how much of it training gets: the numbers that plans are made of (no torch)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_slim.architecture.gpus import peak_flops
from megatron_slim.errors import SlimError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server and its links, as the vendor's data sheet has them; rates are per second and dense.

    Attributes:
        name: as users know it, which `architecture.gpus` has the peak rate of.
        memory: bytes. Data sheets count 1e9; drivers report up to 7% more, which is left as a margin.
        fp64: matrix operations, on tensor cores.
        hbm: bytes.
        nvlink: bytes in one direction, half of what the data sheet adds up.
        network: bytes in one direction to other nodes, of the one 400 Gb/s adapter that such servers have per GPU.
        per_node: GPUs that NVLink connects.
        source: of these numbers.
    """

    name: str
    memory: float
    fp64: float
    hbm: float
    nvlink: float
    network: float
    per_node: int
    source: str

    @cached_property
    def bf16(self) -> float:
        """Matrix operations in 16 bits."""
        rate = peak_flops(self.name)
        assert rate is not None, self.name
        return rate


GPUS = {
    "h100": Gpu(
        "H100 SXM",
        memory=80e9,
        fp64=67e12,
        hbm=3.35e12,
        nvlink=450e9,
        network=50e9,
        per_node=8,
        source="NVIDIA H100 and DGX H100 data sheets",
    ),
    "h200": Gpu(
        "H200 SXM",
        memory=141e9,
        fp64=67e12,
        hbm=4.8e12,
        nvlink=450e9,
        network=50e9,
        per_node=8,
        source="NVIDIA H200 and DGX H200 data sheets",
    ),
    "b200": Gpu(
        "B200",
        memory=180e9,
        fp64=37e12,
        hbm=7.7e12,
        nvlink=900e9,
        network=50e9,
        per_node=8,
        source="NVIDIA HGX B200 and DGX B200 data sheets",
    ),
}


@dataclass(frozen=True)
class Assumptions:
    """What cannot be counted, each a guess with its reason; ``--assume NAME=VALUE`` replaces one.

    Attributes:
        gemm: share of peak of large dense products: cuBLAS reaches 0.7 to 0.8 on Hopper, narrow ones less.
        grouped_gemm: of the experts' products, many of some hundred rows each.
        attention: of flash attention, forward and backward together.
        delta_rule: of fla's chunked kernels: chunks of 64 fill few tensor cores, the recurrence is serial.
        hbm: share of memory bandwidth that element-wise kernels reach.
        nvlink: share of NVLink that collectives of some ten megabytes reach.
        network: share of the adapters' rate that NCCL reaches between nodes.
        forward_traffic: how often an element-wise byte that is kept for backward crosses memory in the forward pass:
            written once, read once.
        backward_traffic: likewise in the backward pass: gradients are read and written too.
        block_seconds: least time of a block forward: about 80 launches of 5 microseconds, and one wait for how many
            tokens each expert gets. Backward it counts once more.
        overhead_gib: CUDA context, cuBLAS and cuDNN work spaces, NCCL's buffers of some seven communicators.
        fragmentation: share of activations and working memory that the caching allocator loses.
        imbalance: tokens of the expert-parallel rank with most of them over the mean, with load balancing.
        host_link_gb: GB/s between a GPU and the host, in one direction: PCIe 5 with 16 lanes has 64.
        host_memory_gb: GB/s of the host's memory that an optimizer there gets, for each GPU.
    """

    gemm: float = 0.65
    grouped_gemm: float = 0.45
    attention: float = 0.5
    delta_rule: float = 0.15
    hbm: float = 0.7
    nvlink: float = 0.7
    network: float = 0.8
    forward_traffic: float = 2.0
    backward_traffic: float = 4.0
    block_seconds: float = 0.4e-3
    overhead_gib: float = 3.0
    fragmentation: float = 0.05
    imbalance: float = 1.15
    host_link_gb: float = 40.0
    host_memory_gb: float = 100.0


_LIMITS = {"imbalance": (1.0, 100.0), "host_link_gb": (1.0, 1000.0), "host_memory_gb": (1.0, 1000.0)}
SHARES = ("gemm", "grouped_gemm", "attention", "delta_rule", "hbm", "nvlink", "network")


def parse_assumptions(words: Sequence[str]) -> Assumptions:
    """Assumptions with those replaced that ``NAME=VALUE`` words name.

    Raises:
        SlimError: an unknown name, or a value that makes no sense.

    >>> parse_assumptions(["gemm=0.5"]).gemm
    0.5
    """
    names = [field.name for field in dataclasses.fields(Assumptions)]
    changes: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            raise SlimError(f"{word!r} is not the name of an assumption", where="--assume", fix=fix)
        least, most = _LIMITS.get(name, (0.0, 1.0 if name in SHARES else 100.0))
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (name in SHARES and value == 0):
            raise SlimError(f"{word!r} is not a number from {least:g} to {most:g}", where="--assume")
        changes[name] = value
    return dataclasses.replace(Assumptions(), **changes)
