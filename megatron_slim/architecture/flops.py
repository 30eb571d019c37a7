"""Multiplications and additions of a model per token, counted from the architecture table (no torch).

A matrix of n elements costs 2 n operations a token forward, and twice that backward (one product for the input's
gradient, one for the weight's). Norms, activations, softmax, the convolution of single channels and the embedding's
lookup are left out: a few operations a number, where every product costs a few thousand. What does not follow from the
table are the two products of full attention, which grow with the sequence, and the gated delta rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate

from megatron_slim.architecture.family import MTP_SUBLAYERS
from megatron_slim.architecture.kinds import SUBLAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.sublayer_kind import Kernels as Kernels
from megatron_slim.architecture.table import rows_of
from megatron_slim.architecture.weight import Weight

# Transformer Engine and flash-linear-attention; our modules on a CPU; on a GPU, where attention is Megatron's own.
FUSED = Kernels(delta_rule_chunk=64, solves_keys=True, skips_masked=True, transformer_engine=True)
TORCH = Kernels(delta_rule_chunk=32, solves_keys=False, skips_masked=True, transformer_engine=False)
TORCH_ON_GPU = replace(TORCH, skips_masked=False)


def products(rows: Iterable[Weight], shape: ModelShape) -> float:
    """Operations of the rows that are matrices; of the routed experts, those that a token visits."""
    total = 0.0
    for row in rows:
        if len(row.dims) > 1 and "conv1d" not in row.key:
            visited = shape.moe_router_topk / shape.num_moe_experts if row.stacked else 1.0
            total += 2.0 * row.numel(shape) * visited
    return total


def block_flops(shape: ModelShape, kinds: Iterable[str], seq_length: int, kernels: Kernels = FUSED) -> dict[str, float]:
    """Forward operations per token of one transformer block, by what does them.

    Args:
        shape: sizes of the model.
        kinds: of the block's sublayers.
        seq_length: positions of a sequence, which attention's share grows with.
        kernels: how attention and delta rule are computed.

    Returns:
        ``projections`` of attention or Gated DeltaNet, ``core_attn`` or ``delta_rule`` between them; ``router``,
        ``experts``, ``shared_experts``, or ``mlp`` of a dense block.
    """
    found: dict[str, float] = {}
    for kind in kinds:
        parts = SUBLAYERS[kind].parts(rows_of(shape, kind))
        found |= {name: products(rows, shape) for name, rows in parts.items()}
        found |= SUBLAYERS[kind].operations(shape, seq_length, kernels)
    return found


def head_flops(shape: ModelShape) -> float:
    """Forward operations per token of the output layer, once."""
    return products(shape.family.last_rows, shape)


def mtp_flops(shape: ModelShape) -> float:
    """Forward operations per token of what an MTP block adds to its transformer block and the output layer."""
    return products(shape.family.mtp_rows, shape)


@dataclass(frozen=True)
class Recompute:
    """Megatron's options of recomputation, by the names of `TransformerConfig`."""

    granularity: str | None = None
    method: str | None = None
    num_layers: int = 1
    modules: tuple[str, ...] = ()

    def again(self, block: dict[str, float]) -> float:
        """Operations of a block that the backward pass repeats."""
        if self.granularity == "full":
            return sum(block.values())
        if self.granularity != "selective":
            return 0.0
        parts = set(self.modules) | ({"router", "experts", "shared_experts"} if "moe" in self.modules else set())
        return sum(flops for name, flops in block.items() if name in parts)


@dataclass(frozen=True)
class Flops:
    """Operations per token of one training step of one model, as pipeline stages share them.

    Attributes:
        layers: of each decoder layer.
        first_layers: what is added for each layer that is among the first ``first`` of its stage.
        first: for how many layers of a stage.
        last: of what stays on the last stage: heads and MTP blocks.
    """

    layers: tuple[float, ...]
    last: float
    first_layers: tuple[float, ...] = ()
    first: int = 0

    @property
    def total(self) -> float:
        """Of the whole model, without ``first_layers``, which depend on the layout."""
        return sum(self.layers) + self.last

    def of_stage(self, start: int, stop: int) -> float:
        """Of the layers from ``start`` up to ``stop`` on one stage."""
        again = min(stop, start + self.first)
        return self.prefix[stop] - self.prefix[start] + self._first_prefix[again] - self._first_prefix[start]

    def stages_from(self, start: int) -> list[float]:
        """`of_stage` of every stage that begins with this layer, from the empty one on."""
        return self._stages[start]

    @cached_property
    def _stages(self) -> list[list[float]]:
        count = len(self.layers)
        return [[self.of_stage(start, stop) for stop in range(start, count + 1)] for start in range(count + 1)]

    @cached_property
    def prefix(self) -> list[float]:
        """Of the first n layers, for every n from 0, without ``first_layers``."""
        return [0.0, *accumulate(self.layers)]

    @cached_property
    def _first_prefix(self) -> list[float]:
        return [0.0, *accumulate(self.first_layers or (0.0,) * len(self.layers))]


def _blocks(shape: ModelShape, seq_length: int, kernels: Kernels) -> Iterator[dict[str, float]]:
    blocks = [(shape.in_block(block), shape.sublayers_of(block)) for block in shape.blocks][: shape.num_layers]
    found = {each: block_flops(*each, seq_length, kernels) for each in set(blocks)}
    return (found[each] for each in blocks)


@cache
def student_flops(
    shape: ModelShape, seq_length: int, kernels: Kernels = FUSED, recompute: Recompute = Recompute()
) -> Flops:
    """Forward and backward, three times the forward operations, and what is recomputed.

    Args:
        shape: sizes of the student.
        seq_length: positions of a sequence.
        kernels: how attention and delta rule are computed.
        recompute: what the backward pass computes again. MTP blocks know no method "block" (Megatron skips them).
    """
    blocks = list(_blocks(shape, seq_length, kernels))
    again = tuple(recompute.again(block) for block in blocks)
    by_block = recompute.granularity == "full" and recompute.method == "block"
    mtp_block = block_flops(shape, MTP_SUBLAYERS, seq_length, kernels)
    projection = mtp_flops(shape)
    mtp = 3.0 * (projection + sum(mtp_block.values()))
    if not by_block:  # under full recomputation the projection is inside the checkpoint
        mtp += recompute.again(mtp_block) + (projection if recompute.granularity == "full" else 0.0)
    depths = shape.mtp_num_layers
    last = 3.0 * head_flops(shape) * (1 + depths) + depths * mtp
    thrice = tuple(3.0 * sum(block.values()) for block in blocks)
    if by_block:
        return Flops(thrice, last, first_layers=again, first=recompute.num_layers)
    return Flops(tuple(once + more for once, more in zip(thrice, again, strict=True)), last)


@cache
def teacher_flops(shape: ModelShape, seq_length: int, kernels: Kernels = FUSED, *, runs_mtp: bool) -> Flops:
    """The forward pass alone.

    Args:
        shape: sizes of the teacher.
        seq_length: positions of a sequence.
        kernels: how attention and delta rule are computed.
        runs_mtp: the student's MTP heads are supervised by the teacher's, and not by its main head.
    """
    depths = shape.mtp_num_layers if runs_mtp else 0
    mtp = mtp_flops(shape) + sum(block_flops(shape, MTP_SUBLAYERS, seq_length, kernels).values())
    layers = tuple(sum(block.values()) for block in _blocks(shape, seq_length, kernels))
    return Flops(layers, head_flops(shape) * (1 + depths) + depths * mtp)
