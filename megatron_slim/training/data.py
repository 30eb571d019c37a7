"""Datasets and batches of training: Megatron's GPT datasets, handed to Megatron's loop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from megatron.core import parallel_state
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from torch import Tensor

from megatron_slim.checkpoint.reference import Reference
from megatron_slim.data import check_ids, document_lengths
from megatron_slim.errors import DataError
from megatron_slim.training.blends import Blend, Sources, read_sources
from megatron_slim.training.data_checks import DEFAULT_SPLIT, needed_parts

LOOKED_AT = 1000  # samples, for the first that is not padding alone
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
STATES, DAMAGED = "states", "damaged"  # of a recorded teacher, and what is wrong with them
Batch = dict[str, Tensor | None]


class _OwnMasks:
    """Masks and positions of every sample are made for that sample.

    Megatron 0.19.2 keeps those of the first one that it serves, and has written that sample's padding into the loss
    mask that it keeps: every later sample would lose the same positions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks_and_position_ids_are_cacheable = False


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and what distinguishes two states of the same data sets.

    Attributes:
        lengths: hash of the documents' lengths in all data sets, of which indices are made.
    """

    lengths: str = ""


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

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        return {**sample, "ids": torch.tensor(self._ends), "where": f"{self.dataset_path}.bin"}

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[npt.NDArray[np.int64], Any, list[int]]:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        ids = text[: sum(lengths)]
        self._ends = (int(ids.min(initial=0)), int(ids.max(initial=0)))
        return text, documents, lengths


class MockGPTDataset(_OwnMasks, gpt_dataset.MockGPTDataset):
    """Megatron's artificial data with masks of each sample's own."""


def dataset_config() -> DatasetConfig:
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
        lengths=_hash_of_lengths(sources),
    )
    if config.split_matrix is not None:
        config.split_matrix = [ends if used else None for ends, used in zip(config.split_matrix, needed, strict=True)]
    return config


def _hash_of_lengths(sources: Sources) -> str:
    prefixes = {prefix for blend in sources.blends() if blend is not None for prefix in blend.prefixes}
    hashes = [xxhash.xxh3_64_hexdigest(document_lengths(Path(prefix))) for prefix in sorted(prefixes)]
    return " ".join(hashes)


def _for_megatron(blend: Blend | None) -> tuple[list[str], list[float] | None] | None:
    """Prefixes and weights; without weights each of several data sets weighs as much as it has tokens.

    Megatron itself would mix them by their samples, but read each once and no more: a longer run ends in the middle.
    """
    if blend is None:
        return None
    weights = None if blend.weights is None else list(blend.weights)
    if weights is None and len(blend.prefixes) > 1:
        weights = [float(document_lengths(Path(prefix)).sum(dtype=np.int64)) for prefix in blend.prefixes]
    return list(blend.prefixes), weights


def build_datasets(num_samples: tuple[int, int | None, int | None]) -> list[Any]:
    """Train, validation and test datasets of at least so many samples each.

    Raises:
        DataError: a blend is of too few samples for its number of data sets.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    sizes = [num_samples[0], max(num_samples[1] or 0, _validation_samples(args)), num_samples[2]]
    try:
        # On every rank: the teacher check needs a sample on each, and indices are cached on disk or made in seconds.
        datasets: list[Any] = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, dataset_config()).build()
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


