"""A teacher that students are compared with on the same samples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.compat import runtime
from megatron_slim.data import Tokens
from megatron_slim.errors import CheckpointError
from megatron_slim.files import sha256
from megatron_slim.streaming.model_input import Samples
from megatron_slim.streaming.samples import check_samples

if TYPE_CHECKING:
    from megatron_slim.evaluation.acceptance import Acceptance
    from megatron_slim.evaluation.losses import FinalStates
    from megatron_slim.evaluation.prompts import Prompts

logger = logging.getLogger(__name__)


class Teacher:
    """A teacher, its hidden states on the samples and its acceptance on the prompts that it was last asked for.

    What it has measured serves many students.

    Attributes:
        checkpoint: the model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """A teacher that has not seen samples."""
        self.checkpoint = checkpoint
        self._asked: tuple[object, ...] = ()
        self._last: FinalStates | None = None
        self._accepted: tuple[object, Acceptance] | None = None

    def check(self, shape: ModelShape, samples: Tokens) -> None:
        """Refuse a student of this shape, or samples, with which no comparison is possible.

        Raises:
            CheckpointError: the vocabularies differ.
            DataError: the teacher cannot read the samples.
        """
        self.check_vocabulary(shape)
        check_samples(samples, self.checkpoint.shape, where=f"{self.checkpoint.path} on the same samples")

    def check_vocabulary(self, shape: ModelShape) -> None:
        """Refuse a student of this shape if its vocabulary is another one.

        Raises:
            CheckpointError: it is.
        """
        own = self.checkpoint.shape.vocab_size
        if own != shape.vocab_size:
            raise CheckpointError(
                f"is a teacher with a vocabulary of {own}, the student has {shape.vocab_size}",
                where=str(self.checkpoint.path),
                fix="compare models of one tokenizer",
            )

    def states(
        self, shape: ModelShape, samples: Tokens | Samples, *, micro_batch_size: int, dtype: torch.dtype
    ) -> FinalStates:
        """What the teacher's heads are given, of those that a student of this shape has too."""
        given = Samples.of(samples)
        runtime.init_single_process()
        from megatron_slim.evaluation.losses import AHEAD, FinalStates

        wanted = tuple(AHEAD)[: 1 + min(self.checkpoint.shape.mtp_num_layers, shape.mtp_num_layers)]
        documents = b"" if given.documents is None else given.documents.tobytes()
        asked = (wanted, micro_batch_size, dtype, sha256(given.read.tobytes()), sha256(documents))
        if self._last is not None and self._asked == asked:
            return self._last
        self._last = None  # its memory is needed
        states = FinalStates(
            self.checkpoint,
            given.read,
            micro_batch_size=micro_batch_size,
            dtype=dtype,
            position_ids=given.documents,
        )
        states.wanted = wanted
        nbytes = len(wanted) * given.read.size * self.checkpoint.shape.hidden_size * dtype.itemsize
        logger.info(f"{self.checkpoint.path}: last hidden states of the teacher take {nbytes / 1e6:,.0f} MB of memory")
        states.run("evaluating the teacher")
        self._asked, self._last = asked, states
        return states

    def acceptance(self, prompts: Prompts, **options: Any) -> Acceptance:
        """Acceptance of its own drafts; arguments as `acceptance.measure_acceptance`."""
        asked = ([*map(tuple, prompts)], options)
        if self._accepted is None or self._accepted[0] != asked:
            from megatron_slim.evaluation.acceptance import measure_acceptance

            self._accepted = (asked, measure_acceptance(self.checkpoint, prompts, **options))
        return self._accepted[1]
