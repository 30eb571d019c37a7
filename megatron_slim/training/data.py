"""Datasets and batches of training: Megatron's GPT datasets, handed to Megatron's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_slim.checkpoint.reference import Reference
from megatron_slim.data import check_ids
from megatron_slim.errors import DataError

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
Batch = dict[str, Tensor | None]


class Samples(GPTDataset):
    """Megatron's samples, each with the lowest and highest id that the file has for it (``ids``), and the file.

    Megatron fills a last sample with its padding id, mostly -1, and masks every position that has it: from its samples
    nobody can tell that -1 stood in the file.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        return {**sample, "ids": torch.tensor(self._ends), "where": f"{self.dataset_path}.bin"}

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[npt.NDArray[np.int64], Any, list[int]]:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        ids = text[: sum(lengths)]
        self._ends = (int(ids.min(initial=0)), int(ids.max(initial=0)))
        return text, documents, lengths


def dataset_config() -> GPTDatasetConfig:
    """Megatron's dataset configuration from its arguments."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        full_validation=args.full_validation,
    )


def build_datasets(num_samples: tuple[int, int | None, int | None]) -> list[Any]:
    """Train, validation and test datasets of at least so many samples each."""
    args = get_args()
    kind = MockGPTDataset if args.mock_data else Samples
    # Every rank builds: the teacher check needs a sample on each, and indices are cached on disk or made in seconds.
    datasets: list[Any] = BlendedMegatronDatasetBuilder(kind, num_samples, lambda: True, dataset_config()).build()
    return datasets


def next_batch(
    iterator: Iterator[dict[str, Any]] | None,
    vocab_size: int,
    vp_stage: int | None,
    *,
    whole: bool,
    refuse: Callable[[DataError], None],
) -> Batch:
    """This rank's part of the next micro-batch; None for what its pipeline stage does not need.

    Args:
        iterator: gives samples, collated; None on ranks that are sent theirs.
        vocab_size: of the model.
        vp_stage: virtual pipeline stage.
        whole: without it that is tokens and positions on the first stage, labels and mask on the last, nothing between.
        refuse: is told of a batch with ids outside the vocabulary. Ids of the vocabulary stand in for them, so that
            this rank computes on until all of them hear of it: one that left would leave the others waiting.
    """
    args = get_args()
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last or whole):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
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
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=whole,  # so called, it is all of the batch
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return mine


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
    """The first samples of a dataset, collated.

    Raises:
        DataError: as `check_token_ids`; on all ranks, which all have the same samples.
    """
    batch = torch.utils.data.default_collate([dataset[i % len(dataset)] for i in range(batch_size)])
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
