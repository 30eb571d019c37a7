"""What a compression run has left in its directory, read and checked (no torch).

A file that is not there yet is None; one that is there and cannot be read, or holds something else than its command
writes, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slim.aliases import Document
from megatron_slim.compression.state import DONE, FILE, VERSION
from megatron_slim.compression.steps import (
    ACCEPTANCE,
    EVALUATE,
    EVALUATE_FP8,
    EVALUATE_PRUNED,
    EVALUATE_TEACHER,
    EXPORT,
    MODEL,
    MODEL_FP8,
    PRUNE,
    QUANTIZE,
)
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json

PROGRAM = "megatron-slim"
EVALUATIONS = (EVALUATE_TEACHER, EVALUATE_PRUNED, EVALUATE, EVALUATE_FP8, ACCEPTANCE)


@dataclass(frozen=True)
class Step:
    """One command of a run.

    Attributes:
        name: such as ``phase-1/prune``.
        kind: what it does.
        phase: of the recipe; None for what belongs to no phase.
        state: ``done``, ``running``, ``failed`` or ``waiting``.
        command: its words, the program first.
        attempts: how often it was started.
        seconds: that it took, in all attempts; None where that was not measured.
        result: what it printed with ``--json``; None unless it is done.
    """

    name: str
    kind: str
    phase: int | None
    state: str
    command: tuple[str, ...]
    attempts: int
    seconds: float | None
    result: Document | None


@dataclass(frozen=True)
class CompressionRun:
    """A run as its directory shows it.

    Attributes:
        save: the directory.
        document: ``run.json``.
        steps: in order.
    """

    save: Path
    document: Document
    steps: tuple[Step, ...]

    @property
    def phases(self) -> list[int]:
        """Numbers of the recipe's phases."""
        return sorted({step.phase for step in self.steps if step.phase is not None})

    @property
    def teacher(self) -> Path | None:
        """The directory of the model that was compressed; None where the run does not name it."""
        given = self.document["inputs"].get("teacher")
        return Path(given) if isinstance(given, str) and given else None

    def of(self, kind: str, phase: int | None = None) -> Step | None:
        """The step of a kind, of a phase."""
        return next((step for step in self.steps if (step.kind, step.phase) == (kind, phase)), None)

    def result(self, kind: str, phase: int | None = None) -> Document | None:
        """What the step of a kind printed, acceptance included; None unless it is done."""
        # Acceptance is a step of its own, about the model of the evaluation next to it.
        kinds = (kind, ACCEPTANCE) if kind in (EVALUATE_TEACHER, EVALUATE) else (kind,)
        found = [
            step.result for each in kinds if (step := self.of(each, phase)) is not None and step.result is not None
        ]
        return {key: value for result in reversed(found) for key, value in result.items()} if found else None

    def phase_directory(self, phase: int) -> Path:
        """Where the outputs of a phase are."""
        return self.save / f"phase-{phase}"

    def final_model(self) -> Path:
        """The export of the last phase."""
        return self.save / MODEL

    def quantized_model(self) -> Path:
        """The same in FP8."""
        return self.save / MODEL_FP8


def read_compression_run(save: Path) -> CompressionRun:
    """Read ``run.json`` and the results of the steps that are done.

    Raises:
        SlimError: the state is missing, is of another version, or a file of it holds something else.
    """
    file = save / FILE
    document = read_json(file)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        fix = "give the directory of a compression run of this release"
        raise SlimError(f"not the state of a compression run of version {VERSION}", where=str(file), fix=fix)
    if wrong := [key for key, kind in _KEYS.items() if not isinstance(document.get(key), kind)]:
        raise SlimError(f"missing or of another type: {', '.join(wrong)}", where=str(file), fix=_AGAIN)
    return CompressionRun(save, document, tuple(_step(save, entry, str(file)) for entry in document["steps"]))


_KEYS: dict[str, type] = {"recipe": dict, "inputs": dict, "settings": dict, "steps": list}
_AGAIN = "run it again, it takes up where it was"


