"""Calibration samples: read, and checked against the model before anything is measured."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import check_ids, read_samples
from megatron_slim.errors import DataError

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint

logger = logging.getLogger(__name__)

# SlimQwen 3.2 takes 1024 samples; 4096 tokens is our choice, the paper names none.
NUM_SAMPLES, SEQ_LENGTH = 1024, 4096


def read_calibration_samples(
    data: Path | npt.NDArray[np.int64], shape: ModelShape, *, num_samples: int | None, seq_length: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Read token ids [samples, sequence] for a model.

    Args:
        data: prefix of a Megatron .bin/.idx pair, or a ``.npy`` file or its matrix, which is used as it is.
        shape: sizes of the model.
        num_samples: drawn at random; None takes all of a matrix and `NUM_SAMPLES` of a Megatron data set, or all of
            it where it has fewer, which is logged.
        seq_length: tokens per sample of a Megatron data set; None is `SEQ_LENGTH`, or all that the model reads.
        seed: of the random choice.

    Raises:
        DataError: not data, or not for this model.
    """
    is_default = False
    if isinstance(data, Path) and data.suffix != ".npy":
        is_default, num_samples = num_samples is None, num_samples or NUM_SAMPLES
        seq_length = seq_length or min(SEQ_LENGTH, shape.max_position_embeddings)
    samples = read_samples(
        data,
        seq_length=seq_length,
        num_samples=num_samples,
        vocab_size=shape.vocab_size,
        seed=seed,
        at_most=is_default,
    )
    if is_default and len(samples) < NUM_SAMPLES and os.environ.get("RANK", "0") == "0":
        has = f"has {len(samples)} samples of {samples.shape[1]} tokens"
        logger.info(f"{data}: {has}, not the default of {NUM_SAMPLES}: all are used")
    check_samples(samples, shape, where=str(data) if isinstance(data, Path) else "samples")
    return samples


def log_calibration(source: Checkpoint, samples: npt.NDArray[np.int64], processes: str = "") -> None:
    """Log what calibration is about to do, and what of the checkpoint it takes in another precision."""
    from megatron_slim.checkpoint.remarks import remarks
    from megatron_slim.compat.runtime import default_dtype

    logger.info(f"calibrating on {samples.shape[0]} samples of {samples.shape[1]} tokens{processes}")
    for line in remarks(source, default_dtype(), "calibration"):
        logger.info(line)


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
