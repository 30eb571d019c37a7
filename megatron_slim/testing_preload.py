"""What the server process of `testing.run_distributed` imports once, before it forks ranks; not for import."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib

# Nothing of what is imported becomes garbage: looking for it takes a sixth of the time here, and as much in every rank.
gc.disable()

from megatron_slim.compat import device  # noqa: E402

device.install()
for _module in (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.tokenizers.text",  # transformers: 5 s, and every rank would import it for its NullTokenizer
    "megatron_slim.training.pretrain",
):
    importlib.import_module(_module)


def _share_between_ranks() -> None:
    """Do once what Megatron does anew in every process, and what takes longer than a step of a tiny model."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    # The help of every flag is parsed out of the source of the configuration classes, three times in a run.
    parse = ArgumentGroupFactory._get_field_docstrings
    parsed = functools.cache(lambda source: parse(object.__new__(ArgumentGroupFactory), source))
    ArgumentGroupFactory._get_field_docstrings = lambda self, source: parsed(source)
    add_megatron_arguments(argparse.ArgumentParser())
    # A rank that saves starts a process for a queue: forked, as Megatron itself does where a persistent worker writes.
    filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = ("fork",)


_share_between_ranks()
gc.freeze()
gc.enable()
