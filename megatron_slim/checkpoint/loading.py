"""Weights of a checkpoint straight into a built model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import HIDDEN_KD, DistCheckpoint
from megatron_slim.checkpoint.layout import split_keys, to_megatron
from megatron_slim.errors import CheckpointError, summarise


class _Regions:
    """Any rectangle of any Megatron parameter of a checkpoint; keeps the last parameter read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        shape = checkpoint.shape
        self.table = {key: (weight, rows) for weight in weights(shape) for key, rows in split_keys(weight, shape)}
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

    What hidden-state distillation learns beside the model stays as it is.

    Raises:
        CheckpointError: the model has a weight that the checkpoint lacks, or the checkpoint one that no rank has.
    """
    regions = _Regions(checkpoint)
    loaded: set[str] = set()
    for model in [models] if isinstance(models, nn.Module) else models:
        loaded |= _load_stage(_unwrapped(model), regions)
    if dropped := sorted(regions.table.keys() - _union_over_ranks(loaded)):
        raise CheckpointError(
            f"{len(dropped)} weights that no rank's model has: {summarise(dropped)}", where=str(checkpoint.path)
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _union_over_ranks(keys: set[str]) -> set[str]:
    if not torch.distributed.is_initialized():
        return keys
    gathered: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, keys)
    return set().union(*gathered)


@torch.no_grad()
def _load_stage(model: nn.Module, regions: _Regions) -> set[str]:
    """Fill one model; returns the keys that it holds."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    shards = [shard for shard in tensors if not shard.key.startswith(HIDDEN_KD)]
    if unknown := sorted({shard.key for shard in shards} - regions.table.keys()):
        raise CheckpointError(
            f"{len(unknown)} weights of the model are not in the checkpoint: {summarise(unknown)}",
            where=str(regions.checkpoint.path),
        )
    filled: Counter[int] = Counter()
    for shard in shards:
        _fill(shard, regions)
        filled[shard.data.untyped_storage().data_ptr()] += shard.data.numel()
    expected: Counter[int] = Counter()
    for name, parameter in model.named_parameters():
        if not name.startswith(HIDDEN_KD):
            expected[parameter.untyped_storage().data_ptr()] += parameter.numel()
    assert filled == expected, "sharded_state_dict does not cover the model's parameters exactly once"
    return {shard.key for shard in shards}


def _fill(shard: Any, regions: _Regions) -> None:
    region = regions.read(shard.key, shard.global_offset, shard.data.shape)
    whole = region.shape == shard.data.shape
    if not whole and not shard.allow_shape_mismatch:
        raise CheckpointError(
            f"{shard.key}: the model has {list(shard.global_shape)}, the checkpoint another shape",
            where=str(regions.checkpoint.path),
        )
    if not whole:
        shard.data.zero_()
    shard.data[tuple(slice(0, n) for n in region.shape)].copy_(region)
