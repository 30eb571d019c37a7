"""Whether documents of a sample see each other in a run, and with which flags they can be kept apart."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_slim.architecture.kinds import KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import DataError
from megatron_slim.sample_set import SampleSet, is_sample_set, open_samples
from megatron_slim.training.blends import read_sources

Opened = TypeVar("Opened")
_HELD = 64  # directories that a run has open at most: those of a blend, of three parts
# What marks documents in data that do not: of samples it is known.
_MARKS = {
    "eod_mask_loss": "samples say themselves which tokens count",
    "reset_position_ids": "samples say themselves where documents begin",
    "reset_attention_mask": "samples say themselves whether documents see each other",
}


def open_once(read: Callable[[Path], Opened], path: Path) -> Opened:
    """What a directory holds, opened once in this process, as long as its files stay as they are.

    Args:
        read: opens it, `open_samples` or `cache.open_cache`.
        path: a sample set, or a teacher's cache.

    Raises:
        DataError: as ``read``.
    """
    if not path.is_dir():
        return read(path)
    states = ((entry.name, entry.stat()) for entry in os.scandir(path))
    files = tuple(sorted((name, found.st_ino, found.st_size, found.st_mtime_ns) for name, found in states))
    opened: Opened = _opened(read, path, files)
    return opened


@lru_cache(maxsize=_HELD)
def _opened(read: Callable[[Path], Any], path: Path, files: tuple[Any, ...]) -> Any:
    return read(path)


def prefixes_of(args: Namespace) -> list[str]:
    """All data sets that are named, each once.

    Raises:
        DataError: data are given in more than one way.
    """
    blends = read_sources(args).blends()
    return list({prefix: None for blend in blends if blend is not None for prefix in blend.prefixes})


def will_be_made(args: Namespace, prefix: str) -> bool:
    """Whether a data set is a sample set that this run makes of conversations."""
    return Path(prefix) in getattr(args, "chats", {})


def sample_sets(args: Namespace) -> list[SampleSet]:
    """The sample sets that a run is given, as far as they are there; none where it is given documents.

    Raises:
        DataError: it is given both, or samples whose documents see each other and others, or a set is damaged.
    """
    prefixes = prefixes_of(args)
    there = {prefix: is_sample_set(Path(prefix)) for prefix in prefixes}
    are_samples = {prefix: there[prefix] or will_be_made(args, prefix) for prefix in prefixes}
    if not any(are_samples.values()):
        return []
    if others := [prefix for prefix in prefixes if not are_samples[prefix]]:
        first = next(prefix for prefix in prefixes if are_samples[prefix])
        raise DataError(
            f"is a sample set, which does not go with documents such as {others[0]}",
            where=first,
            fix="give data of one kind",
        )
    sets = [open_once(open_samples, Path(prefix)) for prefix in prefixes if there[prefix]]
    if len({each.documents for each in sets}) > 1:
        apart, together = (next(each.path for each in sets if each.documents is is_apart) for is_apart in (True, False))
        raise DataError(
            f"has documents that do not see each other, {together} has others",
            where=str(apart),
            fix="train on samples of one kind",
        )
    return sets


def keeps_documents_apart(args: Namespace) -> bool:
    """Whether attention and Gated DeltaNet begin anew at every document.

    Args:
        args: Megatron's arguments and ours, as parsed.

    Raises:
        DataError: as `sample_sets`, or data are given in more than one way.
    """
    packed = args.reset_attention_mask or getattr(args, "chats", None)
    return bool(packed) or any(each.documents for each in sample_sets(args))


def document_violations(shape: ModelShape, args: Namespace) -> list[str]:
    """What is wrong with the flags of a run with documents, in sentences.

    Args:
        shape: sizes of the student.
        args: Megatron's arguments and ours, as parsed.

    Raises:
        DataError: as `keeps_documents_apart`.
    """
    found = []
    if sample_sets(args) or getattr(args, "chats", None):
        found = mark_violations(args)
    elif args.reset_attention_mask and not args.reset_position_ids:
        found = ["--reset-attention-mask needs --reset-position-ids, which say where documents begin"]
    return found + (list(_layout_violations(shape, args)) if keeps_documents_apart(args) else [])


def mark_violations(args: Namespace) -> list[str]:
    """Flags that mark documents, of which samples say it themselves, in sentences."""
    given = [name for name in _MARKS if getattr(args, name, False)]
    return [f"{_flag(name)} does not go with a sample set: {_MARKS[name]}" for name in given]


def _layout_violations(shape: ModelShape, args: Namespace) -> Iterator[str]:
    """What Megatron's layers cannot do with documents apart."""
    one = "documents that do not see each other go through layers one sample at a time"
    impossible = "not possible with documents that do not see each other"
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        if (size := getattr(args, name, None)) not in (None, 1):
            yield f"{_flag(name)} {size}: {one}; give {_flag(name)} 1, and longer samples for as many tokens"
    if args.context_parallel_size > 1:
        yield f"--context-parallel-size {args.context_parallel_size} is {impossible}"
    for kind in (KINDS[name] for name in dict.fromkeys(shape.layer_types)):
        for name in kind.not_with_documents:
            if getattr(args, name):
                yield f"{_flag(name)} is {impossible}: Megatron's {kind.noun} refuses it"
    if getattr(args, "cuda_graph_impl", "none") != "none" or getattr(args, "enable_cuda_graph", False):
        yield f"--cuda-graph-impl is {impossible}: every sample has others"
    if args.overlap_moe_expert_parallel_comm:
        yield f"--overlap-moe-expert-parallel-comm is {impossible}: it runs layers by another way"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
