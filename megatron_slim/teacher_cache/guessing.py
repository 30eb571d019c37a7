"""Is a teacher better than guessing? One that is not must not train a student, nor be recorded."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from megatron_slim.errors import CheckpointError

logger = logging.getLogger(__name__)

GUESSING = 0.95  # a teacher whose cross entropy is above this share of log V predicts nothing of use
FIX = "check the checkpoint and that the data was tokenised with its tokenizer, or pass --no-teacher-check"


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
            fix=FIX,
        )
    if torch.distributed.get_rank() == 0:
        logger.info(f"teacher lm loss on the first batch: {loss:.6f} (guessing: {uniform:.6f})")
