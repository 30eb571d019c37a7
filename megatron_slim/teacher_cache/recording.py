"""The directory of a recording: what it was begun with, and which of its shards are finished."""

from __future__ import annotations

import itertools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, remove, sole_writer, to_json, write_atomic
from megatron_slim.teacher_cache.cache import read_shard
from megatron_slim.teacher_cache.names import CACHE, HEAD, RECORDING, is_finished

# Of a shard, whose hidden states are in memory while the teacher is read once: enough that reading it takes a small
# part of the time, few enough that what is lost with a killed process is minutes of a GPU.
ROUND_TOKENS = 16 << 20
_OURS = re.compile(r"\.?(samples\.|recording\.|cache\.|config\.|head\.|tokens\.|loss_mask\.|position_ids\.|states-).*")
_PART_OF_MEMORY = 0.5
_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Recording:
    """A recording that has begun.

    Attributes:
        path: its directory.
        rounds: samples of each shard.
        heads: whose states are recorded.
    """

    path: Path
    rounds: tuple[range, ...]
    heads: int

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards that a rank has to record: its part of all, in turn, less what is finished."""
        return [number for number in range(rank, len(self.rounds), world) if not self.is_done(number)]

    def is_done(self, number: int) -> bool:
        """Whether a shard is finished: it is described when it is on the disk, and both files are still right."""
        try:
            found = read_shard(self.path, number, self.heads)
        except SlimError:
            return False
        return found.samples == self.rounds[number] and found.file.is_file()

    def wait(self) -> None:
        """Wait until the other processes have finished their shards; the launcher ends all where one fails."""
        while not all(map(self.is_done, range(len(self.rounds)))):
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def finish(self, description: Mapping[str, Any]) -> None:
        """Make it a cache, without what killed processes have left."""
        for name in os.listdir(self.path):
            if name.startswith("."):
                remove(self.path / name)
        write_atomic(self.path / CACHE, to_json(dict(description)))
        remove(self.path / RECORDING)


def divide(samples: int, most: int, workers: int) -> tuple[range, ...]:
    """Samples in shards of at most ``most``, alike for all workers.

    >>> divide(10, 4, 1), divide(10, 4, 2)
    ((range(0, 4), range(4, 7), range(7, 10)), (range(0, 3), range(3, 6), range(6, 8), range(8, 10)))
    """
    shards = min(samples, workers * -(-samples // (most * workers)))
    size, larger = divmod(samples, shards)
    return _ranges([size + (number < larger) for number in range(shards)])


def _ranges(sizes: Iterable[int]) -> tuple[range, ...]:
    """Ranges of these sizes, one after the other."""
    ends = itertools.accumulate(sizes, initial=0)
    return tuple(itertools.starmap(range, itertools.pairwise(ends)))


def samples_at_once(seq_length: int, number_bytes: int, workers: int, tokens: int | None) -> int:
    """Samples of a shard: as many as were asked for, or as fit into half of the memory that is free.

    Args:
        seq_length: positions of a sample.
        number_bytes: of the hidden state of a position, as it is computed.
        workers: processes of this machine.
        tokens: of a shard, where that was asked for.
    """
    if tokens is None:
        free = psutil.virtual_memory().available * _PART_OF_MEMORY / workers
        tokens = min(ROUND_TOKENS, int(free / number_bytes))
    return max(1, tokens // seq_length)


@contextmanager
def begin(
    path: Path, inputs: Mapping[str, Any], most: int, workers: int, asked: int | None
) -> Iterator[tuple[Recording, bool]]:
    """Begin a recording or take up one that was killed, as its only process of the kind.

    Args:
        path: its directory.
        inputs: everything that decides what is recorded, and the number of ``samples``.
        most: samples of a shard, of a new recording.
        workers: processes that record.
        asked: tokens of a shard, where that was asked for.

    Yields:
        The recording, and whether it is new: then the caller fills the directory and calls `declare`.

    Raises:
        SlimError: it is finished, was begun with other inputs or shards, or the directory holds something else.
    """
    path = path.absolute()
    check_place(path)
    with sole_writer(path):
        entries = check_place(path)
        if (path / RECORDING).is_file():
            yield taken_up(path, inputs, asked), False
            return
        _remove_beginning(path, entries)
        path.mkdir(exist_ok=True)
        yield Recording(path, divide(int(inputs["samples"]), most, workers), int(inputs["heads"])), True


def check_place(path: Path) -> list[str]:
    """Refuse a directory that a recording can neither begin nor continue in.

    Returns:
        The names in it.

    Raises:
        SlimError: it is finished, holds something else, or cannot be created.
    """
    if not path.absolute().parent.is_dir():
        raise SlimError("parent directory of the output does not exist", where=str(path), fix="create it first")
    if is_finished(path) or (path.exists() and not path.is_dir()):
        raise SlimError("output already exists", where=str(path), fix="choose another name or remove it first")
    entries = sorted(os.listdir(path)) if path.is_dir() else []
    if foreign := [name for name in entries if not _OURS.fullmatch(name)]:
        raise SlimError(f"holds something else ({foreign[0]})", where=str(path), fix="name a new or an empty directory")
    return entries


def _remove_beginning(path: Path, entries: Iterable[str]) -> None:
    """Remove what a recording that was killed before it had begun has left: its head is written first, no states yet.

    Raises:
        SlimError: it is something else: a sample set, or a cache without its description.
    """
    found = sorted((name for name in entries if not name.startswith(".")), key=HEAD.__eq__)  # the head last
    if found and (found[-1] != HEAD or any(name.startswith("states-") for name in found)):
        fix = "name a new or an empty directory"
        raise SlimError(f"holds something else ({found[0]})", where=str(path), fix=fix)
    for name in [*(name for name in entries if name not in found), *found]:
        remove(path / name)


def declare(recording: Recording, inputs: Mapping[str, Any], asked: int | None) -> None:
    """Say what a recording was begun with, once its directory holds all but states: from now on it can be taken up."""
    sizes = [len(samples) for samples in recording.rounds]
    found = {"inputs": dict(inputs), "shards": sizes, "shard_tokens": asked}
    write_atomic(recording.path / RECORDING, to_json(found))


def taken_up(path: Path, inputs: Mapping[str, Any], asked: int | None) -> Recording:
    """The recording that was begun in a directory, with its own shards.

    Raises:
        SlimError: with other inputs, or other tokens of a shard than were asked for.
    """
    try:
        found = read_json(path / RECORDING)
        begun, sizes = dict(found["inputs"]), list(map(int, found["shards"]))
    except (SlimError, KeyError, TypeError, ValueError) as error:
        why, fix = getattr(error, "what", repr(error)), "remove the directory and record again"
        raise SlimError(f"not a description of a recording ({why})", where=str(path / RECORDING), fix=fix) from None
    for name in {**begun, **inputs}:
        if (was := begun.get(name)) != (now := inputs.get(name)):
            fix = "record with the same inputs, or remove the directory"
            raise SlimError(f"was begun with {name} {was}, this run has {now}", where=str(path), fix=fix)
    was = found.get("shard_tokens")
    if asked is not None and asked != was:
        begun_with = "without --shard-tokens" if was is None else f"with --shard-tokens {was}"
        fix = "leave --shard-tokens out: its shards stay as they are"
        raise SlimError(f"was begun {begun_with}, this run has --shard-tokens {asked}", where=str(path), fix=fix)
    return Recording(path, _ranges(sizes), int(inputs["heads"]))


def wait_for_start(path: Path, inputs: Mapping[str, Any], asked: int | None) -> Recording | None:
    """The recording that the first process begins, None where it is finished; the launcher ends all if that fails."""
    path = path.absolute()
    while not (path / RECORDING).is_file():
        if is_finished(path):
            return None
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return taken_up(path, inputs, asked)


def bytes_to_write(recording: Recording, sample_bytes: int) -> int:
    """Bytes of the states that are not there yet, of all heads."""
    missing = math.fsum(len(recording.rounds[number]) for number in recording.missing())
    return int(missing) * sample_bytes
