"""Calibration samples: read, and checked against the model before anything is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import check_ids, read_samples
from megatron_slim.errors import DataError

# SlimQwen 3.2 takes 1024 samples; 4096 tokens is our choice, the paper names none.
NUM_SAMPLES, SEQ_LENGTH = 1024, 4096


def read_calibration_samples(
    path: Path, shape: ModelShape, *, num_samples: int | None, seq_length: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Read token ids [samples, sequence] for a model.

    Args:
        path: prefix of a Megatron .bin/.idx pair, or a ``.npy`` matrix, which is used as it is.
        shape: sizes of the model.
        num_samples: drawn at random; None takes all of a matrix and `NUM_SAMPLES` of a Megatron data set.
        seq_length: tokens per sample of a Megatron data set; None is `SEQ_LENGTH`, or all that the model reads.
        seed: of the random choice.

    Raises:
        DataError: not data, or not for this model.
    """
    if path.suffix != ".npy":
        num_samples = num_samples or NUM_SAMPLES
        seq_length = seq_length or min(SEQ_LENGTH, shape.max_position_embeddings)
    samples = read_samples(path, seq_length=seq_length, num_samples=num_samples, vocab_size=shape.vocab_size, seed=seed)
    check_samples(samples, shape, where=str(path))
    return samples


def check_samples(samples: npt.NDArray[np.int64], shape: ModelShape, *, where: str = "calibration data") -> None:
    """Refuse samples that this model cannot read.

    Raises:
        DataError: ids outside the vocabulary, longer than the model's positions, or too short for its MTP block.
    """
    check_ids(int(samples.min()), int(samples.max()), shape.vocab_size, where)
    length = samples.shape[1]
    if length > shape.max_position_embeddings:
        raise DataError(
            f"samples of {length} tokens, the model's max_position_embeddings is {shape.max_position_embeddings}",
            where=where,
            fix="use shorter sequences",
        )
    if length <= shape.mtp_num_layers:
        raise DataError(f"samples of {length} tokens are too short for the MTP block", where=where)
