"""Everything that is run, as steps that need one another; each has a digest of all that its result depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.findings.matrix import FIRST, LOSSES, PRUNINGS, QUESTIONS, RANDOM, Cell, Pruning, cells_of
from benchmarks.findings.sizes import BASE, Settings
from megatron_slim.errors import SlimError
from megatron_slim.files import sha256

METHOD = 1  # of `commands` and `corpus`; another number makes every step another one
TEXT, TEACHER, REFERENCE, EXPERTS = "text", "teacher", "reference", "experts"
STATISTICS, CACHE, PRUNED, CELL = "statistics", "cache", "pruned", "cell"
KINDS = (TEXT, TEACHER, REFERENCE, EXPERTS, STATISTICS, CACHE, PRUNED, CELL)
ALONE = (TEACHER,)  # whose commands take all of the cores: all cells wait for a teacher
RESUMED = (TEACHER, CACHE)  # whose commands continue what a kill has left; others begin anew
# Settings that a step of a kind depends on, besides those of the steps that it needs.
_MEASURING = ("validation_samples",)
_ACCEPTANCE = ("prompts", "prompt_tokens", "new_tokens", "draft_tokens")
USED: Mapping[str, tuple[str, ...]] = {
    TEXT: ("bytes_per_kind", "vocab_size", "seq_length", "train_samples", "validation_samples", *_ACCEPTANCE[:2]),
    TEACHER: ("teacher_steps", "teacher_lr", "teacher_samples", "tiny"),
    REFERENCE: (*_MEASURING, *_ACCEPTANCE),
    EXPERTS: _MEASURING,
    STATISTICS: ("calibration_samples",),
    CACHE: ("states",),
    PRUNED: _MEASURING,
    CELL: ("steps", "batch", "lr", *_MEASURING, *_ACCEPTANCE),
}


@dataclass(frozen=True)
class Step:
    """One thing to do, once.

    Attributes:
        id: unique among the steps of one set of settings, and a directory's name.
        kind: one of `KINDS`.
        needs: steps whose results it uses, by their part in it.
        size: of the models.
        seed: 0 where none has a part in it.
        what: the rest of what it is, as plain data.
        digest: of all this, and of what it needs.
    """

    id: str
    kind: str
    needs: Mapping[str, Step] = field(default_factory=dict)
    size: str = BASE
    seed: int = 0
    what: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def cell(self) -> Cell:
        """Of a step that is one."""
        return Cell(**{**self.what["cell"], "first_phase": tuple(self.what["cell"]["first_phase"])})

    @property
    def pruning(self) -> Pruning:
        """Of a step that prunes."""
        return Pruning(**{**self.what["pruning"], "axes": tuple(self.what["pruning"]["axes"])})

    def definition(self) -> dict[str, Any]:
        """What the digest is of."""
        own = {"method": METHOD, "kind": self.kind, "size": self.size, "seed": self.seed, "what": self.what}
        return own | {"needs": {part: step.digest for part, step in self.needs.items()}}


class Steps:
    """All steps of some settings; each is made when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        """None of them yet."""
        self.settings = settings
        self._made: dict[str, Step] = {}

    def _step(self, name: str, kind: str, **parts: Any) -> Step:
        if name in self._made:
            return self._made[name]
        used = {key: getattr(self.settings, key) for key in USED[kind]}
        step = Step(name, kind, **{**parts, "what": {**parts.get("what", {}), "settings": used}})
        # Through JSON, as it is stored: tuples are lists in both.
        plain = json.loads(json.dumps(step.definition(), sort_keys=True))
        self._made[name] = dataclasses.replace(step, what=plain["what"], digest=sha256(json.dumps(plain))[:12])
        return self._made[name]

    def text(self) -> Step:
        """The text, its tokens, and what is measured on."""
        return self._step(TEXT, TEXT)

    def teacher(self, size: str) -> Step:
        """A trained teacher."""
        config = self.settings.size(size).config(self.settings.vocab_size)
        return self._step(f"{TEACHER}.{size}", TEACHER, needs={TEXT: self.text()}, size=size, what={"config": config})

    def of_teacher(self, kind: str, size: str, seed: int = 0) -> Step:
        """What is made of a teacher: `REFERENCE`, `EXPERTS`, `CACHE`, or the `STATISTICS` of a seed."""
        name = f"{kind}.{size}" + (f".{seed}" if seed else "")
        return self._step(name, kind, needs={TEACHER: self.teacher(size), TEXT: self.text()}, size=size, seed=seed)

    def pruned(self, name: str, size: str, seed: int) -> Step:
        """A student before training, and its losses."""
        pruning, models = PRUNINGS[name], self.settings.size(size)
        needs = {TEACHER: self.teacher(size), TEXT: self.text()}
        if pruning.slice:
            needs["elastic"] = self.pruned("elastic", size, seed)
        else:
            needs[STATISTICS] = self.of_teacher(STATISTICS, size, seed)
        what = {
            "pruning": dataclasses.asdict(pruning),
            "target": {axis: models.student[axis] for axis in pruning.axes},
            "budgets": models.budgets if pruning.budgets else {},
        }
        return self._step(f"{PRUNED}.{name}.{size}.{seed}", PRUNED, needs=needs, size=size, seed=seed, what=what)

    def cell(self, cell: Cell, seed: int) -> Step:
        """A cell with a seed."""
        size = cell.size
        needs = {TEACHER: self.teacher(size), TEXT: self.text()}
        if cell.loss != "lm":
            needs[CACHE] = self.of_teacher(CACHE, size)
        if cell.first_phase:
            needs[STATISTICS] = self.of_teacher(STATISTICS, size, seed)
        else:
            needs[PRUNED] = self.pruned(FIRST if cell.pruning == RANDOM else cell.pruning, size, seed)
        what: dict[str, Any] = {"cell": dataclasses.asdict(cell), "flags": LOSSES[cell.loss]}
        if cell.first_phase:
            models, pruning = self.settings.size(size), PRUNINGS[cell.pruning]
            what["phases"] = [
                {axis: models.half[axis] for axis in cell.first_phase},
                {axis: models.student[axis] for axis in pruning.axes},
            ]
            what["sections"] = pruning.sections
        return self._step(f"{CELL}.{cell.name}.{seed}", CELL, needs=needs, size=size, seed=seed, what=what)


def wanted(steps: Steps, questions: Iterable[str], seeds: int) -> list[Step]:
    """Steps that answer questions, in the order in which to start them: the first seed of all questions first.

    Args:
        steps: of the settings.
        questions: their letters.
        seeds: how many, from 1.

    Raises:
        SlimError: there is no such question.
    """
    keys = tuple(questions)
    if unknown := [key for key in keys if key not in QUESTIONS]:
        raise SlimError(f"there is no question {unknown[0]!r}", fix=f"choose from {', '.join(QUESTIONS)}")
    found: dict[str, Step] = {}

    def add(step: Step) -> None:
        for needed in step.needs.values():
            add(needed)
        found.setdefault(step.id, step)

    for seed in range(1, seeds + 1):
        for key in keys:
            for cell in cells_of((key,)):
                add(steps.cell(cell, seed))
                if seed == 1:
                    add(steps.of_teacher(REFERENCE, cell.size))
                    add(steps.of_teacher(EXPERTS, cell.size))
    return list(found.values())
