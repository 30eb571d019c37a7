"""How Megatron saves a checkpoint in the process that trains."""

from __future__ import annotations

import functools
import queue

from megatron_slim.aliases import Function
from megatron_slim.compat.patch import BUG, NOT_REPORTED, Patch


def _within_the_process(make: Function) -> Function:
    @functools.wraps(make)
    def made(*args: object, **kwargs: object) -> object:
        from megatron.training import get_args

        return make(*args, **kwargs) if get_args().async_save else queue.Queue()

    return made


RESULTS_OF_WRITING = Patch(
    name="results of writing",
    kind=BUG,
    why="What a rank has written it tells itself through a process that it starts, which imports torch to be able to "
    "read it and stays until the end. Only --async-save writes in a process of its own.",
    upstream=f"megatron/core/dist_checkpointing/strategies/filesystem_async.py; {NOT_REPORTED}",
    targets=("megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",),
    changes=(_within_the_process,),
)
