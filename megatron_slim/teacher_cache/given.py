"""Samples to record a teacher on, read and checked against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import read_samples
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.streaming.samples import check_samples
from megatron_slim.teacher_cache.recording_pass import Recorded


def read_recorded(
    data: Path | npt.NDArray[np.int64], shape: ModelShape, *, seq_length: int | None, num_samples: int | None, seed: int
) -> Recorded:
    """Samples of S positions for a teacher.

    Args:
        data: a sample set, which is used as it is; the prefix of a Megatron .bin/.idx pair, cut into windows of S + 1
            tokens; or a matrix [samples, S + 1] or its ``.npy`` file.
        shape: sizes of the teacher.
        seq_length: S, of .bin/.idx.
        num_samples: drawn at random, in the order of the data; None takes all.
        seed: of the random choice.

    Raises:
        DataError: they are none of these, or not for this model.
    """
    where = str(data) if isinstance(data, Path) else "samples"
    if isinstance(data, Path) and is_sample_set(data):
        given = [name for name, value in (("--seq-length", seq_length), ("--num-samples", num_samples)) if value]
        if given:
            raise DataError(f"is a sample set, of which {given[0]} takes no part", where=where, fix="leave it out")
        found = open_samples(data)
        found.verify(shape.vocab_size)
        samples = Recorded(found.tokens, found.loss_mask, found.position_ids, found.documents, found.about)
    else:
        is_matrix = not isinstance(data, Path) or data.suffix == ".npy"
        length = None if seq_length is None or is_matrix else seq_length + 1
        tokens = read_samples(data, seq_length=length, num_samples=num_samples, vocab_size=shape.vocab_size, seed=seed)
        positions = tokens.shape[1] - 1
        if seq_length not in (None, positions) and is_matrix:
            raise DataError(
                f"has samples of {positions}, --seq-length is {seq_length}", where=where, fix="leave it out"
            )
        if not positions:
            raise DataError("samples of one token leave nothing to predict", where=where)
        samples = Recorded.whole(tokens.astype(np.int32), {"data": where, "seed": seed})
    check_samples(np.asarray(samples.tokens[:1, :-1], dtype=np.int64), shape, where=where)
    return samples
