"""Hugging Face checkpoints to Megatron and back, weight by weight, verified; and straight into a built model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megatron_slim.architecture.shape import shape_to_hf_config
from megatron_slim.architecture.table import count_parameters, weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.distributed import DistCheckpoint, is_torch_dist, write_torch_dist
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import specs_of, total_bytes, write_hf_checkpoint
from megatron_slim.checkpoint.layout import split_keys, to_megatron
from megatron_slim.cli import progress
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import new_directory

Checkpoint: TypeAlias = HFCheckpoint | DistCheckpoint


def open_checkpoint(path: Path | str, hf_config: Path | str | None = None) -> Checkpoint:
    """Open a checkpoint of either format; both give Hugging Face tensors by name through ``read``."""
    if is_torch_dist(Path(path)):
        return DistCheckpoint.open(path, hf_config)
    if hf_config is not None:
        raise CheckpointError("is no torch_dist checkpoint", where=str(path), fix="leave --hf-config out")
    return HFCheckpoint.open(path)


def config_for(shape_config: dict[str, Any], dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """A config.json that names the type which most of the tensors have."""
    dtype = Counter(dtypes).most_common(1)[0][0]
    name = str(dtype).removeprefix("torch.")
    stale = {"dtype": name} if "dtype" in shape_config else {}
    return {**shape_config, "torch_dtype": name, **stale}


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.absolute().parent).free
    if needed > free:
        raise CheckpointError(
            f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", where=str(target), fix="make room"
        )


def _cast(read: Callable[[str], Tensor], dtype: torch.dtype | None) -> Callable[[str], Tensor]:
    return read if dtype is None else lambda name: read(name).to(dtype)


def hf_to_torch_dist(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, verify: bool = True
) -> dict[str, Any]:
    """Convert a Hugging Face directory into a torch_dist checkpoint.

    Args:
        source: the Hugging Face directory.
        target: a new directory; appears only when it is complete and, with ``verify``, has been read back.
        dtype: cast every tensor to this type; None keeps each as it is, bit for bit.
        verify: read everything back and compare it byte for byte.

    Returns:
        What was done, for a tool's ``--json``.
    """
    checkpoint = HFCheckpoint.open(source)
    read = _cast(checkpoint.read, dtype)
    dtypes = checkpoint.dtypes if dtype is None else dict.fromkeys(checkpoint.dtypes, dtype)
    config = config_for(shape_to_hf_config(checkpoint.shape, checkpoint.config), dtypes.values())
    with new_directory(target) as partial:
        _check_space(target, total_bytes(checkpoint.shape, dtypes))
        write_torch_dist(partial, checkpoint.shape, read, config, copy_files_from=source)
        if verify:
            _verify(DistCheckpoint.open(partial), read, target)
    return _results("torch_dist", checkpoint, verify)


def torch_dist_to_hf(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Convert a torch_dist checkpoint into a Hugging Face directory; arguments as `hf_to_torch_dist`.

    Args:
        source: what ``--load`` takes, or one iteration's directory.
        target: a new directory.
        hf_config: directory with the model's config.json and tokenizer where that is not in ``source/hf``.
        dtype: cast every tensor to this type.
        verify: read everything back and compare it byte for byte.
    """
    checkpoint = DistCheckpoint.open(source, hf_config)
    dtypes = checkpoint.dtypes if dtype is None else dict.fromkeys(checkpoint.dtypes, dtype)
    config = config_for(shape_to_hf_config(checkpoint.shape, checkpoint.config), dtypes.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for weight in progress(checkpoint.weights, "writing"):
            for name, tensor in checkpoint.tensors_of(weight):
                yield name, tensor.to(dtypes[name])

    with new_directory(target) as partial:
        _check_space(target, total_bytes(checkpoint.shape, dtypes))
        specs = specs_of(checkpoint.shape, dtypes)
        write_hf_checkpoint(partial, config, specs, tensors(), copy_files_from=checkpoint.config_path)
        if verify:
            _verify(checkpoint, HFCheckpoint.open(partial).read, target, dtype)
    return _results("hf", checkpoint, verify)


def _verify(
    distributed: DistCheckpoint, read: Callable[[str], Tensor], target: Path, dtype: torch.dtype | None = None
) -> None:
    """Compare a torch_dist checkpoint with Hugging Face tensors, all bytes of all tensors."""
    for weight in progress(distributed.weights, "verifying"):
        for name, tensor in distributed.tensors_of(weight):
            expected = read(name)
            tensor = tensor if dtype is None else tensor.to(dtype)
            if tensor.dtype != expected.dtype or not same_bytes(tensor, expected):
                raise CheckpointError(
                    f"{name} differs from its source after writing", where=str(target), fix="check disk and memory"
                )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN payloads and signs of zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def _results(kind: str, checkpoint: Checkpoint, verified: bool) -> dict[str, Any]:
    results = {
        "format": kind,
        "tensors": len(checkpoint.dtypes),
        "parameters": count_parameters(checkpoint.shape).total,
        "mtp_num_layers": checkpoint.shape.mtp_num_layers,
        "verified": verified,
    }
    if isinstance(checkpoint, DistCheckpoint):
        results["ignored_entries"] = checkpoint.num_ignored
    return results


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
    shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
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
    for parameter in model.parameters():
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
