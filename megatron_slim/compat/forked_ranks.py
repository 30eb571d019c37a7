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


def share() -> None:
    """Make the changes of this module, and parse the help that all ranks need."""
    from megatron.training.arguments import add_megatron_arguments

    HELP_OF_FLAGS.apply()
    add_megatron_arguments(argparse.ArgumentParser())
