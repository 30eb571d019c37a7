"""What a kind of sublayer declares of itself; everything else asks (imports no torch).

A transformer block is attention of some kind, then a feed-forward network of some kind. Their rows, module specs and
decoders are elsewhere: a family may store the same kind in other tensors, and the latter two need Megatron and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.prunable import Heads, Neurons, PrunableAxis

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape
    from megatron_slim.architecture.weight import Weight

FP32 = 4  # bytes


@dataclass(frozen=True)
class Kernels:
    """How the operations without weights are computed.

    Attributes:
        delta_rule_chunk: positions that the gated delta rule takes at once (arXiv 2412.06464).
        solves_keys: it applies the inverse of a chunk's triangle to keys as to values, so that chunks can be prepared
            before their state is known.
        skips_masked: attention leaves out the half of the scores that the causal mask hides, and keeps none of them.
        transformer_engine: norms and attention are Transformer Engine's.
    """

    delta_rule_chunk: int
    solves_keys: bool
    skips_masked: bool
    transformer_engine: bool


class MicroBatch(Protocol):
    """What decides how much a forward pass keeps; `planning.activations.Pass` has it."""

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""

    @property
    def samples(self) -> int:
        """Of the micro-batch."""

    @property
    def width(self) -> int:
        """Bytes of an activation."""

    @property
    def kernels(self) -> Kernels:
        """How it is computed."""

    @property
    def fused(self) -> bool:
        """Norms and attention of a GPU."""

    @property
    def imbalance(self) -> float:
        """Routed tokens of the rank with most of them over the mean."""


@dataclass(frozen=True)
class Side:
    """A dimension of a linear layer that may be multiplied in FP8.

    Attributes:
        layer: its name.
        field: the size of the shape that would be changed.
        total: inputs or outputs of all ranks.
        inputs: whether they are inputs, which the forward pass sums over.
    """

    layer: str
    field: str
    total: int
    inputs: bool


@dataclass(frozen=True)
class SublayerKind:
    """One kind.

    Attributes:
        name: for `ModelShape.sublayers`; of attention, the layer type in config.json.
        noun: for people.
        parts: its rows, by what does their products.
        operations: forward operations per token without weights, by what does them, of a sequence of so many tokens.
        kept: bytes a token, of all tensor-parallel ranks together, that a forward pass keeps for backward.
        fp8_sides: dimensions of its linear layers, experts apart.
        expert_fp8_sides: those of routed experts.
        config: fields of Megatron's `TransformerConfig`, also of a model that has no such layer.
    """

    name: str
    noun: str
    parts: Callable[[Sequence[Weight]], dict[str, list[Weight]]]
    operations: Callable[[ModelShape, int, Kernels], dict[str, float]]
    kept: Callable[[ModelShape, MicroBatch], float]
    fp8_sides: Callable[[ModelShape], Iterable[Side]]
    expert_fp8_sides: Callable[[ModelShape], Iterable[Side]]
    config: Callable[[ModelShape], Keywords]


@dataclass(frozen=True)
class AttentionKind(SublayerKind):
    """A kind of attention.

    Attributes:
        heads: its axis of heads.
        part: what people call it as a part of a model.
        not_with_documents: options of Megatron that its module refuses where documents do not see each other.
    """

    heads: Heads
    part: str
    not_with_documents: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[PrunableAxis, ...]:
        """What pruning may make smaller."""
        return (self.heads,)


@dataclass(frozen=True)
class FeedForwardKind(SublayerKind):
    """A kind of feed-forward network.

    Attributes:
        neurons: its axis of neurons that all tokens visit.
        routed: its axes of routed experts, none where it has none.
    """

    neurons: Neurons
    routed: tuple[PrunableAxis, ...] = ()

    @property
    def is_routed(self) -> bool:
        """Whether it has routed experts."""
        return bool(self.routed)

    @property
    def axes(self) -> tuple[PrunableAxis, ...]:
        """What pruning may make smaller."""
        return (*self.routed, self.neurons)


def projections(rows: Sequence[Weight]) -> dict[str, list[Weight]]:
    """The parts of attention: all that it has are projections."""
    return {"projections": list(rows)}


def nothing(shape: ModelShape) -> tuple[Side, ...]:
    """What a kind without routed experts has of them."""
    return ()
