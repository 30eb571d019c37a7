"""Are two training runs one? Their last checkpoints, their logs and their tensorboards, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.distillation.terms import terms_of, weights_of
from megatron_slim.errors import SlimError
from megatron_slim.files import sha256

_TERMS = terms_of(has_teacher=True, has_mtp=True).values()
COMPARED = {*(term.name for term in _TERMS), *(weight.name for weight in weights_of(_TERMS)), "grad-norm"}
_NOT_COMPARED = ("common_state", "rng_state", "rerun_state_machine")
LOGGED = re.compile(r"iteration +(\d+)/ *\d+ \|.*?(learning rate: .*?)number of skipped")


def contents(directory: Path) -> dict[tuple[Any, ...], str]:
    """Hash of every piece of a checkpoint as it is stored: weights and optimizer state.

    Not of the common state, which names directories, nor of the generators: a torch data loader draws a number when a
    run starts or resumes, and nothing in these models draws any.
    """
    found = {}
    for index, info in read_metadata(directory).storage_data.items():
        if index.fqn.startswith(_NOT_COMPARED):
            continue
        with (directory / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            found[index.fqn, tuple(index.offset or ())] = sha256(file.read(info.length))
    return found


def logged(log: Path) -> dict[int, set[str]]:
    """Everything that a log says of each step: learning rate, losses, gradient norm."""
    found: dict[int, set[str]] = {}
    for line in log.read_text(errors="replace").splitlines():
        if match := LOGGED.search(line):
            found.setdefault(int(match[1]), set()).add(match[2])
    return found


def scalars(directory: Path) -> dict[tuple[str, int], set[float]]:
    """What tensorboard got for each term and step, over all starts of a run, in fp32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[tuple[str, int], set[float]] = {}
    for file in directory.glob("events*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in COMPARED & set(events.Tags()["scalars"]):
            for point in events.Scalars(tag):
                found.setdefault((tag, point.step), set()).add(point.value)
    return found


def compare(directory: Path, steps: int, *, averaged: set[int]) -> dict[str, Any]:
    """See that the runs ``whole`` and ``killed`` are one; a step done twice must have been the same both times.

    Args:
        directory: of both.
        steps: how many they have done.
        averaged: steps of which the log of the killed run has the mean with the step before, as Megatron's second line
            after a start has; tensorboard has both.

    Raises:
        SlimError: they differ in something, or were not logged.
    """
    one, other = (contents(directory / name / f"iter_{steps:07d}") for name in ("whole", "killed"))
    differing = sorted({key[0] for key in one.keys() | other.keys() if one.get(key) != other.get(key)})
    if differing:
        raise SlimError(f"{len(differing)} entries differ, {differing[0]} first", where=str(directory))
    texts, others = (logged(directory / f"{name}.log") for name in ("whole", "killed"))
    wrong = [step for step in range(1, steps + 1) if step not in texts or texts.get(step) != others.get(step)]
    if not set(wrong) <= averaged:
        raise SlimError(f"the logs differ at steps {sorted(set(wrong) - averaged)[:5]}", where=str(directory))
    points, others_points = (scalars(directory / name / "tensorboard") for name in ("whole", "killed"))
    common = points.keys() & others_points.keys()
    if different := sorted(key for key in common if points[key] != others_points[key]):
        raise SlimError(f"what tensorboard got differs, {different[0]} first", where=str(directory))
    return {
        "bit_equal": True,
        "entries_compared": len(one),
        "steps_of_logs_compared": steps - len(averaged),
        "losses_of_tensorboard_compared": len(common),
    }
