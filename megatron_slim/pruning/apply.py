"""Applying a plan: every tensor of the target from the tensors of the source, one at a time, through the table.

Which rows and columns of a tensor survive follows from its named axes and the plan alone, and merging is element by
element, so that pruning commutes with every permutation of rows: prune(convert(x)) == convert(prune(x)), bit for bit.
Where experts are aligned, the rows of a member follow from the weights too, by their Hugging Face names (`align`).

The state of an optimizer has tensors of the same names and shapes: the plan applies to it as to the weights, but for
how moments of merged experts come together (`recipe_run.MOMENT_RULES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.axes import Dim, axes_of, kept_positions
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.hf_config import shape_to_hf_config, wrapper_of
from megatron_slim.architecture.prunable import HIDDEN
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.huggingface import Index
from megatron_slim.checkpoint.optimizer_state import MOMENTS, OptimizerState
from megatron_slim.errors import PlanError
from megatron_slim.pruning.align import Alignment, Neurons
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.selection import kept_axes, source_key
from megatron_slim.streaming.fingerprint import fingerprint_like

MEAN = "mean"  # of weights, by the plan's


@dataclass(frozen=True)
class _Origin:
    """Where a target tensor comes from: its dimensions, its block in the source; of an expert, number and group."""

    name: str
    dims: tuple[Dim, ...]
    block: str
    expert: int | None
    group: ExpertGroup | None


class PrunedCheckpoint:
    """The target as a checkpoint whose tensors are made when they are read; holds none of them."""

    def __init__(self, plan: Plan, source: Checkpoint, *, check_source: bool = True) -> None:
        """Tie a plan to its source.

        Args:
            plan: the decision.
            source: the checkpoint that the plan was made for.
            check_source: false skips the fingerprint, for a caller that has just compared it.

        Raises:
            PlanError: the plan was made for another checkpoint.
        """
        recorded = plan.source_sha256
        if source.shape != plan.source_shape or (check_source and fingerprint_like(source, recorded) != recorded):
            raise PlanError(
                "the plan was made for another checkpoint", where=str(source.path), fix="plan again for this one"
            )
        self.plan, self.source = plan, source
        self.shape: ModelShape = plan.target_shape
        self.path: Path = source.path
        self.config_path: Path = source.config_path
        self.fused_blocks = frozenset(new for new, old in plan.source_blocks.items() if old in source.fused_blocks)
        self.copies = source.copies
        self.notes = source.notes
        self.left_out = source.left_out
        self.carried = source.carried.with_rows(wrapper_of(source.config), np.array(plan.kept_hidden, dtype=np.int64))
        self.config: JsonObject = shape_to_hf_config(plan.target_shape, source.config)
        # Of an optimizer's state, which has no tensors of what is not trained, only those that are there.
        self._origins = {name: each for name, each in _origins(plan) if self._source_name(each) in source.dtypes}
        self._kept_hidden = np.array(plan.kept_hidden, dtype=np.int64)
        self._alignment = Alignment(self._read_neurons) if plan.recipe.experts.align == "weights" else None
        self._rule = MEAN
        self.names = tuple(self._origins)
        self.dtypes: Mapping[str, torch.dtype] = {
            name: source.dtypes[self._source_name(origin)] for name, origin in self._origins.items()
        }

    def reading_once(self) -> AbstractContextManager[None]:
        """Reads of the source within go past the page cache."""
        return self.source.reading_once()

    def read(self, name: str) -> Tensor:
        """Make one tensor of the target."""
        return self.read_rows(name)

    def read_rows(self, name: str, dim0_index: Index | None = None, dim1_index: Index | None = None) -> Tensor:
        """Make some rows and columns of one tensor of the target; of the source, no other rows are read."""
        origin = self._origins[name]
        members, shares = _members(origin.group, self._rule)
        parts = (self._read_part(origin, member, dim0_index, dim1_index) for member in members)
        return merge(parts, shares)

    def optimizer_state(self, state: OptimizerState, moments_of_merged: str) -> OptimizerState:
        """The state of an optimizer of the source as one of the target; its tensors too are made when they are read.

        Main weights are merged as the weights are, in float32 and with the plan's shares. Which neurons of a member are
        matched with which of its base follows from the weights for all of them.

        Args:
            state: of the source.
            moments_of_merged: one of `recipe_run.MOMENT_RULES`.
        """
        return OptimizerState(
            state.step,
            {
                name: self._of_state(tensors, moments_of_merged if name in MOMENTS else MEAN)
                for name, tensors in state.tensors.items()
            },
        )

    def _of_state(self, tensors: Checkpoint, rule: str) -> PrunedCheckpoint:
        found = PrunedCheckpoint(self.plan, tensors, check_source=False)
        found._alignment, found._rule = self._alignment, rule
        return found

    def _read_part(
        self, origin: _Origin, member: int | None, dim0_index: Index | None, dim1_index: Index | None
    ) -> Tensor:
        """What one source tensor gives: the only one, or a member's."""
        rows, columns = self._indices(origin, member)
        name = origin.name if member is None else origin.name.format(expert=member)
        return self.source.read_rows(name, _within(rows, dim0_index), _within(columns, dim1_index))

    def _read_neurons(self, block: str, expert: int, neurons: Neurons | None) -> Tensor:
        """All surviving weights of some neurons of a source expert, as `Alignment` takes them: [neurons, weights]."""
        kept = {HIDDEN.axis: self._kept_hidden} | ({} if neurons is None else {EXPERT_NEURONS.axis: neurons})
        found = []
        for weight in weights(self.plan.source_shape):
            for tensor in weight.sources if weight.stacked and weight.block == block else ():
                rows, columns = (kept_positions(dim, self.plan.source_shape.sizes, kept) for dim in tensor.dims)
                part = self.source.read_rows(tensor.name.format(expert=expert), rows, columns)
                found.append(part if EXPERT_NEURONS.axis in axes_of(tensor.dims[0]) else part.T)
        return torch.cat(found, dim=1)

    def _source_name(self, origin: _Origin) -> str:
        return origin.name if origin.group is None else origin.name.format(expert=origin.group.base)

    def _indices(self, origin: _Origin, member: int | None) -> tuple[Index | None, Index | None]:
        """Surviving rows and columns of a source tensor, of a merged expert in the order of its base's."""
        kept = kept_axes(self.plan, origin.block, origin.expert)
        if self._alignment is not None and origin.group is not None and member is not None:
            neurons = self._alignment.neurons(origin.block, origin.group, member, kept.get(EXPERT_NEURONS.axis))
            kept |= {} if neurons is None else {EXPERT_NEURONS.axis: neurons}
        shape = self.plan.source_shape.in_block(origin.block)
        indices = [_positions(dim, shape, kept) for dim in origin.dims]
        assert all(index is None for index in indices[2:]), f"{origin.name}: only the first two dimensions are pruned"
        rows, columns = [*indices, None][:2]
        return rows, columns


