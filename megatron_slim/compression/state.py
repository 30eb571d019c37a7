"""run.json: what a run was asked for, and how far it is.

What decides whether a step is done is what it has left (`steps.Step.done`). This file is for people and for the report,
and it is what a later start is compared with: a run continues with the values it began with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_slim import __version__
from megatron_slim.aliases import Document, JsonObject
from megatron_slim.checkpoint.torch_dist_names import TRACKER
from megatron_slim.compression.settings import RunSettings
from megatron_slim.compression.steps import (
    OF_RECORDING,
    RECIPE_FILE,
    RECORD,
    RECORD_VALIDATION,
    SECTION,
    TRAIN,
    Step,
)
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import read_json, to_json, write_atomic
from megatron_slim.training.variables import BEHIND

FILE, VERSION = "run.json", 1
DONE, RUNNING, FAILED, WAITING = "done", "running", "failed", "waiting"
# Of ``train``: what another start may change. Training itself refuses a layout that its checkpoint cannot take.
_FREE = (
    *("tp", "pp", "ep", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "launcher", "settings"),
    *("image", "mounts", "micro_batch_size", "save_interval", "eval_interval", "log_interval"),
)
# The same of flags for Megatron, by how they begin: layout, memory, logs, saving, and what training is asked to allow.
_FREE_FLAGS = (
    *("--context-parallel-", "--cp-comm-", "--expert-tensor-", "--num-virtual-stages", "--num-layers-per-virtual"),
    *("--pipeline-", "--teacher-pipeline-", "--teacher-ahead", "--teacher-offload", "--sequence-parallel"),
    *("--overlap-", "--recompute-", "--optimizer-cpu-", "--optimizer-offload-", "--manual-gc", "--tp-comm-"),
    *("--distributed-", "--exit-", "--log-", "--tensorboard-", "--wandb-", "--timing-", "--override-opt", "--async-"),
    *("--save-", "--no-save-", "--no-load-", "--ckpt-", "--dist-ckpt-", "--use-persistent-ckpt-", "--verify-integrity"),
    *("--fine-grained-activation-", "--empty-unused-", "--num-workers", "--profile", "--rerun-", "--nccl-"),
    *("--micro-batch-size", "--make-vocab-size-divisible-by", "--no-teacher-check"),
)
_SECTIONS = tuple(dict.fromkeys(SECTION.values()))


class RunState:
    """run.json of a run, written after every change.

    Attributes:
        path: the file.
        steps: of every step by name: ``state``, ``attempts``, ``seconds`` (of all attempts).
    """

    def __init__(self, settings: RunSettings, steps: Sequence[Step]) -> None:
        """Read what is there, and compare it with what is asked for now; nothing is written.

        Raises:
            SlimError: a value differs that a step which has begun depends on.
        """
        self.path = settings.save / FILE
        self._settings, self._all = settings, steps
        before = self._read() if self.path.exists() else {}
        found = {step["name"]: step for step in before.get("steps", ())}
        fresh = {"state": WAITING, "attempts": 0, "seconds": 0.0}
        self.steps = {
            step.name: {key: found.get(step.name, fresh).get(key, value) for key, value in fresh.items()}
            for step in steps
        }
        if before:
            self._compare(before)

    def _read(self) -> JsonObject:
        document = read_json(self.path)
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise CheckpointError("is not the state of a run", where=str(self.path), fix="give another --save")
        return document

    def _compare(self, before: Document) -> None:
        now = self._document()
        begun = {SECTION.get(step.kind) for step in self._all if self.begun(step)}
        found = _differences("", before.get("inputs", {}), now["inputs"]) if begun else []
        if begun:
            old, new = (
                {key: value for key, value in document["recipe"].items() if key not in _SECTIONS}
                for document in (before, now)
            )
            found += _differences("", old, new)
        kinds = (RECORD, RECORD_VALIDATION)  # also where they are left out now
        records = any(step["kind"] in kinds and step["attempts"] for step in before.get("steps", ()))
        fixed = {section: set(keys) for section, keys in _keys(before, now).items() if section in begun}
        if TRAIN in fixed:
            fixed[TRAIN] -= {*_FREE, "flags"}
            found += _differences("", *(_fixed_flags(_flags(document)) for document in (before, now)))
        if records:
            fixed[TRAIN] = fixed.get(TRAIN, set()) | {*OF_RECORDING}
        for section, keys in fixed.items():
            old, new = (
                {key: value for key, value in document["settings"][section].items() if key in keys}
                for document in (before, now)
            )
            found += _differences(f"{section}.", old, new)
        if found:
            fix = "give what the run began with, or another --save"
            raise SlimError("; ".join(found), where=str(self.path), fix=fix)

    def begun(self, step: Step) -> bool:
        """Whether a step has left something that depends on its values: training has where a checkpoint is saved."""
        return step.done() or (step.output / TRACKER if step.kind == TRAIN else step.output).exists()

    def write(self) -> None:
        """Write the file, and the recipe next to it."""
        write_atomic(self.path, to_json(self._document()))
        recipe = self._settings.save / RECIPE_FILE
        if not recipe.is_file() or recipe.read_text() != self._settings.text:
            write_atomic(recipe, self._settings.text)

    def set(self, step: Step, state: str, seconds: float = 0.0) -> None:
        """A step has begun, or ended after so many seconds."""
        entry = self.steps[step.name]
        entry["state"] = state
        entry["attempts"] += state == RUNNING
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        self.write()

    def _document(self) -> JsonObject:
        save = self._settings.save
        return {
            "version": VERSION,
            "megatron_slim": __version__,
            "recipe": dict(self._settings.document),
            "device": _device(),
            "inputs": self._settings.inputs,
            "settings": {section: dict(self._settings.section(section)) for section in _SECTIONS},
            "megatron": list(self._settings.megatron),
            "steps": [
                {
                    "name": step.name,
                    "kind": step.kind,
                    "phase": step.phase,
                    "command": list(step.command),
                    "output": _relative(step.output, save),
                    "result": _relative(step.result, save),
                    **self.steps[step.name],
                }
                for step in self._all
            ],
        }


@cache
def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def _relative(path: Path, save: Path) -> str:
    return str(path.relative_to(save)) if path.is_relative_to(save) else str(path)


def _keys(*documents: Document) -> dict[str, set[str]]:
    """Keys of every section that any of these has."""
    return {section: {key for each in documents for key in each["settings"][section]} for section in _SECTIONS}


def _fixed_flags(words: Sequence[str]) -> JsonObject:
    """Arguments for Megatron that must stay, by flag: the words behind it; of a flag given twice, the last."""
    found: dict[str, list[str]] = {}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found[flag] = [value] if equals else []
        else:
            found.setdefault(flag, []).append(word)
    return {
        flag: " ".join(values) for flag, values in found.items() if flag != BEHIND and not flag.startswith(_FREE_FLAGS)
    }


def _flags(document: Document) -> list[str]:
    """Arguments for Megatron, of the recipe and behind them of the command line."""
    return [*map(str, document["settings"]["train"].get("flags", ())), *document.get("megatron", ())]


def _differences(prefix: str, before: Document, now: Document) -> list[str]:
    return [
        f"{prefix}{key} is {now.get(key, 'left out')!r}, and the run began with {before.get(key, 'none')!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
