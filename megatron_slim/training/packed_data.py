"""Sample sets as data of training: a dataset of Megatron's that serves their rows, every epoch in another order."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_slim.aliases import Sample
from megatron_slim.sample_set import SampleSet, open_samples
from megatron_slim.training.document_checks import open_once


class PackedDataset(MegatronDataset):
    """Rows of a sample set, as Megatron's builder makes it a part of a blend.

    Item n is of epoch n // rows, in which every row of the part is served once, in an order that the seed and the
    epoch give alone. So a run that resumes after so many samples continues where it was.

    A subclass may add entries to a row by overriding `row`.

    Attributes:
        samples: the sample set.
        rows: of the sample set, that this part has.
    """

    samples: SampleSet

    def __init__(
        self,
        dataset: SampleSet,
        dataset_path: str | None,
        indices: npt.NDArray[np.int32],
        num_samples: int | None,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        """As Megatron's builder calls it."""
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self.samples, self.rows = dataset, np.asarray(indices, np.int64)
        self.epochs = -(-(num_samples or len(self.rows)) // len(self.rows))
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, self.rows)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> SampleSet:
        """Open the directory that ``--data-path`` names."""
        return open_once(open_samples, Path(dataset_path))

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: SampleSet) -> int:
        """Of what ``--split`` takes shares."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return self.epochs * len(self.rows)

    def __getitem__(self, idx: int) -> Sample:
        epoch, place = divmod(idx, len(self.rows))
        if self._order[0] != epoch:
            order = np.random.default_rng([self.config.random_seed, epoch]).permutation(self.rows)
            self._order = (epoch, order)
        return self.row(int(self._order[1][place]))

    def row(self, number: int) -> Sample:
        """What a row of the sample set is to training; ``index`` is its number, [] int64."""
        ids = torch.from_numpy(self.samples.tokens[number].astype(np.int64))
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.from_numpy(self.samples.loss_mask[number].astype(np.float32)),
            "position_ids": torch.from_numpy(self.samples.position_ids[number].astype(np.int64)),
            "index": torch.tensor(number),
            "ids": torch.stack([ids.min(), ids.max()]),
            "where": str(self.samples.path),
        }
