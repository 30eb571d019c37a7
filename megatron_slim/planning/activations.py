"""Bytes that a forward pass keeps for backward, counted tensor by tensor (no torch).

`FUSED` kernels are Transformer Engine's, flash attention's and flash-linear-attention's, read from their sources;
`TORCH` are the plain modules of a CPU, where tests count what autograd really saves. Tensor parallelism comes with
sequence parallelism, so that every rank keeps 1 / tp of everything. Routed tokens are split evenly.

Letters: h hidden, f hidden neurons of an expert. What a kind of attention keeps is in `architecture.kinds`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.architecture.attention_kind import FP32
from megatron_slim.architecture.flops import FUSED, Kernels, Recompute
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import FULL_ATTENTION, ModelShape

INDEX = 8  # int64
NOTHING = Recompute()


@dataclass(frozen=True)
class Pass:
    """One micro-batch on one rank.

    Attributes:
        seq_length: tokens of a sample.
        samples: of the micro-batch.
        tp: tensor parallel size.
        width: bytes of an activation.
        kernels: `FUSED` or `TORCH`.
        imbalance: routed tokens of the rank with most of them over the mean.
    """

    seq_length: int
    samples: int = 1
    tp: int = 1
    width: int = 2
    kernels: Kernels = FUSED
    imbalance: float = 1.0

    @property
    def share(self) -> float:
        """Tokens over tp."""
        return self.seq_length * self.samples / self.tp

    @property
    def fused(self) -> bool:
        """Norms and attention of a GPU."""
        return self.kernels.transformer_engine


def _norm(size: float, of: Pass) -> float:
    """A norm over ``size`` keeps its input and the root."""
    return of.width * size + FP32


def _norm_and_output(size: float, of: Pass) -> float:
    """A norm whose output is kept too, by what it goes into."""
    return _norm(size, of) + of.width * size


def attention_bytes(shape: ModelShape, kind: str, of: Pass) -> float:
    """What attention or Gated DeltaNet keeps, its norm included."""
    return of.share * (_norm_and_output(shape.hidden_size, of) + KINDS[kind].kept(shape, of))


def moe_norm_bytes(shape: ModelShape, of: Pass) -> float:
    """What the norm before the experts keeps, which is outside of what ``moe`` recomputes."""
    return of.share * _norm_and_output(shape.hidden_size, of)


def moe_bytes(shape: ModelShape, of: Pass) -> float:
    """What router, routed experts and the shared one keep."""
    w, h, f, topk = of.width, shape.hidden_size, shape.moe_ffn_hidden_size, shape.moe_router_topk
    # Scores and their order over all experts (Megatron sorts the whole routing map), and the choice.
    router = (FP32 + INDEX) * shape.num_moe_experts + topk * (FP32 + 3 * INDEX)
    # A gated MLP keeps [gate; up] and their product; unfused, as our shared expert, also the silu and the other factor.
    routed = topk * (w * h + FP32 + w * f * 3) * of.imbalance
    shared = 0.0
    if ffn := shape.moe_shared_expert_intermediate_size:
        shared = w * ffn * (3 if of.fused else 5) + w * (h + 1)
    return of.share * (router + routed + shared)


def block_bytes(shape: ModelShape, kind: str, of: Pass, recompute: Recompute = NOTHING) -> float:
    """What a transformer block keeps.

    Args:
        shape: sizes of the model.
        kind: the block's layer type.
        of: the micro-batch.
        recompute: full, only the block's input is left; of modules, ``moe`` is counted.
    """
    if recompute.granularity == "full":
        return of.share * of.width * shape.hidden_size
    moe = 0.0 if "moe" in recompute.modules else moe_bytes(shape, of)
    return attention_bytes(shape, kind, of) + moe_norm_bytes(shape, of) + moe


def mtp_bytes(shape: ModelShape, of: Pass, recompute: Recompute = NOTHING) -> float:
    """What an MTP block keeps: two norms, their outputs side by side, a block of full attention, a norm."""
    if recompute.granularity == "full":
        return of.share * of.width * 2 * shape.hidden_size
    joined = 2 * of.width * shape.hidden_size
    norms = 3 * _norm(shape.hidden_size, of)
    return of.share * (norms + joined) + block_bytes(shape, FULL_ATTENTION, of, recompute)


def stage_bytes(
    shape: ModelShape, start: int, stop: int, of: Pass, recompute: Recompute = NOTHING, *, is_last: bool
) -> float:
    """What the layers from ``start`` up to ``stop`` keep of one micro-batch, heads left out."""
    kinds = {kind: block_bytes(shape, kind, of, recompute) for kind in set(shape.layer_types[start:stop])}
    found = sum(kinds[kind] for kind in shape.layer_types[start:stop])
    if is_last:
        found += of.share * _norm(shape.hidden_size, of)
        found += shape.mtp_num_layers * mtp_bytes(shape, of, recompute)
    return found


def largest_block_bytes(shape: ModelShape, of: Pass) -> float:
    """Of the block that keeps most: what a forward pass without gradients, or the backward pass, has in use at once."""
    return max(block_bytes(shape, kind, of) for kind in set(shape.layer_types))