def _members(group: ExpertGroup | None, rule: str) -> tuple[tuple[int | None, ...], tuple[float, ...]]:
    """The source experts that a tensor is made of, None outside experts, and their shares."""
    if group is None:
        return (None,), (1.0,)
    if rule == "base":
        return (group.base,), (1.0,)
    return group.members, group.weights if rule == MEAN else (1.0,) * len(group.members)


def _positions(dim: Dim, source: ModelShape, kept: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64] | None:
    """Surviving positions of a dimension, None when all do."""
    return kept_positions(dim, source.sizes, kept) if kept.keys() & set(axes_of(dim)) else None


def _within(kept: Index | None, wanted: Index | None) -> Index | None:
    """The wanted ones of what is kept; None is all."""
    return wanted if kept is None else kept if wanted is None else np.asarray(kept)[np.asarray(wanted)]


def _origins(plan: Plan) -> Iterator[tuple[str, _Origin]]:
    """Origin of every tensor of the target, in the order of the target's table."""
    blocks, found = plan.source_blocks, {weight.key: weight for weight in weights(plan.source_shape)}
    for weight in weights(plan.target_shape):
        block = blocks[weight.block] if weight.block else ""
        source = found[source_key(weight.key, plan)]
        groups: tuple[ExpertGroup | None, ...] = plan.experts[block] if weight.stacked else (None,)
        for expert, group in enumerate(groups):
            for tensor, origin in zip(weight.sources, source.sources, strict=True):
                name = tensor.name.format(expert=expert) if weight.stacked else tensor.name
                yield name, _Origin(origin.name, origin.dims, block, expert if weight.stacked else None, group)


def merge(tensors: Iterable[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Weighted sum of tensors, in float32, rounded once; a single tensor is itself, bit for bit.

    Args:
        tensors: as many as weights; taken one by one, so only one of them need be in memory.
        weights: summing to 1 for a mean.

    >>> merge([torch.tensor([1.0]), torch.tensor([4.0])], (0.75, 0.25)).item()
    1.75
    """
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if len(weights) == 1:
            return tensor
        if total is None:
            total = torch.zeros_like(tensor, dtype=torch.float32)
        dtype = tensor.dtype
        total.add_(tensor, alpha=weight)
    assert total is not None
    return total.to(dtype)
