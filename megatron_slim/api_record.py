"""A teacher's cache in the Python API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron_slim.aliases import JsonObject
from megatron_slim.api_inputs import StrPath, above_zero, data_of, opened, shown
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.errors import SlimError
from megatron_slim.reporting import Progress
from megatron_slim.teacher_cache.given import read_recorded
from megatron_slim.teacher_cache.record import RecordOptions
from megatron_slim.teacher_cache.record import record as _record
from megatron_slim.teacher_cache.stored_states import TYPES

if TYPE_CHECKING:
    from megatron_slim.api_inputs import Data


def record(
    teacher: Checkpoint | StrPath,
    data: Data,
    save: StrPath,
    *,
    seq_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    states: Literal["fp32", "bf16", "fp8"] = "bf16",
    micro_batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    shard_tokens: int | None = None,
    check_teacher: bool = True,
    progress: Progress | None = None,
) -> JsonObject:
    """Record what a teacher ends with on samples, for training with ``--teacher-cache``; taken up after a kill.

    Args:
        teacher: the model, opened or as its path.
        data: a sample set, the prefix of a .bin/.idx pair, a ``.npy`` file, or a matrix [samples, positions + 1].
        save: directory of the cache.
        seq_length: positions of a sample, of .bin/.idx.
        num_samples: drawn at random from .bin/.idx or a matrix; None takes all.
        seed: of the random choice.
        states: type of the recorded hidden states.
        micro_batch_size: samples in one forward pass; None, about 4096 tokens.
        dtype: to compute in; None, bf16 on a GPU, fp32 on a CPU.
        shard_tokens: tokens between two readings of the teacher; None, 16 Mi or as many as half of the memory holds.
        check_teacher: refuse a teacher that predicts no better than guessing.
        progress: where progress is shown.

    Returns:
        What was recorded, as ``megatron-slim record --json``.

    Raises:
        SlimError: there is a cache already, it was begun with other inputs, the data are not for this model, or there
            is too little space.
    """
    seq_length, num_samples = above_zero("seq_length", seq_length), above_zero("num_samples", num_samples)
    micro_batch_size = above_zero("micro_batch_size", micro_batch_size)
    shard_tokens = above_zero("shard_tokens", shard_tokens)
    if states not in TYPES:
        raise SlimError(f"{states!r} is not one of {', '.join(TYPES)}", where="states")
    source = opened(teacher)
    samples = read_recorded(data_of(data), source.shape, seq_length=seq_length, num_samples=num_samples, seed=seed)
    options = RecordOptions(states, dtype, micro_batch_size, shard_tokens, check_teacher)
    with shown(progress):
        cache = _record(source, samples, Path(save), options)
    assert cache is not None
    return cache.summary()
