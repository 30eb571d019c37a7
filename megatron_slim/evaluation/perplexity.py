"""Token-weighted loss and perplexity of a checkpoint, one block in memory at a time.

Within a sample of S tokens position i predicts token i + 1, so S - 1 tokens count; MTP depth k predicts token
i + 1 + k, so S - 1 - k tokens count there. Of a sample set those count that do in training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.reference import Reference
from megatron_slim.checkpoint.remarks import remarks
from megatron_slim.compat import runtime
from megatron_slim.data import Tokens
from megatron_slim.errors import DataError
from megatron_slim.evaluation.samples import read_samples_of
from megatron_slim.evaluation.teacher import Teacher
from megatron_slim.sample_set import is_sample_set
from megatron_slim.streaming.model_input import Samples

if TYPE_CHECKING:
    from megatron_slim.evaluation.losses import Head

logger = logging.getLogger(__name__)
Stderr: TypeAlias = float | tuple[float | None, ...] | None


@dataclass(frozen=True)
class Evaluation:
    """Losses of a checkpoint on some samples; standard errors are over samples (`means.SampleMeans`).

    Attributes:
        loss: mean cross entropy in nats over all predicted tokens.
        tokens: number of tokens predicted by the main head.
        mtp_loss: the same mean for each MTP depth, depth 1 first.
        token_losses: nats of every predicted token of the first samples, what a `Reference` is made of.
        kl: with a teacher, mean KL(teacher || student) in nats over the tokens of ``loss``.
        top1_agreement: share of these positions at which both have the same most probable token.
        teacher_loss: the teacher's ``loss``.
        loss_difference: ``loss`` less ``teacher_loss``.
        mtp_kl: as ``kl``, between the MTP heads of each depth that both have.
        mtp_top1_agreement: as ``top1_agreement``, between these heads.
        stderr: standard error of each of them by name, a tuple where it is one; None where there is one sample.
    """

    loss: float
    tokens: int
    mtp_loss: tuple[float, ...]
    token_losses: tuple[tuple[float, ...], ...] = ()
    kl: float | None = None
    top1_agreement: float | None = None
    teacher_loss: float | None = None
    loss_difference: float | None = None
    mtp_kl: tuple[float, ...] = ()
    mtp_top1_agreement: tuple[float, ...] = ()
    stderr: Mapping[str, Stderr] = field(default_factory=dict)

    @classmethod
    def of(cls, heads: Sequence[Head], tokens: int, token_losses: tuple[tuple[float, ...], ...]) -> Evaluation:
        """What the heads were found to predict, the main one first."""
        main, mtp = heads[0], heads[1:]
        single = {
            "loss": main.loss,
            "kl": main.kl,
            "top1_agreement": main.top1_agreement,
            "teacher_loss": main.teacher_loss,
            "loss_difference": main.difference,
        }
        found = {name: mean for name, mean in single.items() if mean is not None}
        by_depth = {
            "mtp_loss": [head.loss for head in mtp],
            "mtp_kl": [head.kl for head in mtp if head.kl is not None],
            "mtp_top1_agreement": [head.top1_agreement for head in mtp if head.top1_agreement is not None],
        }
        stderr: dict[str, Stderr] = {name: mean.stderr for name, mean in found.items()}
        stderr |= {name: tuple(mean.stderr for mean in means) for name, means in by_depth.items()}
        values: dict[str, Any] = {name: mean.value for name, mean in found.items()}
        values |= {name: tuple(mean.value for mean in means) for name, means in by_depth.items()}
        return cls(tokens=tokens, token_losses=token_losses, stderr=stderr, **values)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of the perplexity, to first order in that of the loss (delta method)."""
        error = self.stderr.get("loss")
        return self.perplexity * error if isinstance(error, float) else None

    def losses(self) -> dict[str, Any]:
        """Losses as in a command's ``--json``."""
        return {
            **self._with_errors("loss"),
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity_stderr,
            "tokens": self.tokens,
            **self._with_errors("mtp_loss"),
        }

    def comparison(self) -> dict[str, Any]:
        """What a teacher adds to a command's ``--json``; nothing without one."""
        if self.kl is None:
            return {}
        return self._with_errors(
            "teacher_loss", "loss_difference", "kl", "top1_agreement", "mtp_kl", "mtp_top1_agreement"
        )

    def _with_errors(self, *names: str) -> dict[str, Any]:
        """Figures, each with its error under its name with ``_stderr``."""
        pairs = ((name, getattr(self, name), self.stderr.get(name)) for name in names)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for name, figure, error in pairs
            for key, value in ((name, figure), (f"{name}_stderr", error))
        }


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint,
    samples: Tokens | Samples,
    *,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    teacher: Teacher | None = None,
) -> Evaluation:
    """Loss of a checkpoint on samples, and its distance from a teacher.

    Args:
        checkpoint: the model.
        samples: token ids [samples, sequence], from `read_evaluation_data`, or what `read_samples_of` gives.
        micro_batch_size: samples in one forward pass.
        dtype: of weights and activations, see `runtime.default_dtype`; logits are always fp32, sums fp64.
        teacher: is compared with the model, where given; `Teacher.check` says whether it can be.

    Raises:
        CheckpointError: a loss is not a finite number.
    """
    runtime.init_single_process()
    from megatron_slim.evaluation.losses import HeadLosses

    dtype, given = dtype or runtime.default_dtype(), Samples.of(samples)
    forward = HeadLosses(checkpoint, given, micro_batch_size=micro_batch_size, dtype=dtype)
    if teacher is not None:
        forward.teacher = teacher.states(checkpoint.shape, given, micro_batch_size=micro_batch_size, dtype=dtype)
    forward.run("evaluating")
    return Evaluation.of(forward.heads, given.number(1), forward.token_losses)