def _step(save: Path, entry: Any, where: str) -> Step:
    words = ("name", "kind", "state")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in words):
        raise SlimError("a step has no name, kind or state", where=where, fix=_AGAIN)
    phase, seconds, command = entry.get("phase"), entry.get("seconds"), entry.get("command") or []
    if not (phase is None or type(phase) is int) or not isinstance(command, list) or not _is_number(seconds, True):
        raise SlimError(f"step {entry['name']} has a phase, time or command of another type", where=where, fix=_AGAIN)
    return Step(
        name=entry["name"],
        kind=entry["kind"],
        phase=phase,
        state=entry["state"],
        command=tuple(map(str, command if command[:1] in ([], [PROGRAM]) else [PROGRAM, *command])),
        attempts=entry.get("attempts") or 0,
        seconds=seconds if entry.get("attempts") else None,
        result=_result(save, entry) if entry["state"] == DONE else None,
    )


def _result(save: Path, entry: Document) -> Document | None:
    name = entry.get("result")
    if not isinstance(name, str) or not (file := save / name).exists():
        return None
    found = read_json(file)
    if not isinstance(found, dict):
        raise SlimError("is not a JSON object", where=str(file))
    checks = _EVALUATION if entry["kind"] in EVALUATIONS else _SIZES.get(entry["kind"], {})
    wrong = [key for key, check in checks.items() if found.get(key) is not None and not check(found[key])]
    if wrong:
        fix = f"remove it and run {entry['name']} again"
        raise SlimError(f"not what the step prints: {', '.join(wrong)}", where=str(file), fix=fix)
    return found


def _is_number(value: Any, optional: bool = False) -> bool:
    if value is None:
        return optional
    return type(value) in (int, float) and math.isfinite(value)


def _is_numbers(value: Any) -> bool:
    """A number, or a list of them (one for every MTP depth)."""
    return _is_number(value) or (isinstance(value, list) and all(map(_is_number, value)))


def _are_errors(value: Any) -> bool:
    """A standard error or a list of them, each of which may be missing: one sample has none."""
    return all(_is_number(each, True) for each in (value if isinstance(value, list) else [value]))


def _is_acceptance(value: Any) -> bool:
    keys = ("mean_accepted_length", "drafts")
    return isinstance(value, dict) and _is_numbers(value.get("acc")) and all(_is_number(value.get(k)) for k in keys)


def metrics_of(task: Any) -> dict[str, tuple[float | None, float | None]] | None:
    """Value and standard error of every metric of a task; None where it is something else.

    >>> metrics_of({"metrics": {"acc": {"value": 0.5, "stderr": None}}, "documents": 8})
    {'acc': (0.5, None)}
    >>> metrics_of({"acc": [0.5, 0.1]})
    {'acc': (0.5, 0.1)}
    """
    if not isinstance(task, dict):
        return None
    metrics = task.get("metrics", task)
    pairs: dict[str, tuple[float | None, float | None]] = {}
    for name, pair in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(pair, dict):
            pair = [pair.get("value"), pair.get("stderr")]
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_number(part, True) for part in pair):
            return None
        pairs[name] = (pair[0], pair[1])
    return pairs


def _is_tasks(value: Any) -> bool:
    return isinstance(value, dict) and all(metrics_of(task) is not None for task in value.values())


def _is_clients(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(client, dict) for client in value.values())


def _is_quantization(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(worst := value.get("worst"), dict):
        return False
    numbers = (value.get("tensors"), value.get("partial_blocks"), worst.get("relative_rms"))
    return all(map(_is_number, numbers)) and isinstance(worst.get("tensor"), str)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_NUMBERS = ("loss", "perplexity", "kl", "top1_agreement", "teacher_loss", "loss_difference")
_LISTS = ("mtp_loss", "mtp_kl", "mtp_top1_agreement")
_EVALUATION: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((*_NUMBERS, "tokens"), _is_number),
    **dict.fromkeys(_LISTS, _is_numbers),
    **{f"{key}_stderr": _are_errors for key in (*_NUMBERS, *_LISTS)},
    **dict.fromkeys(("acceptance", "teacher_acceptance"), _is_acceptance),
    "tasks": _is_tasks,
    "clients": _is_clients,
}
_SIZES: dict[str, dict[str, Callable[[Any], bool]]] = {
    PRUNE: {"before": _is_sizes, "after": _is_sizes},
    EXPORT: {"bytes": _is_number},
    QUANTIZE: {"bytes": _is_number, "quantization": _is_quantization},
}
