"""Sample sets with the hidden states that a teacher was recorded to end with, as data of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_slim.mcore

import torch

from megatron_slim.errors import DataError
from megatron_slim.training.batches import DAMAGED, STATES, Entry
from megatron_slim.training.cache_checks import cache_of
from megatron_slim.training.packed_data import PackedDataset
from megatron_slim.training.spec import RunSpec


def states_entry(spec: RunSpec) -> dict[str, Entry]:
    """What the last stage is given of a recorded teacher: states of the heads that it needs; nothing without one."""
    if spec.cache is None:
        return {}
    extents = spec.recorded_heads, spec.cache.samples.seq_length, spec.cache.row_bytes
    return {STATES: Entry(extents, torch.uint8)}


class CachedDataset(PackedDataset):
    """Rows with their states, read from the cache of their data set; see `batches.STATES` and `batches.DAMAGED`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Megatron's builder calls it, with a `data.DatasetConfig` that has a cache."""
        super().__init__(*args, **kwargs)
        self.cache, self.heads = cache_of(Path(self.dataset_path), self.config.cache), self.config.recorded_heads

    def row(self, number: int) -> dict[str, Any]:
        """As `PackedDataset.row`; of damaged states there are zeros."""
        damage = ""
        try:
            states = self.cache.read(number, self.heads)
        except (DataError, OSError) as error:
            damage = str(error)
            states = torch.zeros(self.heads, self.samples.seq_length, self.cache.row_bytes, dtype=torch.uint8)
        return {**super().row(number), STATES: states, DAMAGED: damage}
