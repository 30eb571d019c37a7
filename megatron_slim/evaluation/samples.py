"""Samples to evaluate on: of text, of which every prediction counts, or of a sample set."""

from __future__ import annotations

from pathlib import Path

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import Tokens, read_samples
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set
from megatron_slim.streaming.model_input import Samples, read_set
from megatron_slim.streaming.samples import check_samples


def read_evaluation_data(
    data: Path | Tokens, shape: ModelShape, *, seq_length: int | None, num_samples: int | None, seed: int = 0
) -> Tokens:
    """Ids that this model can be evaluated on; see `data.read_samples`.

    Raises:
        DataError: they are not such data, or not for this model.
    """
    where = str(data) if isinstance(data, Path) else "samples"
    samples = read_samples(data, seq_length=seq_length, num_samples=num_samples, vocab_size=shape.vocab_size, seed=seed)
    needed, length = 2 + shape.mtp_num_layers, samples.shape[1]
    if length < needed:
        raise DataError(f"samples of {length} tokens leave nothing to predict", where=where, fix=f"use >= {needed}")
    check_samples(samples, shape, where=where)
    return samples


def read_samples_of(
    data: Path | Tokens, shape: ModelShape, *, seq_length: int | None, num_samples: int | None, seed: int
) -> Samples:
    """Samples of a sample set, a teacher's cache included, or of what `read_evaluation_data` reads.

    Raises:
        DataError: they are none of these, not for this model, or nothing in them counts.
    """
    if isinstance(data, Path) and is_sample_set(data):
        return read_set(data, shape, seq_length=seq_length, num_samples=num_samples, seed=seed)
    return Samples.of(read_evaluation_data(data, shape, seq_length=seq_length, num_samples=num_samples, seed=seed))