def next_batch(
    iterator: Iterator[dict[str, Any]] | None,
    vocab_size: int,
    vp_stage: int | None,
    *,
    micro_batch_size: int,
    whole: bool,
    stored: tuple[int, int, int] | None = None,
    refuse: Callable[[DataError], None],
) -> Batch:
    """This rank's part of the next micro-batch; None for what its pipeline stage does not need.

    Args:
        iterator: gives samples, collated; None on ranks that are sent theirs.
        vocab_size: of the model.
        vp_stage: virtual pipeline stage.
        micro_batch_size: samples in it, which validation may have another number of.
        stored: heads, positions and bytes of a row of a recorded teacher's states, on the stage that needs them.
        whole: without it that is tokens and positions on the first stage, labels and mask on the last, nothing between.
        refuse: is called for a batch with ids outside the vocabulary. Ids of the vocabulary stand in for them, so that
            this rank computes on until all of them hear of it: one that left would leave the others waiting.
    """
    args = get_args()
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last or whole):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    sample: dict[str, Any] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        sample = next(iterator)
        try:
            check_token_ids(sample, vocab_size)
        except DataError as error:
            refuse(error)
            sample |= {key: sample[key].clamp(0, vocab_size - 1) for key in ("tokens", "labels")}
        batch = {key: sample[key].cuda(non_blocking=True) for key in BATCH_KEYS}
    mine: Batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=whole,  # so called, it is all of the batch
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    if stored is not None:
        mine[STATES] = _stored_states(sample, (micro_batch_size, *stored), refuse)
    return mine


def _stored_states(sample: dict[str, Any], extents: tuple[int, ...], refuse: Callable[[DataError], None]) -> Tensor:
    """States of a recorded teacher, uint8 [b, heads, S, bytes of a row], of which one rank of tensor parallelism reads.

    ``refuse`` is called for states that are not what was written: zeros stand in for them.
    """
    for message in filter(None, sample.get(DAMAGED, ())):
        refuse(DataError(message))
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        states = sample[STATES].cuda(non_blocking=True)
    else:
        states = torch.empty(extents, dtype=torch.uint8, device=torch.cuda.current_device())
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        source, group = (
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        torch.distributed.broadcast(states, source, group=group)
    return states


def check_token_ids(sample: dict[str, Any], vocab_size: int) -> None:
    """Refuse samples, collated, with token ids that the model has no embedding for.

    Raises:
        DataError: names the file of the first one.
    """
    ids = torch.cat([sample[key] for key in ("ids", "tokens", "labels") if key in sample], dim=1)
    lowest, highest = ids.amin(dim=1).tolist(), ids.amax(dim=1).tolist()
    for row, ends in enumerate(zip(lowest, highest, strict=True)):
        check_ids(*ends, vocab_size, sample["where"][row] if "where" in sample else "training data")


def first_batch(dataset: Any, batch_size: int, vocab_size: int) -> dict[str, Tensor]:
    """The first samples of a dataset in which anything counts, collated: padding alone says nothing of a model.

    Raises:
        DataError: as `check_token_ids`; on all ranks, which all have the same samples.
    """
    samples = (dataset[index] for index in range(min(len(dataset), LOOKED_AT)))
    found = list(islice((sample for sample in samples if sample["loss_mask"].any()), batch_size)) or [dataset[0]]
    batch = torch.utils.data.default_collate([found[index % len(found)] for index in range(batch_size)])
    check_token_ids(batch, vocab_size)
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def reference_batch(reference: Reference, batch_size: int, seq_length: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of the recorded samples, cut or padded to the run's length, and the losses [b, s] that belong to it."""
    batch = {key: torch.zeros(batch_size, seq_length, dtype=torch.int64) for key in ("tokens", "labels")}
    batch["position_ids"] = torch.arange(seq_length).repeat(batch_size, 1)
    batch["loss_mask"], losses = torch.zeros(2, batch_size, seq_length)
    for row in range(batch_size):
        number = row % len(reference.tokens)
        ids = torch.tensor(reference.tokens[number][: seq_length + 1])
        length = len(ids) - 1
        batch["tokens"][row, :length], batch["labels"][row, :length] = ids[:-1], ids[1:]
        batch["loss_mask"][row, :length] = 1.0
        losses[row, :length] = torch.tensor(reference.losses[number][:length])
    return batch, losses


class Repeated(Iterator[dict[str, Tensor]]):
    """One batch again and again."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __next__(self) -> dict[str, Tensor]:
        return dict(self.batch)
