"""Datasets of training: Megatron's GPT datasets and sample sets, as Megatron's builder mixes and splits them."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.training import get_args, get_tokenizer

from megatron_slim.aliases import Sample
from megatron_slim.data import document_lengths
from megatron_slim.errors import DataError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.teacher_cache.cache import TeacherCache
from megatron_slim.training.blends import Blend, read_sources
from megatron_slim.training.cached_data import CachedDataset
from megatron_slim.training.data_checks import DEFAULT_SPLIT, needed_parts
from megatron_slim.training.document_checks import open_once, prefixes_of, sample_sets
from megatron_slim.training.packed_data import PackedDataset


class _OwnMasks:
    """Masks and positions of every sample are made for that sample.

    Megatron 0.19.2 keeps those of the first one that it serves, and has written that sample's padding into the loss
    mask that it keeps: every later sample would lose the same positions.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.masks_and_position_ids_are_cacheable = False


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and what distinguishes two states of the same data sets.

    Attributes:
        lengths: hash of the documents' lengths in all data sets, of which indices are made.
        cache: of a teacher that was recorded.
        recorded_heads: whose states samples come with.
    """

    lengths: str = ""
    cache: TeacherCache | None = None
    recorded_heads: int = 0


class GPTDataset(_OwnMasks, gpt_dataset.GPTDataset):
    """Megatron's GPT dataset with masks of each sample's own, own indices, and what the file holds for each sample.

    Indices that are cached on disk are those of these documents: Megatron finds them by the data set's path, and would
    cut a data set that was written anew into the samples of the old one.

    What the file holds is the lowest and the highest id (``ids``), and the file. Megatron fills a last sample with its
    padding id, mostly -1, and masks every position that has it: its samples do not show that -1 stood in the
    file.
    """

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*gpt_dataset.GPTDataset._key_config_attributes(), "lengths"]

    def __getitem__(self, idx: int | None) -> Sample:
        sample: Sample = super().__getitem__(idx)
        return {**sample, "ids": torch.tensor(self._ends), "where": f"{self.dataset_path}.bin"}

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[npt.NDArray[np.int64], object, list[int]]:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        ids = text[: sum(lengths)]
        self._ends = (int(ids.min(initial=0)), int(ids.max(initial=0)))
        return text, documents, lengths


class MockGPTDataset(_OwnMasks, gpt_dataset.MockGPTDataset):
    """Megatron's artificial data with masks of each sample's own."""


def dataset_config(cache: TeacherCache | None = None, recorded_heads: int = 0) -> DatasetConfig:
    """Megatron's dataset configuration from its arguments, without the parts that are not used.

    Megatron would build those too: with 0 samples, for which it needs at least one token.
    """
    args = get_args()
    sources, needed = read_sources(args), needed_parts(args)
    per_part = [_for_megatron(blend) if used else None for blend, used in zip(sources.parts, needed, strict=True)]
    config = DatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=_for_megatron(sources.whole),
        blend_per_split=per_part if any(sources.parts) else None,
        split=args.split or DEFAULT_SPLIT if sources.whole is not None else None,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        lengths=_hash_of_lengths(args),
        cache=cache,
        recorded_heads=recorded_heads,
    )
    if config.split_matrix is not None:
        config.split_matrix = [ends if used else None for ends, used in zip(config.split_matrix, needed, strict=True)]
    return config


def _hash_of_lengths(args: Namespace) -> str:
    if sets := sample_sets(args):
        return " ".join(sorted(each.digests["tokens.npy"] for each in sets))
    hashes = [xxhash.xxh3_64_hexdigest(document_lengths(Path(prefix))) for prefix in sorted(prefixes_of(args))]
    return " ".join(hashes)


def _for_megatron(blend: Blend | None) -> tuple[list[str], list[float] | None] | None:
    """Prefixes and weights; without weights each of several data sets weighs as much as it has tokens.

    Megatron itself would mix them by their samples, but read each once and no more: a longer run ends in the middle.
    """
    if blend is None:
        return None
    weights = None if blend.weights is None else list(blend.weights)
    if weights is None and len(blend.prefixes) > 1:
        weights = [_tokens_of(Path(prefix)) for prefix in blend.prefixes]
    return list(blend.prefixes), weights


def _tokens_of(path: Path) -> float:
    if is_sample_set(path):
        return float(open_once(open_samples, path).loss_mask.size)
    return float(document_lengths(path).sum(dtype=np.int64))


def build_datasets(
    num_samples: tuple[int, int | None, int | None], cache: TeacherCache | None = None, recorded_heads: int = 0
) -> list[MegatronDataset]:
    """Train, validation and test datasets of at least so many samples each.

    Args:
        num_samples: of each.
        cache: of a teacher that was recorded.
        recorded_heads: whose states samples are to come with.

    Raises:
        DataError: a blend is of too few samples for its number of data sets.
    """
    args = get_args()
    kind: type[MegatronDataset] = MockGPTDataset if args.mock_data else GPTDataset
    if not args.mock_data and sample_sets(args):
        kind = CachedDataset if recorded_heads else PackedDataset
    sizes = [num_samples[0], max(num_samples[1] or 0, _validation_samples(args)), num_samples[2]]
    try:
        # On every rank: the teacher check needs a sample on each, and indices are cached on disk or made in seconds.
        datasets: list[MegatronDataset] = BlendedMegatronDatasetBuilder(
            kind, sizes, lambda: True, dataset_config(cache, recorded_heads)
        ).build()
    except IndexError as error:
        if "oversamples" not in str(error):
            raise
        fix = "give more --eval-iters or --train-iters, or a larger --mid-level-dataset-surplus"
        raise DataError(f"too few samples for the data sets of a blend ({error})", fix=fix) from None
    return datasets


def _validation_samples(args: Namespace) -> int:
    """How many samples validation takes up to the end of the run, those before it was resumed included.

    Megatron's own number is right for a run that validates by the same flags from its first iteration on: one that is
    resumed with a longer interval would have none left, and with ``--start-eval-at-iter`` it is one validation short.
    """
    if args.eval_iters <= 0:
        return 0
    interval = args.eval_interval
    passed = max(args.iteration // interval, -(-(args.start_eval_at_iter or 0) // interval) - 1)
    left = max(0, args.train_iters // interval - passed) + 1  # the last one is behind the last iteration
    return int(args.consumed_valid_samples + left * args.eval_iters * args.eval_global_batch_size)
