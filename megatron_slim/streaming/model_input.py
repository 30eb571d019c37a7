"""What a model is given to read: samples, where their documents begin, and what of them counts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.architecture.mtp_masks import mtp_mask
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import Tokens, read_samples
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.streaming.samples import NUM_SAMPLES, SEQ_LENGTH, check_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Samples of one length.

    Attributes:
        read: ids [samples, S] that a model reads.
        ids: the same, and of a sample set the one more that the last position predicts, [samples, S or S + 1].
        loss_mask: [samples, S], 1 where the main head's prediction counts; None: all count.
        positions: [samples, S], 0 where a document begins; None: a sample is one document.
        apart: whether documents do not see each other.
    """

    read: Tokens
    ids: Tokens
    loss_mask: npt.NDArray[Any] | None = None
    positions: npt.NDArray[Any] | None = None
    apart: bool = False

    @classmethod
    def of(cls, given: Tokens | Samples) -> Samples:
        """Ids [samples, S], of which position i predicts that at i + 1, as samples; samples as they are."""
        return given if isinstance(given, Samples) else cls(given, given)

    @property
    def documents(self) -> npt.NDArray[Any] | None:
        """Positions as a forward pass is given them: where documents do not see each other."""
        return self.positions if self.apart else None

    def measured(self, ahead: int = 0) -> Tensor | None:
        """Where hidden states are what statistics are of, bool [samples, S]; None: everywhere.

        Where documents do not see each other, those in which no prediction counts are left out: padding is one. Of a
        block that is given the tokens ``ahead`` positions on, too: where these are of the same document.
        """
        if self.documents is None or self.loss_mask is None:
            return None
        starts = self.documents == 0
        starts[:, 0] = True
        begins = np.flatnonzero(starts)
        counts = np.maximum.reduceat(np.asarray(self.loss_mask, bool).ravel(), begins)
        found = np.repeat(counts, np.diff(begins, append=starts.size)).reshape(starts.shape)
        for distance in range(1, 1 + ahead):
            found[:, :-distance] &= ~starts[:, distance:]
        return None if found.all() else torch.from_numpy(found)

    def number_measured(self) -> int:
        """How many tokens statistics are of."""
        found = self.measured()
        return int(self.read.size if found is None else found.sum())

    def first(self, number: int) -> Samples:
        """The first samples."""
        mask, positions = (None if each is None else each[:number] for each in (self.loss_mask, self.positions))
        return Samples(self.read[:number], self.ids[:number], mask, positions, self.apart)

    def counted(self, ahead: int) -> Tensor | None:
        """Where the head that predicts ``ahead`` positions on counts, bool [samples, predictions]; None: everywhere.

        Of an MTP head that is where it does in training.
        """
        if self.loss_mask is None:
            return None
        mask = torch.from_numpy(np.array(self.loss_mask, np.int64))
        positions = None if self.positions is None else torch.from_numpy(np.array(self.positions, np.int64))
        found = mask if ahead == 1 else mtp_mask(mask, ahead - 1, positions)
        found = found[:, : self.ids.shape[1] - ahead].bool()
        return None if found.all() else found

    def number(self, ahead: int) -> int:
        """How many predictions of that head count."""
        found = self.counted(ahead)
        return len(self.ids) * (self.ids.shape[1] - ahead) if found is None else int(found.sum())


def read_set(
    path: Path,
    shape: ModelShape,
    *,
    seq_length: int | None,
    num_samples: int | None,
    seed: int,
    at_most: bool = False,
) -> Samples:
    """Samples of a sample set, a teacher's cache included.

    Args:
        path: of the set.
        shape: sizes of the model.
        seq_length: positions of a sample, as the set has them, or None.
        num_samples: drawn at random, in the order of the set; None takes all.
        seed: of the random choice.
        at_most: where there are fewer than ``num_samples``, take them all.

    Raises:
        DataError: it cannot be read, is not for this model, or nothing in the samples counts.
    """
    found, where = open_samples(path), str(path)
    rows = found.draw(seq_length=seq_length, num_samples=num_samples, seed=seed, at_most=at_most)
    found.verify(shape.vocab_size)
    tokens, mask, positions = (np.array(each[rows]) for each in (found.tokens, found.loss_mask, found.position_ids))
    ids = tokens.astype(np.int64)
    samples = Samples(ids[:, :-1].copy(), ids, mask, positions, found.documents)
    check_samples(samples.read, shape, where=where)
    if not all(samples.number(1 + depth) for depth in range(1 + shape.mtp_num_layers)):
        raise DataError("no prediction counts in these samples", where=where, fix="take more of them")
    return samples


def read_calibration_samples(
    data: Path | npt.NDArray[np.int64], shape: ModelShape, *, num_samples: int | None, seq_length: int | None, seed: int
) -> Samples:
    """Read samples for a model.

    Args:
        data: prefix of a Megatron .bin/.idx pair, a sample set, a ``.npy`` file or its matrix, which is used as it is.
        shape: sizes of the model.
        num_samples: drawn at random; None takes all of a matrix and `NUM_SAMPLES` of other data, or all of those where
            they are fewer, which is logged.
        seq_length: tokens per sample of a Megatron data set; None is `SEQ_LENGTH`, or all that the model reads.
        seed: of the random choice.

    Raises:
        DataError: not data, or not for this model.
    """
    is_matrix = not isinstance(data, Path) or data.suffix == ".npy"
    is_default = num_samples is None and not is_matrix
    num_samples = NUM_SAMPLES if is_default else num_samples
    if isinstance(data, Path) and is_sample_set(data):
        samples = read_set(data, shape, seq_length=seq_length, num_samples=num_samples, seed=seed, at_most=is_default)
    else:
        if not is_matrix:
            seq_length = seq_length or min(SEQ_LENGTH, shape.max_position_embeddings)
        ids = read_samples(
            data,
            seq_length=seq_length,
            num_samples=num_samples,
            vocab_size=shape.vocab_size,
            seed=seed,
            at_most=is_default,
        )
        samples = Samples.of(ids)
        check_samples(ids, shape, where=str(data) if isinstance(data, Path) else "samples")
    if is_default and len(samples.read) < NUM_SAMPLES and os.environ.get("RANK", "0") == "0":
        has = f"has {len(samples.read)} samples of {samples.read.shape[1]} tokens"
        logger.info(f"{data}: {has}, not the default of {NUM_SAMPLES}: all are used")
    return samples
