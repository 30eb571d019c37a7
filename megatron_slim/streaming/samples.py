"""Samples, checked against the model before anything is measured; imports no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import check_ids
from megatron_slim.errors import DataError

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.streaming.model_input import Samples

logger = logging.getLogger(__name__)

# SlimQwen 3.2 takes 1024 samples; 4096 tokens is our choice, the paper names none.
NUM_SAMPLES, SEQ_LENGTH = 1024, 4096


def log_calibration(source: Checkpoint, samples: Samples, processes: str = "") -> None:
    """Log what calibration is about to do, and what of the checkpoint it takes in another precision."""
    from megatron_slim.checkpoint.remarks import remarks
    from megatron_slim.compat.runtime import default_dtype

    left_out = samples.read.size - samples.number_measured()
    padding = f", of which {left_out:,} are padding" if left_out else ""
    number, length = samples.read.shape
    logger.info(f"calibrating on {number} samples of {length} tokens{padding}{processes}")
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
