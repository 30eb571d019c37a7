"""Before the first step: does the teacher know anything of the data? A broken teacher must not train anybody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from torch import Tensor

from megatron_slim.distillation.losses import TokenLosses
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.errors import CheckpointError
from megatron_slim.training.data import Batch, RepeatedSample

GUESSING = 0.95  # a teacher whose cross entropy is above this share of log V has learnt nothing of use


def check_teacher(
    chunks: Sequence[DistillationModel],
    next_batch: Callable[[Iterator[Any], int | None], Batch],
    dataset: Any,
    vocab_size: int,
) -> None:
    """Compute the teacher's own cross entropy on the first batch, through the pipeline; all ranks raise together.

    Args:
        chunks: this rank's virtual pipeline stages, teachers attached.
        next_batch: gives this rank's part of a batch, from an iterator and the virtual stage.
        dataset: where the batch comes from.
        vocab_size: of the model.

    Raises:
        CheckpointError: it is not finite, or not better than guessing.
    """

    def step(iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next_batch(iterator, model.vp_stage)
        output = model(batch["tokens"], batch["position_ids"], None, batch["labels"])
        return output, partial(_teacher_loss, batch["loss_mask"])

    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    found = _run_forward(step, list(chunks), RepeatedSample(dataset, get_args().micro_batch_size))
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    # -inf from the stages that saw no loss; NaN would vanish in MAX, so it travels as +inf.
    loss = found[0].reshape(1).float() if found else torch.full((1,), -math.inf, device=torch.cuda.current_device())
    loss = torch.where(torch.isnan(loss), torch.full_like(loss, math.inf), loss)
    torch.distributed.all_reduce(loss, op=torch.distributed.ReduceOp.MAX)
    judge_teacher(float(loss), vocab_size, get_args().teacher_load)


def _teacher_loss(loss_mask: Tensor | None, output: Tensor, non_loss_data: bool = True) -> Tensor:
    losses = TokenLosses.unstack(output, has_teacher=True)
    assert losses.teacher_lm is not None and loss_mask is not None
    return (losses.teacher_lm * loss_mask).sum() / loss_mask.sum()


@torch.no_grad()
def _run_forward(step: Callable[..., Any], chunks: list[Any], iterator: Iterator[Any]) -> list[Tensor]:
    """One micro-batch (interleaved: as few as its schedule takes) forward; what the last stage's loss function gave."""
    interleaved = len(chunks) > 1
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iterator] * len(chunks) if interleaved else iterator,
        model=chunks if interleaved else chunks[0],
        num_microbatches=stages if interleaved else 1,
        seq_length=get_args().seq_length,
        micro_batch_size=get_args().micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


def judge_teacher(loss: float, vocab_size: int, where: Path) -> None:
    """Say what the teacher's cross entropy is, or refuse it.

    Raises:
        CheckpointError: not finite, or at least `GUESSING` of log V.
    """
    uniform = math.log(vocab_size)
    if not loss < GUESSING * uniform:
        raise CheckpointError(
            f"the teacher's cross entropy on the first batch is {loss:.4g}, guessing gives {uniform:.4g}",
            where=str(where),
            fix="check the checkpoint and that the data was tokenised with its tokenizer, or pass --no-teacher-check",
        )
    if torch.distributed.get_rank() == 0:
        print(f"teacher lm loss on the first batch: {loss:.6f} (guessing: {uniform:.6f})", flush=True)
