"""Weights of a checkpoint straight into a built model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.layout import fits, split_keys, stored_shapes, to_megatron
from megatron_slim.checkpoint.torch_dist_names import HIDDEN_KD
from megatron_slim.errors import CheckpointError, summarise

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedTensor

T = TypeVar("T")


class _Regions:
    """Any rectangle of any Megatron parameter of a checkpoint; keeps the last parameter read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        shape = checkpoint.shape
        self.table = {key: (weight, rows) for weight in weights(shape) for key, rows in split_keys(weight, shape)}
        self.shapes = {key: extents for weight in weights(shape) for key, extents in stored_shapes(weight, shape)}
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def read(self, key: str, offsets: Sequence[int], extents: Sequence[int]) -> Tensor:
        """The rectangle, cut off where the parameter ends (rows of a padded vocabulary)."""
        weight, rows = self.table[key]
        expert = offsets[0] if weight.stacked else None
        at = (weight.key, expert)
        if self._last is None or self._last[0] != at:
            self._last = (at, self._read_weight(weight, expert))
        whole = self._last[1] if weight.stacked else self._last[1][rows]
        inner = offsets[1:] if weight.stacked else offsets
        return whole[tuple(slice(start, start + n) for start, n in zip(inner, extents, strict=True))]

    def _read_weight(self, weight: Weight, expert: int | None) -> Tensor:
        if isinstance(self.checkpoint, DistCheckpoint):
            return self.checkpoint.read_weight(weight, expert=expert)
        return to_megatron(weight, self.checkpoint.shape, self.checkpoint.read, expert=expert)


def load_hf_weights(models: nn.Module | Sequence[nn.Module], checkpoint: Checkpoint) -> None:
    """Load this rank's shard of a checkpoint of either format into a built Megatron model, in place.

    The model's own `sharded_state_dict` says which rectangle of which parameter each of its tensors is, so every
    layout of tensor, pipeline, virtual pipeline and expert parallelism is right by construction. All ranks of the
    default process group must call it, once for all their virtual pipeline stages.

    Args:
        models: a model, or the list of its virtual pipeline stages; wrappers (DDP, Float16Module) are looked through.
        checkpoint: where the weights come from.

    Projections of hidden-state distillation stay as they are.

    Raises:
        CheckpointError: the model has a weight that the checkpoint lacks, or of another shape, or the checkpoint one
            that no rank has; all ranks raise it together, and nothing has been loaded.
    """
    regions = _Regions(checkpoint)
    stages = [_unwrapped(model) for model in ([models] if isinstance(models, nn.Module) else models)]
    # Projections are not among a checkpoint's weights.
    shards = [[each for each in shards_of(stage) if not each.key.startswith(HIDDEN_KD)] for stage in stages]
    keys = {shard.key: tuple(shard.global_shape) for stage in shards for shard in stage}
    _compare(_union_over_ranks(set(keys.items())), regions)
    for stage, of_stage in zip(stages, shards, strict=True):
        _load_stage(stage, of_stage, regions)


def _compare(model: set[tuple[str, tuple[int, ...]]], regions: _Regions) -> None:
    """See that the parameters of a model, all ranks', are those of the checkpoint; rows of a vocabulary may be more."""
    names = {key for key, _ in model}
    violations = {
        "weights of the model are not in the checkpoint": names - regions.table.keys(),
        "weights that no rank's model has": regions.table.keys() - names,
        "weights of other shapes": {
            f"{key} {list(extents)}, the checkpoint has {list(regions.shapes[key])}"
            for key, extents in model
            if key in regions.table and not fits(regions.table[key][0], extents, regions.shapes[key])
        },
    }
    if found := [f"{len(those)} {kind}: {summarise(sorted(those))}" for kind, those in violations.items() if those]:
        raise CheckpointError("; ".join(found), where=str(regions.checkpoint.path))


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _union_over_ranks(found: set[T]) -> set[T]:
    if not torch.distributed.is_initialized():
        return found
    gathered: list[set[T]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return set().union(*gathered)


def shards_of(model: nn.Module) -> list[ShardedTensor]:
    """Which rectangle of which parameter each of a model's tensors is."""
    import megatron_slim.mcore

    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


@torch.no_grad()
def _load_stage(model: nn.Module, shards: list[ShardedTensor], regions: _Regions) -> None:
    """Fill one model."""
    filled: Counter[int] = Counter()
    for shard in shards:
        _fill(shard, regions)
        if not regions.table[shard.key][0].buffer:
            filled[shard.data.untyped_storage().data_ptr()] += shard.data.numel()
    expected: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        if not name.startswith(HIDDEN_KD):
            expected[parameter.untyped_storage().data_ptr()] += parameter.numel()
    assert filled == expected, "sharded_state_dict does not cover the model's parameters exactly once"


def _fill(shard: ShardedTensor, regions: _Regions) -> None:
    """Read one rectangle; what is beyond the vocabulary's size becomes zero."""
    region = regions.read(shard.key, shard.global_offset, shard.data.shape)
    assert region.shape[1:] == shard.data.shape[1:], (shard.key, region.shape, shard.data.shape)
    shard.data[: len(region)].copy_(region)
    shard.data[len(region) :].zero_()
