"""What Megatron does anew in every process, done once for the ranks that tests fork."""

from __future__ import annotations

import argparse
import functools

from megatron_slim.aliases import Function
from megatron_slim.compat.patch import NOT_REPORTED, SPEED, Patch


def _parsed_once(parse: Function) -> Function:
    from megatron.training.argument_utils import ArgumentGroupFactory

    parsed = functools.cache(lambda source: parse(object.__new__(ArgumentGroupFactory), source))
    return lambda self, source: parsed(source)


HELP_OF_FLAGS = Patch(
    name="help of flags",
    kind=SPEED,
    why="The help of every flag is parsed out of the source of the configuration classes, three times in a run.",
    upstream=NOT_REPORTED,
    targets=("megatron.training.argument_utils:ArgumentGroupFactory._get_field_docstrings",),
    changes=(_parsed_once,),
)


def _forked(_: object) -> tuple[str]:
    return ("fork",)


QUEUE_OF_WRITERS = Patch(
    name="queue of writers",
    kind=SPEED,
    why="A rank that saves starts a process for a queue, and does not fork it, as Megatron itself does where a "
    "persistent worker writes.",
    upstream=NOT_REPORTED,
    targets=(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue.__wrapped__.__defaults__",
    ),
    changes=(_forked,),
)
PATCHES = (HELP_OF_FLAGS, QUEUE_OF_WRITERS)


def share() -> None:
    """Make the changes of this module, and parse the help that all ranks need."""
    from megatron.training.arguments import add_megatron_arguments

    for patch in PATCHES:
        patch.apply()
    add_megatron_arguments(argparse.ArgumentParser())
