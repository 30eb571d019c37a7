"""Before the first step: is the teacher the model that it should be? A broken teacher must not train a student.

Its cross entropy on the run's first batch must be better than guessing: that finds weights that are zero or random, or
another tokenizer, but not experts or layers in a wrong order, which cost less than all that a model knows. Where losses
were recorded for the checkpoint (`checkpoint.reference`) the teacher, as it was loaded and sharded, computes the
same tokens again, and must give each the same loss up to rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from torch import Tensor

from megatron_slim.aliases import Function, Sample
from megatron_slim.architecture.context_parallel import local_positions
from megatron_slim.checkpoint.records import REFERENCE
from megatron_slim.checkpoint.reference import Reference, read_reference
from megatron_slim.distillation.losses import TokenLosses
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.errors import CheckpointError
from megatron_slim.teacher_cache.guessing import judge_teacher
from megatron_slim.training.batches import STATES, Batch, Repeated, first_batch, reference_batch

logger = logging.getLogger(__name__)

# Mean difference per token, in nats, that is still rounding. In fp32 it is some 1e-5; in 16 bits 0.01 to 0.03, routers
# that decide otherwise included. Two layers exchanged change the tokens of a trained model by tenths of a nat and more.
FP32_NATS, HALF_NATS, FP8_NATS = 0.003, 0.1, 0.2

Measure = Callable[[Tensor, Tensor], Tensor]  # teacher's losses [b, s] and loss mask [b, s] to one number
NextBatch = Callable[[Iterator[Sample], int | None], Batch]


def check_teacher(
    chunks: Sequence[DistillationModel], next_batch: NextBatch, dataset: MegatronDataset, vocab_size: int
) -> None:
    """Run the teacher once or twice through the pipeline; all ranks raise together.

    Args:
        chunks: this rank's virtual pipeline stages, teachers attached.
        next_batch: gives this rank's part of a batch, from an iterator and the virtual stage.
        dataset: where the first batch comes from.
        vocab_size: of the model.

    Raises:
        CheckpointError: its cross entropy is not finite or no better than guessing, or not what was recorded.
        DataError: the first batch has token ids outside the vocabulary.
    """
    args = get_args()
    where = Path(args.teacher_load or args.teacher_cache)
    reference = read_reference(where, vocab_size) if args.teacher_load is not None else None
    batch = first_batch(dataset, args.eval_micro_batch_size, vocab_size)
    judge_teacher(_measured(chunks, next_batch, batch, _mean), vocab_size, where)
    if reference is not None:
        batch, losses = reference_batch(reference, args.eval_micro_batch_size, args.seq_length)
        found = _measured(chunks, next_batch, batch, partial(_mean_difference, losses))
        judge_difference(found, tolerance_of(reference, chunks), where)
    elif torch.distributed.get_rank() == 0 and args.teacher_load is not None:
        logger.info(f"no {REFERENCE} in {where}: its losses are compared with guessing only")


def tolerance_of(reference: Reference, chunks: Sequence[DistillationModel]) -> float:
    """Nats of rounding between the recorded losses and these teachers'."""
    teachers = [chunk.teacher for chunk in chunks if chunk.teacher is not None]
    if any(teacher.config.fp8 for teacher in teachers):
        return FP8_NATS
    dtypes = {parameter.dtype for teacher in teachers for parameter in teacher.parameters()}
    return FP32_NATS if reference.dtype == "float32" and dtypes <= {torch.float32} else HALF_NATS


def _mean(teacher_lm: Tensor, loss_mask: Tensor) -> Tensor:
    return (teacher_lm * loss_mask).sum() / loss_mask.sum()


def _mean_difference(expected: Tensor, teacher_lm: Tensor, loss_mask: Tensor) -> Tensor:
    return _mean((teacher_lm - expected.to(teacher_lm.device)).abs(), loss_mask)


def _measured(
    chunks: Sequence[DistillationModel], next_batch: NextBatch, batch: dict[str, Tensor], measure: Measure
) -> float:
    """What ``measure`` gives on the last stage, the largest of all ranks; infinity where it is not finite."""

    def step(iterator: Iterator[Sample], model: DistillationModel) -> tuple[Tensor, Function]:
        mine = next_batch(iterator, model.vp_stage)
        recorded = {} if mine.get(STATES) is None else {"teacher_hidden": mine[STATES]}
        output = model(mine["tokens"], mine["position_ids"], None, mine["labels"], **recorded)
        return output, partial(_on_last_stage, measure, mine["loss_mask"])

    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    found = _run_forward(step, list(chunks), Repeated(batch))
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    # -inf from the stages that saw no loss; NaN would vanish in MAX, so it travels as +inf.
    value = found[0].reshape(1).float() if found else torch.full((1,), -math.inf, device=torch.cuda.current_device())
    value = torch.where(torch.isnan(value), torch.full_like(value, math.inf), value)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)


def _on_last_stage(measure: Measure, loss_mask: Tensor | None, output: Tensor, non_loss_data: bool = True) -> Tensor:
    (teacher_lm,) = TokenLosses.unstack(output, has_teacher=True)["teacher_lm"]
    assert loss_mask is not None
    return measure(_whole_sequence(teacher_lm, loss_mask.shape[-1]), loss_mask)


def _whole_sequence(values: Tensor, length: int) -> Tensor:
    """Values [b, length] from those that each context-parallel rank has."""
    group = parallel_state.get_context_parallel_group()
    positions = local_positions(group, length)
    if positions is None:
        return values
    whole = values.new_zeros(len(values), length)
    whole[:, positions] = values
    torch.distributed.all_reduce(whole, group=group)
    return whole


@torch.no_grad()
def _run_forward(step: Function, chunks: list[DistillationModel], iterator: Iterator[Sample]) -> list[Tensor]:
    """One micro-batch (interleaved: as few as its schedule takes) forward; what the last stage's loss function gave."""
    interleaved = len(chunks) > 1
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iterator] * len(chunks) if interleaved else iterator,
        model=chunks if interleaved else chunks[0],
        num_microbatches=stages if interleaved else 1,
        seq_length=get_args().seq_length,
        micro_batch_size=get_args().eval_micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


def judge_difference(nats: float, tolerance: float, where: Path) -> None:
    """Say how far the teacher's losses are from those recorded, or refuse it.

    Raises:
        CheckpointError: further than rounding.
    """
    if not nats <= tolerance:
        raise CheckpointError(
            f"the teacher's losses differ from {REFERENCE} by {nats:.4g} nats a token, {tolerance} is rounding",
            where=str(where),
            fix="its weights are not, or not in the order, of the model that was evaluated: convert or copy it again; "
            "if it was changed on purpose, run megatron-slim evaluate --record",
        )
    if torch.distributed.get_rank() == 0:
        logger.info(f"teacher: the losses of {REFERENCE} to {nats:.2g} nats a token")
