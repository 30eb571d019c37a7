"""Samples to evaluate on: what a model reads of each, what its heads predict, and which predictions count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.architecture.mtp_masks import mtp_mask
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.data import Tokens, draw, read_samples
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.streaming.samples import check_samples


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
    if not isinstance(data, Path) or not is_sample_set(data):
        ids = read_evaluation_data(data, shape, seq_length=seq_length, num_samples=num_samples, seed=seed)
        return Samples.of(ids)
    found, where = open_samples(data), str(data)
    if seq_length not in (None, found.seq_length):
        fix = f"give --seq-length {found.seq_length}, or leave it out"
        raise DataError(f"has samples of {found.seq_length}, --seq-length is {seq_length}", where=where, fix=fix)
    found.verify(shape.vocab_size)
    rows = draw(len(found), num_samples, seed, data)
    tokens, mask, positions = (np.array(each[rows]) for each in (found.tokens, found.loss_mask, found.position_ids))
    ids = tokens.astype(np.int64)
    samples = Samples(ids[:, :-1].copy(), ids, mask, positions, found.documents)
    check_samples(samples.read, shape, where=where)
    if not all(samples.number(1 + depth) for depth in range(1 + shape.mtp_num_layers)):
        raise DataError("no prediction counts in these samples", where=where, fix="take more of them")
    return samples
