"""Rows of an architecture table: one Megatron parameter and the Hugging Face tensors that it is made of.

Labels in the dimension trees say which rows of the one are which rows of the other (see `axes`). Names are templates:
the table of a model (`table`) fills in layers and experts.

Megatron names are those of a torch_dist checkpoint, where experts are stacked on a leading ``expert`` dimension and a
parameter marked ``split`` is stored as one tensor per label (``in_proj.weight.query``, ...), because its rows are
grouped by label inside every tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_slim.architecture.axes import Dim, Sizes, concat, label, size


class SizedModel(Protocol):
    """What rows need of a model's shape (which knows its family, whose rows are made of what is here)."""

    @property
    def num_moe_experts(self) -> int:
        """Routed experts of a block."""
        ...

    @property
    def sizes(self) -> Sizes:
        """Size of every named axis."""
        ...

    def in_block(self, block: str) -> SizedModel:
        """The same of one transformer block, whose experts may be others in number."""
        ...


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face checkpoint.

    Attributes:
        name: its name.
        dims: its dimensions.
        fp8: a linear layer that the published checkpoints in block-scaled FP8 have in FP8.
        block: the transformer block it belongs to, "" outside the blocks.
    """

    name: str
    dims: tuple[Dim, ...]
    fp8: bool = False
    block: str = ""

    def shape(self, model: SizedModel) -> tuple[int, ...]:
        """Its shape in a model of these sizes."""
        sizes = model.in_block(self.block).sizes
        return tuple(size(dim, sizes) for dim in self.dims)


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        key: name in a torch_dist checkpoint, without the label suffix of a ``split`` parameter.
        dims: dimensions of the parameter at tensor parallel size 1; for experts, of one expert.
        sources: the Hugging Face tensors; for experts, names with ``{expert}`` left open.
        tp_dim: the dimension that tensor parallelism shards, None when every rank holds all of it.
        split: stored in a torch_dist checkpoint as one tensor per label.
        stacked: one per expert, stacked on a leading ``expert`` dimension.
        block: the transformer block it belongs to, "" outside the blocks.
        fused: of a stacked parameter, the one tensor in which a file may hold the sources of all experts instead: its
            first dimension is the experts, the second holds the rows of the sources under their labels.
        float32: may be in fp32 in a model of 16 bits: what computes with it does so in fp32, and gives 16 bits.
        when: field of the shape that says whether a model has it; "": all have.
        buffer: not trained, and no parameter of Megatron's, which has it in fp32.
    """

    key: str
    dims: tuple[Dim, ...]
    sources: tuple[HFTensor, ...]
    tp_dim: int | None = None
    split: bool = False
    stacked: bool = False
    block: str = ""
    fused: HFTensor | None = None
    float32: bool = False
    when: str = ""
    buffer: bool = False

    def shape(self, model: SizedModel) -> tuple[int, ...]:
        """Shape of the whole parameter, experts included."""
        block = model.in_block(self.block)
        shape = tuple(size(dim, block.sizes) for dim in self.dims)
        return (block.num_moe_experts, *shape) if self.stacked else shape

    def experts(self, model: SizedModel) -> range | tuple[None]:
        """Numbers of the experts of a stacked parameter; None alone of another."""
        return range(model.in_block(self.block).num_moe_experts) if self.stacked else (None,)

    def numel(self, model: SizedModel) -> int:
        """Number of elements, experts included."""
        total = 1
        for extent in self.shape(model):
            total *= extent
        return total

    def hf_tensors(self, model: SizedModel) -> Iterator[tuple[HFTensor, int | None]]:
        """Its Hugging Face tensors with their names complete, and the expert that each belongs to."""
        for expert in self.experts(model):
            for source in self.sources:
                name = source.name if expert is None else source.name.format(expert=expert)
                yield replace(source, name=name), expert


def copied(
    key: str,
    hf: str,
    *dims: Dim,
    tp_dim: int | None = None,
    float32: bool = False,
    fp8: bool = False,
    when: str = "",
    buffer: bool = False,
) -> Weight:
    """A parameter that has the same layout in both formats."""
    return Weight(key, dims, (HFTensor(hf, dims, fp8=fp8),), tp_dim, float32=float32, when=when, buffer=buffer)


def gated_mlp(key: str, hf: str, ffn: str, *, stacked: bool = False) -> tuple[Weight, Weight]:
    """A SwiGLU MLP: Megatron's fc1 is [gate; up], and so is what transformers fuses experts to."""
    gate, up = label("gate", ffn), label("up", ffn)
    whole = hf.removesuffix(".{expert}")
    return (
        Weight(
            f"{key}.linear_fc1.weight",
            (concat(gate, up), "hidden"),
            (
                HFTensor(f"{hf}.gate_proj.weight", (gate, "hidden"), fp8=True),
                HFTensor(f"{hf}.up_proj.weight", (up, "hidden"), fp8=True),
            ),
            tp_dim=0,
            stacked=stacked,
            fused=HFTensor(f"{whole}.gate_up_proj", ("expert", concat(gate, up), "hidden")) if stacked else None,
        ),
        Weight(
            f"{key}.linear_fc2.weight",
            ("hidden", ffn),
            (HFTensor(f"{hf}.down_proj.weight", ("hidden", ffn), fp8=True),),
            tp_dim=1,
            stacked=stacked,
            fused=HFTensor(f"{whole}.down_proj", ("expert", "hidden", ffn)) if stacked else None,
        ),
    )
