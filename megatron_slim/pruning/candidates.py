"""What a plan is measured on: the best candidates of a budget are evaluated as they are cut, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.plan import Plan
    from megatron_slim.streaming.model_input import Samples

logger = logging.getLogger(__name__)

MOST_SAMPLES = 64  # of calibration that layers are measured on


@dataclass(frozen=True)
class Measuring:
    """How the candidates of a budget, or single layers, are measured.

    Attributes:
        data: what they are evaluated on.
        num_samples: samples drawn from it; None: all.
        seq_length: tokens of a sample; needed with a .bin/.idx pair.
        top: how many candidates, the best first.
    """

    data: Path
    num_samples: int | None
    seq_length: int | None
    top: int

    def samples(self, source: Checkpoint) -> Samples:
        """The samples.

        Raises:
            DataError: the data do not fit the model.
        """
        from megatron_slim.evaluation.samples import read_samples_of

        return read_samples_of(
            self.data, source.shape, seq_length=self.seq_length, num_samples=self.num_samples, seed=0
        )

    def losses(self, source: Checkpoint) -> Callable[[Plan], float]:
        """Read the data; gives what evaluates the result of a plan: nats per token of the main head.

        Raises:
            DataError: the data do not fit the model.
        """
        from megatron_slim.evaluation.perplexity import evaluate
        from megatron_slim.pruning.apply import PrunedCheckpoint

        samples = self.samples(source)

        def loss(plan: Plan) -> float:
            found = evaluate(PrunedCheckpoint(plan, source, check_source=False), samples).loss
            assert plan.search is not None, "only candidates are measured"
            sizes = plan.search.candidates[plan.search.chosen].sizes
            logger.info(f"candidate {', '.join(f'{axis} {size}' for axis, size in sizes.items())}: loss {found:.4f}")
            return found

        return loss
