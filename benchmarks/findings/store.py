"""Where steps are done and their results are: a directory for each, and in it one for every definition that it had."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.findings.steps import CELL, RESUMED, TEACHER, Step, Steps
from megatron_slim.errors import SlimError
from megatron_slim.files import file_sha256, read_json, remove, sha256, to_json, write_atomic

RESULT, DEFINITION, WORK, LOGS = "result.json", "definition.json", "work", "logs"


class Store:
    """A directory of results.

    A result is there as a whole or not at all. A step whose definition changes has another directory, so that results
    of its former definition stay, and are used again where it comes back.
    """

    def __init__(self, root: Path) -> None:
        """An existing directory, or one that will be made."""
        self.root, self._hashes = root, dict[str, str]()

    def folder(self, step: Step) -> Path:
        """Of a step as it is defined now."""
        return self.root / step.id / step.digest

    def work(self, step: Step) -> Path:
        """Where its commands write; of what others need, it stays."""
        return self.folder(step) / WORK

    def logs(self, step: Step) -> Path:
        """Output of its commands."""
        return self.folder(step) / LOGS

    def result(self, step: Step) -> dict[str, Any] | None:
        """What it gave, if it is done.

        Raises:
            SlimError: the file is damaged.
        """
        path = self.folder(step) / RESULT
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)
        return found

    def begin(self, step: Step) -> None:
        """An empty directory to work in; where a step continues, with what is there."""
        folder = self.folder(step)
        if step.kind not in RESUMED:
            remove(self.work(step))
        for each in (self.work(step), self.logs(step)):
            each.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / DEFINITION, to_json(step.definition()))

    def finish(self, step: Step, metrics: Mapping[str, Any], seconds: float, about: Mapping[str, Any]) -> None:
        """Publish a result; checkpoints that nothing needs are not kept."""
        kept = {"id": step.id, "digest": step.digest, "seconds": seconds, "metrics": dict(metrics), **about}
        write_atomic(self.folder(step) / RESULT, to_json(kept))
        if step.kind == CELL:
            shutil.rmtree(self.work(step), ignore_errors=True)
        if step.kind == TEACHER:  # its export stays
            shutil.rmtree(self.work(step) / "run", ignore_errors=True)

    def teacher_hash(self, steps: Steps, size: str) -> str:
        """Of a teacher's weights, and of the text that is trained and measured on: twelve hexadecimal digits.

        Raises:
            SlimError: the weights are not there.
        """
        if size not in self._hashes:
            export = self.work(steps.teacher(size)) / "hf"
            weights, text = sorted(export.glob("*.safetensors")), self.work(steps.text())
            if not weights:
                raise SlimError("no weights of the teacher", where=str(export), fix="remove --dir and run again")
            hashes = (bytes.fromhex(file_sha256(path)) for path in (*weights, *sorted(text.glob("*.npy"))))
            self._hashes[size] = sha256(b"".join(hashes))[:12]
        return self._hashes[size]

    def seeds(self) -> int:
        """The highest seed of any cell that was begun."""
        numbers = (path.name.rpartition(".")[2] for path in self.root.glob(f"{CELL}.*"))
        return max((int(number) for number in numbers if number.isdecimal()), default=0)
