"""Which checkpoint a run resumes from, however the last one died.

Megatron writes a checkpoint's files, then its ``.metadata``, and when all ranks are done the number into the tracker
file. That last write truncates the file first, so a run killed between the two leaves an empty tracker (or, at its
first checkpoint, none) next to a complete checkpoint: Megatron then exits with status 0, or starts anew.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.checkpoint.torch_dist_names import BACKEND, METADATA, RELEASE, TRACKER
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import write_atomic

logger = logging.getLogger(__name__)

SECONDS_FOR_TRACKER = 60.0  # for rank 0 to repair it, and for a shared file system to show it


def missing_parts(directory: Path) -> list[str]:
    """What an iteration's directory lacks of what its own ``.metadata`` lists, optimizer state included."""
    try:
        storage = read_metadata(directory).storage_data
    except CheckpointError as error:
        return [error.what]
    if not (directory / BACKEND).is_file():
        return [f"{BACKEND} is missing"]
    ends: dict[str, int] = {}
    for info in storage.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    found = []
    for name, end in sorted(ends.items()):
        file = directory / os.path.basename(name)
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size < end:
            found.append(f"{name} is truncated")
    return found


def _iterations(directory: Path) -> dict[int, Path]:
    numbers = {path: path.name.removeprefix("iter_") for path in directory.glob("iter_*") if path.is_dir()}
    return {int(number): path for path, number in numbers.items() if number.isdecimal()}


def complete_iterations(directory: Path) -> list[tuple[int, Path]]:
    """The iterations that a run has saved completely, in order, and their directories; logs what is incomplete.

    Raises:
        CheckpointError: there is none.
    """
    found = []
    for number, path in sorted(_iterations(directory).items()):
        if missing := missing_parts(path):
            logger.info(f"{path}: left out, it is incomplete: {summarise(missing)}")
        else:
            found.append((number, path))
    if not found:
        raise CheckpointError("has no complete iteration of a run", where=str(directory), fix="give a run's --save")
    return found


def _advice(directory: Path, complete: list[int]) -> str:
    tracker = directory / TRACKER
    if not complete:
        return f"there is no complete checkpoint next to it: remove {tracker} to start a new run"
    numbers = " or ".join(map(str, complete))
    return f"to resume from a complete checkpoint write {numbers} into {tracker}"


def missing_in_tracker(directory: Path) -> int | None:
    """The iteration that a directory's tracker ought to name and does not; None if there is nothing to repair.

    An empty tracker, or none next to complete iterations, ought to name the newest of them, if that is also the one
    that was written last. All else is refused: nothing but a person, or a disk, leaves it so.

    Raises:
        CheckpointError: the tracker names no complete checkpoint, or none can be chosen for it; says what to do.
    """
    tracker, iterations = directory / TRACKER, _iterations(directory)
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if text:
        _check_named(directory, text, iterations)
        return None
    complete = sorted(number for number, path in iterations.items() if not missing_parts(path))
    if not tracker.is_file() and not complete:
        return None  # nothing was ever saved: half a first checkpoint is written over
    written = {number: (iterations[number] / METADATA).stat().st_mtime_ns for number in complete}
    if not complete or max(written, key=written.__getitem__) != complete[-1]:
        state = "holds ''" if tracker.is_file() else "is missing"
        raise CheckpointError(
            f"{state}, and the last one is unclear" if complete else state,
            where=str(tracker),
            fix=_advice(directory, complete),
        )
    return complete[-1]


def repair_tracker(directory: Path, *, rank: int) -> None:
    """See that a directory's tracker names a complete checkpoint; repair it where there is one way only.

    Args:
        directory: of ``--load`` or ``--save``; it need not exist.
        rank: the global rank. Rank 0 repairs it and says so; the others come to the same conclusion, and wait for it.

    Raises:
        CheckpointError: as `missing_in_tracker`.
    """
    number = missing_in_tracker(directory)
    if number is None:
        return
    tracker = directory / TRACKER
    if rank == 0:
        state = "was empty" if tracker.is_file() else "was missing"
        write_atomic(tracker, str(number))
        name = _iterations(directory)[number].name
        logger.info(f"{tracker}: {state}; resuming from {name}, the last complete checkpoint")
    else:
        _wait_for(tracker)


def _wait_for(tracker: Path) -> None:
    """Until rank 0 has repaired it: what comes next looks for it."""
    deadline = time.monotonic() + SECONDS_FOR_TRACKER
    while not tracker.is_file() or not tracker.read_text().strip():
        if time.monotonic() > deadline:
            raise CheckpointError("rank 0 did not repair it", where=str(tracker), fix="see the error of rank 0")
        time.sleep(0.1)


def _check_named(directory: Path, text: str, iterations: dict[int, Path]) -> None:
    """See that the tracker's content names something complete."""
    try:
        named = iteration_directory(directory)
        if found := [] if text == RELEASE else missing_parts(named):
            raise CheckpointError(
                f"names {named.name}, which is incomplete: {summarise(found)}", where=str(directory / TRACKER)
            )
    except CheckpointError as error:
        complete = sorted(number for number, path in iterations.items() if not missing_parts(path))
        raise CheckpointError(error.what, where=error.where, fix=_advice(directory, complete)) from None
