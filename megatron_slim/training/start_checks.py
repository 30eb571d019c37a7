"""What a run does not take from its checkpoints as it is: reported, or refused where Megatron would not notice."""

from __future__ import annotations

import logging
from argparse import Namespace

import torch

from megatron_slim.architecture.family import MTP
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.remarks import remarks
from megatron_slim.errors import CheckpointError
from megatron_slim.training.arguments import load_balancing_note
from megatron_slim.training.elastic import elastic_note
from megatron_slim.training.missing_libraries import library_note
from megatron_slim.training.optimizer_flags import rate_note
from megatron_slim.training.slim_arguments import WITHOUT_MTP
from megatron_slim.training.spec import RunSpec
from megatron_slim.training.teacher_config import DTYPES
from megatron_slim.training.train_only import train_only_note, trains_router

logger = logging.getLogger(__name__)


def say_remarks(shape: ModelShape, start: Checkpoint | None, teacher: Checkpoint | None, args: Namespace) -> None:
    """Say which weights are rounded, and which rows are padding.

    Args:
        shape: the student's.
        start: what its weights come from.
        teacher: what those of the teacher come from.
        args: Megatron's, as parsed.
    """
    own = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    of_teacher = DTYPES[args.teacher_dtype] if args.teacher_dtype else own
    rows = padded_vocab_size(shape, args.make_vocab_size_divisible_by)
    for name, checkpoint, dtype in (("student", start, own), ("teacher", teacher, of_teacher)):
        for line in remarks(checkpoint, dtype, name, rows) if checkpoint is not None else ():
            logger.info(line)


def say_notes(spec: RunSpec) -> None:
    """Say what a run does that its flags do not: on one rank, once it is checked."""
    args = spec.args
    if args.rank != 0:
        return
    balancing = load_balancing_note(spec.student, spec.given, args.moe_router_load_balancing_type)
    if not trains_router(spec.student, spec.train_only):
        balancing = None  # there is none, which the note on what is trained says
    parts = train_only_note(spec.student, spec.train_only)
    stages = spec.stages.table() if args.pipeline_model_parallel_size > 1 else None
    budgets = elastic_note(spec.given, spec.elastic, spec.source)
    for note in (library_note(), parts, balancing, stages, budgets, rate_note(args, spec.student.hidden_size)):
        if note is not None:
            logger.info(note)


def check_mtp(checkpoint: Checkpoint) -> None:
    """See that a run resumes with the MTP block that it was saved with: optimizer and config.json have it.

    Args:
        checkpoint: that the run resumes from.

    Raises:
        CheckpointError: the block is left out.
    """
    if any(name.startswith(MTP) for name in checkpoint.left_out):
        raise CheckpointError(
            f"was saved with an MTP block, this run has {WITHOUT_MTP}",
            where=str(checkpoint.path),
            fix=f"leave {WITHOUT_MTP} out, or start a new run: --pretrained-checkpoint, not --load, and another --save",
        )


def check_rows(checkpoint: Checkpoint, args: Namespace) -> None:
    """See that optimizer state saved in the layout of buffers finds buffers of the same layout.

    With another padding of the vocabulary all that follows the embedding is shifted; where the buffers' own padding
    takes up the difference, Megatron does not notice.

    Args:
        checkpoint: that the run resumes from.
        args: Megatron's, as parsed.

    Raises:
        CheckpointError: the padding differs.
    """
    if args.no_load_optim or args.finetune or not isinstance(checkpoint, DistCheckpoint):
        return
    own = padded_vocab_size(checkpoint.shape, args.make_vocab_size_divisible_by)
    if checkpoint.optimizer_by_buckets and (other := set(checkpoint.vocab_rows.values()) - {own}):
        raise CheckpointError(
            f"saved with a vocabulary padded to {max(other)} rows, this run pads it to {own}",
            where=str(checkpoint.path),
            fix=f"give --make-vocab-size-divisible-by {max(other)}, or --no-load-optim to start with a new optimizer",
        )