def evaluate_on(
    checkpoint: Checkpoint,
    data: Path | Tokens,
    *,
    seq_length: int | None,
    num_samples: int | None,
    seed: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    teacher: Teacher | None = None,
) -> tuple[Evaluation, Samples]:
    """`evaluate` on data as a caller gives them, and the samples that they gave; logs what is cast to ``dtype``."""
    samples = read_samples_of(data, checkpoint.shape, seq_length=seq_length, num_samples=num_samples, seed=seed)
    if teacher is not None:
        teacher.check(checkpoint.shape, samples.read)
    for line in remarks(checkpoint, dtype, "evaluation"):
        logger.info(line)
    return evaluate(checkpoint, samples, micro_batch_size=micro_batch_size, dtype=dtype, teacher=teacher), samples


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    load: Path,
    data: Path,
    *,
    seq_length: int | None = None,
    num_samples: int | None = None,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    record: bool = False,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Evaluate what was opened of the directory ``load``; what megatron-slim evaluate runs.

    ``record`` writes a `Reference` into ``load``.

    Returns:
        `Evaluation.losses`, ``samples``, ``seq_length``, ``dtype`` and ``load``; with a teacher also
        `Evaluation.comparison`.
    """
    if micro_batch_size < 1:
        raise DataError(f"--micro-batch-size {micro_batch_size} is not a positive number")
    if record and is_sample_set(data):
        raise DataError(
            "is a sample set, of which --record keeps no losses", where=str(data), fix="give a .bin/.idx pair"
        )
    dtype = dtype or runtime.default_dtype()
    result, samples = evaluate_on(
        checkpoint,
        data,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=seed,
        micro_batch_size=micro_batch_size,
        dtype=dtype,
        teacher=teacher,
    )
    if record:
        Reference.of(samples.ids.tolist(), result.token_losses, dtype_name(dtype)).save(load)
    return {
        **result.losses(),
        **result.comparison(),
        "samples": samples.read.shape[0],
        "seq_length": samples.read.shape[1],
        "dtype": dtype_name(dtype),
        "load": str(load),
    }
