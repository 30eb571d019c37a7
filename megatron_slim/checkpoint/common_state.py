"""What a run saved that is not sharded: its arguments, its schedule, the optimizer's groups of parameters."""

from __future__ import annotations

import warnings
from pathlib import Path

import megatron_slim.mcore

from megatron.core.dist_checkpointing.serialization import load_common_state_dict

from megatron_slim.aliases import JsonObject
from megatron_slim.errors import CheckpointError

OTHER_ITERATION = "resume from another iteration, with --ckpt-step"


def read_common_state(directory: Path, *, fix: str = OTHER_ITERATION) -> JsonObject:
    """What Megatron saved that is not sharded: the arguments of the run, its schedule, groups of parameters.

    Args:
        directory: of an iteration.
        fix: what to do where it cannot be read.

    Raises:
        CheckpointError: it is damaged, or holds something that Megatron would not load either.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # not started yet
            found = load_common_state_dict(str(directory))
    except Exception as error:  # any exception: what unpickling damaged bytes raises is anything
        raise CheckpointError(
            f"its common state cannot be read: {type(error).__name__}: {error}", where=str(directory), fix=fix
        ) from None
    assert isinstance(found, dict)
    return found
