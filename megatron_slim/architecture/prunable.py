"""The sizes of a model that pruning may make smaller: what each declares of itself (imports no torch).

A kind of sublayer declares its own; `kinds.AXES` has all. What Hugging Face calls a size is in `Family.keys`, as
families differ in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class PrunableAxis:
    """A size that a recipe may name.

    Attributes:
        field: its name in a `ModelShape`, in Megatron's config and in a recipe; 0 where a model has no such thing.
        noun: for people, what it counts.
        label: for people, the size in a table.
        axis: its name in the architecture table; "" where no tensor has it.
        group_axis: that of the groups which it falls into, of which each keeps equally many; "" for a single one.
        statistic: its importance in a statistics file, after the block's name; "" where a recipe chooses one.
        multiples: a search tries multiples of the first, which kernels like, and of the second where that leaves few
            sizes; None: of the number of groups.
        is_searched: a budget may choose it.
        sharded: the parallel size that divides it; "" for none.
        row_multiple: what a smaller one must be a multiple of.
    """

    field: str
    noun: str
    label: str
    axis: str = ""
    group_axis: str = ""
    statistic: str = ""
    multiples: tuple[int, int] | None = None
    is_searched: bool = True
    sharded: str = ""
    row_multiple: int = 1

    @property
    def labels(self) -> dict[str, str]:
        """Labels of all its sizes, by field."""
        return {self.field: self.label}

    def sizes(self, shape: ModelShape) -> dict[str, int]:
        """Sizes of its axes in the architecture table."""
        return {self.axis: getattr(shape, self.field)} if self.axis else {}

    def violations(self, shape: ModelShape) -> list[str]:
        """Sizes that it cannot have together."""
        return []


@dataclass(frozen=True, kw_only=True)
class Heads(PrunableAxis):
    """The heads of a kind of attention, which share keys in groups.

    Attributes:
        groups_field: number of groups in a `ModelShape`.
        groups_noun: for people, in tables too.
        width: field of the numbers that one head gives to the last projection.
        projection: the module of Megatron's layer that reads what they give.
        exchanged: context-parallel ranks exchange whole sequences for heads and groups, which divide by their number.
    """

    groups_field: str
    groups_noun: str
    width: str
    projection: str
    exchanged: bool
    sharded: str = "tensor"

    @property
    def labels(self) -> dict[str, str]:
        """Those of the groups first."""
        return {self.groups_field: self.groups_noun, self.field: self.label}

    def sizes(self, shape: ModelShape) -> dict[str, int]:
        """Groups, and the heads of one."""
        groups: int = getattr(shape, self.groups_field)
        return {self.group_axis: groups, self.axis: getattr(shape, self.field) // max(1, groups)}

    def violations(self, shape: ModelShape) -> list[str]:
        """Groups have equally many heads."""
        heads, groups = getattr(shape, self.field), getattr(shape, self.groups_field)
        fits = heads % max(1, groups) == 0
        return [] if fits else [f"{self.field} {heads} is not a multiple of {self.groups_field} {groups}"]


@dataclass(frozen=True, kw_only=True)
class Neurons(PrunableAxis):
    """The neurons of a feed-forward network.

    Attributes:
        key: what survives of them, in a plan.
        projection: the module of Megatron's layer that reads what they give; "" of experts, where `pruning.recorder`
            knows which token is whose.
    """

    key: str
    projection: str = ""
    multiples: tuple[int, int] | None = (64, 8)
    sharded: str = "tensor"


# A row of an expert is a multiple of 16 bytes in bf16, or PyTorch's grouped matmul, which transformers uses, fails.
ROW_MULTIPLE = 8
LAYERS = PrunableAxis(field="num_layers", noun="layers", label="layers")  # searched by whole periods of attention
HIDDEN = PrunableAxis(
    field="hidden_size",
    noun="hidden dimensions",
    label="hidden size",
    axis="hidden",
    multiples=(128, 8),
    row_multiple=ROW_MULTIPLE,
)
