"""The arguments with which ``plan`` and ``prune`` take statistics that were made before."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.statistics import Statistics

FLAG = "--carry-statistics"


@dataclass(frozen=True)
class Given:
    """Statistics made before.

    Attributes:
        file: of the statistics, or a pruned checkpoint that has them.
        carried: they are of the model before the pruning, and go through its plan.
    """

    file: Path
    carried: bool = False

    def read(self, source: Checkpoint) -> Statistics:
        """Those of a source.

        Raises:
            SlimError: they are of another model.
        """
        from megatron_slim.pruning.carried_statistics import read_carried_statistics
        from megatron_slim.pruning.statistics import Statistics
        from megatron_slim.streaming.fingerprint import fingerprint_like

        if self.carried:
            stats = read_carried_statistics(self.file, source)
            logger.info(
                f"{self.file}: statistics of before that pruning, carried through its plan; nothing is measured"
            )
            return stats
        stats = Statistics.load(self.file)
        stats.check(source.shape, fingerprint_like(source, stats.source), where=str(self.file))
        return stats


def add_statistics_arguments(parser: argparse.ArgumentParser) -> None:
    """Where statistics that were made before come from."""
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="existing statistics, or a pruned checkpoint that has them: nothing is measured",
    )
    parser.add_argument(
        FLAG,
        type=Path,
        metavar="DIR",
        help="the pruned checkpoint that --load was trained from: its statistics, for what its plan kept",
    )


def given_statistics(args: argparse.Namespace) -> Given | None:
    """What `add_statistics_arguments` gave."""
    if args.carry_statistics is not None:
        return Given(args.carry_statistics, carried=True)
    return None if args.stats is None else Given(args.stats)
