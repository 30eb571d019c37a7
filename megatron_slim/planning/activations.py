"""Bytes that a forward pass keeps for backward, counted tensor by tensor (no torch).

`FUSED` kernels are Transformer Engine's, flash attention's and flash-linear-attention's, read from their sources;
`TORCH` are the plain modules of a CPU, where tests count what autograd really saves. Tensor parallelism comes with
sequence parallelism, so that every rank keeps 1 / tp of everything. Routed tokens are split evenly.

What the kinds of attention and feed-forward networks keep is in `architecture.kinds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slim.architecture.family import MTP_SUBLAYERS
from megatron_slim.architecture.flops import FUSED, Kernels, Recompute
from megatron_slim.architecture.kinds import FEED_FORWARD, SUBLAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.sublayer_kind import FP32

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


def norm_bytes(shape: ModelShape, of: Pass) -> float:
    """What the norm before a sublayer keeps, which is outside of what ``moe`` recomputes."""
    return of.share * _norm_and_output(shape.hidden_size, of)


def sublayer_bytes(shape: ModelShape, kind: str, of: Pass) -> float:
    """What a sublayer keeps behind its norm."""
    return of.share * SUBLAYERS[kind].kept(shape, of)


def block_bytes(shape: ModelShape, kinds: Sequence[str], of: Pass, recompute: Recompute = NOTHING) -> float:
    """What a transformer block keeps.

    Args:
        shape: sizes of the model.
        kinds: of the block's sublayers.
        of: the micro-batch.
        recompute: full, only the block's input is left; of modules, ``moe`` is counted.
    """
    if recompute.granularity == "full":
        return of.share * of.width * shape.hidden_size
    again = [name for name, kind in FEED_FORWARD.items() if kind.is_routed] if "moe" in recompute.modules else []
    kept = (kind for kind in kinds if kind not in again)
    return len(kinds) * norm_bytes(shape, of) + sum(sublayer_bytes(shape, kind, of) for kind in kept)


def mtp_bytes(shape: ModelShape, of: Pass, recompute: Recompute = NOTHING) -> float:
    """What an MTP block keeps: two norms, their outputs side by side, a block of full attention, a norm."""
    if recompute.granularity == "full":
        return of.share * of.width * 2 * shape.hidden_size
    joined = 2 * of.width * shape.hidden_size
    norms = 3 * _norm(shape.hidden_size, of)
    return of.share * (norms + joined) + block_bytes(shape, MTP_SUBLAYERS, of, recompute)


def stage_bytes(
    shape: ModelShape, start: int, stop: int, of: Pass, recompute: Recompute = NOTHING, *, is_last: bool
) -> float:
    """What the layers from ``start`` up to ``stop`` keep of one micro-batch, heads left out."""
    blocks = shape.sublayers[start:stop]
    each = {kinds: block_bytes(shape, kinds, of, recompute) for kinds in set(blocks)}
    found = sum(each[kinds] for kinds in blocks)
    if is_last:
        found += of.share * _norm(shape.hidden_size, of)
        found += shape.mtp_num_layers * mtp_bytes(shape, of, recompute)
    return found


def largest_block_bytes(shape: ModelShape, of: Pass) -> float:
    """Of the block that keeps most: what a forward pass without gradients, or the backward pass, has in use at once."""
    return max(block_bytes(shape, kinds, of) for kinds in set(shape.sublayers))
