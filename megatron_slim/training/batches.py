"""Batches of training: what a stage needs of a micro-batch, the first batch, and one that was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

from megatron_slim.aliases import Sample
from megatron_slim.checkpoint.reference import Reference
from megatron_slim.data import check_ids
from megatron_slim.errors import DataError

LOOKED_AT = 1000  # samples, for the first that is not padding alone
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
STATES = "states"  # of a recorded teacher: uint8 [heads, S, bytes of a row]
DAMAGED = "damaged"  # what is wrong with a sample where its data are not what was written, else nothing
Batch = dict[str, Tensor | None]


@dataclass(frozen=True)
class Entry:
    """What a sample has under a key, and ranks that are sent it must know before.

    Attributes:
        shape: of one sample's.
        dtype: as the data set gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


def next_batch(
    iterator: Iterator[Sample] | None,
    vocab_size: int,
    vp_stage: int | None,
    *,
    micro_batch_size: int,
    whole: bool,
    refuse: Callable[[DataError], None],
    documents: bool = False,
    for_last: Mapping[str, Entry] | None = None,
) -> Batch:
    """This rank's part of the next micro-batch; None for what its pipeline stage does not need.

    Args:
        iterator: gives samples, collated; None on ranks that are sent theirs.
        vocab_size: of the model.
        vp_stage: virtual pipeline stage.
        micro_batch_size: samples in it, which validation may have another number of.
        whole: without it that is tokens and positions on the first stage, labels and mask on the last, nothing between.
        refuse: is called for a batch with ids outside the vocabulary, for which ids of the vocabulary stand in, and for
            one with damaged samples. This rank computes on until all hear of it: one that left would leave the others
            waiting.
        documents: every stage is given the position ids, which say where documents begin.
        for_last: further entries of a sample, by key, that the last stage alone is given.
    """
    args = get_args()
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    more: dict[str, Entry] = dict(for_last or {}) if last else {}
    if documents and not (first or whole):
        more["position_ids"] = Entry((args.seq_length,), torch.int64)
    if not (first or last or whole or more):
        return dict.fromkeys(BATCH_KEYS)
    batch: Sample = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None
        sample = next(iterator)
        try:
            check_token_ids(sample, vocab_size)
        except DataError as error:
            refuse(error)
            sample |= {key: sample[key].clamp(0, vocab_size - 1) for key in ("tokens", "labels")}
        for message in filter(None, sample.get(DAMAGED, ())):
            refuse(DataError(message))
        batch = {key: sample[key].cuda(non_blocking=True) for key in (*BATCH_KEYS, *more)}
    found: Batch = dict.fromkeys(BATCH_KEYS)
    if first or last or whole:
        found |= _megatrons_part(batch, first, last, whole, micro_batch_size)
    return found | {key: _sent(batch.get(key), entry, micro_batch_size) for key, entry in more.items()}


def _megatrons_part(batch: Sample, first: bool, last: bool, whole: bool, micro_batch_size: int) -> Batch:
    """What Megatron sends the ranks of a stage, of its own keys."""
    mine: Batch = get_batch_on_this_tp_rank(
        {key: batch[key] for key in BATCH_KEYS if key in batch},
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=get_args().seq_length,
        mtp_on_this_rank=whole,  # so called, it is all of the batch
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return mine


def _sent(values: Tensor | None, entry: Entry, micro_batch_size: int) -> Tensor:
    """An entry of a micro-batch, from the tensor-parallel rank that reads the data to the others."""
    if values is None:
        size = (micro_batch_size, *entry.shape)
        values = torch.empty(size, dtype=entry.dtype, device=torch.cuda.current_device())
    group = parallel_state.get_tensor_model_parallel_group()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    torch.distributed.broadcast(values.contiguous(), source, group=group)
    return values


def check_token_ids(sample: Sample, vocab_size: int) -> None:
    """Refuse samples, collated, with token ids that the model has no embedding for.

    Raises:
        DataError: names the file of the first one.
    """
    ids = torch.cat([sample[key] for key in ("ids", "tokens", "labels") if key in sample], dim=1)
    lowest, highest = ids.amin(dim=1).tolist(), ids.amax(dim=1).tolist()
    for row, ends in enumerate(zip(lowest, highest, strict=True)):
        check_ids(*ends, vocab_size, sample["where"][row] if "where" in sample else "training data")


def first_batch(dataset: MegatronDataset, batch_size: int, vocab_size: int) -> dict[str, Tensor]:
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
