"""The commands of a step, and what is kept of their results (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.findings.matrix import MTP_LM_ALONE, RANDOM
from benchmarks.findings.order import ranks
from benchmarks.findings.sizes import Settings
from benchmarks.findings.steps import CACHE, CELL, EXPERTS, PRUNED, REFERENCE, STATISTICS, TEACHER, TEXT, Step
from benchmarks.findings.store import Store
from benchmarks.processes import free_port
from megatron_slim.files import remove, to_json

EVALUATION_BATCH, ACCEPTANCE_BATCH = 8, 8
FP32 = ("--dtype", "fp32")  # on a GPU as on a CPU
WARMUP = 20  # steps of a cell, as in the demo; a tenth of a run that is not longer
FIRST_PHASE = 0.1  # share of the tokens, as 40B of 400B
TEXTS = ("code", "headers", "prose")
SAVE_EVERY = 500  # steps of a teacher's training


@dataclass(frozen=True)
class Command:
    """One process.

    Attributes:
        name: of its log.
        argv: words behind ``megatron-slim``; or, with ``function``, none.
        function: ``module:name`` of what is called with ``arguments``; its result is a dictionary.
        arguments: plain data.
        prepare: ``module:name`` of what is called first.
    """

    name: str
    argv: tuple[str, ...] = ()
    function: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prepare: str = ""


def _command(name: str, *words: object, prepare: str = "") -> Command:
    return Command(name, tuple(map(str, words)), prepare=prepare)


class Commands:
    """The commands of every step of some settings, with paths of a store."""

    def __init__(self, settings: Settings, store: Store, jobs: int = 1) -> None:
        """They read results of earlier steps in the store; a teacher's training has a process for each of ``jobs``."""
        self.settings, self.store = settings, store
        self.ranks = ranks(jobs, settings)

    def of(self, step: Step) -> list[Command]:
        """In order."""
        makers: dict[str, Callable[[Step], Iterator[Command]]] = {
            TEXT: self._text,
            TEACHER: self._teacher,
            REFERENCE: self._reference,
            EXPERTS: self._experts,
            STATISTICS: self._statistics,
            CACHE: self._cache,
            PRUNED: self._pruned,
            CELL: self._cell,
        }
        return list(makers[step.kind](step))

    def _path(self, step: Step, part: str, *names: str) -> Path:
        return self.store.work(step.needs[part]).joinpath(*names)

    def teacher(self, step: Step) -> Path:
        """The teacher of a step, in Hugging Face's format."""
        return self._path(step, TEACHER, "hf")

    def _text(self, step: Step) -> Iterator[Command]:
        where, used = self.store.work(step), self.settings
        given = {"output": str(where), "bytes_per_kind": used.bytes_per_kind, "vocab_size": used.vocab_size}
        yield Command("text", function="benchmarks.findings.corpus:make_text", arguments=given)
        for split in ("train", *(f"validation-{kind}" for kind in TEXTS)):
            yield _command(
                f"preprocess-{split}",
                *("preprocess", "--input", where / f"{split}.jsonl", "--output-prefix", where / split),
                *("--tokenizer-model", where / "tokenizer", "--append-eod", "--workers", 1),
            )
        samples = {
            "folder": str(where),
            "seq_length": used.seq_length,
            "train_samples": used.train_samples,
            "validation_samples": used.validation_samples,
            "prompts": used.prompts,
            "prompt_tokens": used.prompt_tokens,
        }
        yield Command("samples", function="benchmarks.findings.corpus:make_samples", arguments=samples)

    def _teacher(self, step: Step) -> Iterator[Command]:
        where = self.store.work(step)
        remove(where / "hf")  # of a step that was killed after its last command
        config = where / "config"
        config.mkdir(exist_ok=True)
        (config / "config.json").write_text(to_json(step.what["config"]))
        yield self._train(
            step,
            where / "run",
            {
                "--hf-config": config,
                "--data": self._path(step, TEXT, "train_text_document"),
                "--train-iters": self.settings.teacher_steps,
                "--lr": self.settings.teacher_lr,
                "--min-lr": self.settings.teacher_lr / 20,
                "--save-interval": SAVE_EVERY,
            },
            batch=self.settings.teacher_samples,
            ranks=self.ranks,
        )
        yield _command("export", "convert", "--load", where / "run", "--save", where / "hf", "--to", "hf")

    def _train(
        self,
        step: Step,
        save: Path,
        given: Mapping[str, object],
        flags: tuple[object, ...] = (),
        *,
        batch: int,
        name: str = "train",
        prepare: str = "",
        switches: tuple[str, ...] = (),
        ranks: int = 1,
    ) -> Command:
        """Training, in one process or data parallel."""
        values = {
            "--save": save,
            "--precision": "fp32",
            "--seq-length": self.settings.seq_length,
            "--micro-batch-size": batch // ranks,
            "--global-batch-size": batch,
            "--save-interval": 10**6,
            "--eval-interval": 10**6,
            "--eval-iters": 0,
            "--log-interval": 10,
            **given,
        }
        words = [word for pair in values.items() for word in pair]
        always = (
            "--seed",
            max(step.seed, 1),
            "--split",
            "1,0,0",
            "--default-lr-warmup-iters",
            WARMUP,
            *self._unchecked(),
        )
        launch: tuple[object, ...] = ()
        if ranks > 1:
            launch = ("torchrun", "--nproc-per-node", ranks, "--master-port", free_port(), "-m", "megatron_slim")
        return _command(name, *launch, "pretrain", *words, *switches, "--", *always, *flags, prepare=prepare)

    def _reference(self, step: Step) -> Iterator[Command]:
        yield self._losses(step, self.teacher(step), compare=False)
        yield self._acceptance(step, self.teacher(step))

    def _losses(self, step: Step, load: Path, *flags: str, compare: bool = True, name: str = "losses") -> Command:
        teacher = ("--teacher", self.teacher(step)) if compare else ()
        data = ("--data", self._path(step, TEXT, "validation.npy"), "--micro-batch-size", EVALUATION_BATCH)
        return _command(name, "evaluate", "--load", load, *teacher, *data, *FP32, *flags, "--json")

    def _acceptance(self, step: Step, load: Path) -> Command:
        prompts = ("--acceptance", self._path(step, TEXT, "prompts.npy"), "--micro-batch-size", ACCEPTANCE_BATCH)
        lengths = ("--draft-tokens", self.settings.draft_tokens, "--max-new-tokens", self.settings.new_tokens)
        return _command("acceptance", "evaluate", "--load", load, *prompts, *lengths, *FP32, "--json")

    def _experts(self, step: Step) -> Iterator[Command]:
        given = {"teacher": str(self.teacher(step)), "text": str(self._path(step, TEXT))}
        yield Command("experts", function="benchmarks.findings.specialised:measure", arguments=given)

    def _calibration(self, step: Step) -> tuple[object, ...]:
        data = self._path(step, TEXT, "train_text_document")
        number = ("--num-samples", self.settings.calibration_samples, "--seq-length", self.settings.seq_length)
        return "--calibration-data", data, *number, "--seed", step.seed

    def _statistics(self, step: Step) -> Iterator[Command]:
        save = self.store.work(step) / "teacher.stats"
        yield _command("calibrate", "calibrate", "--load", self.teacher(step), "--save", save, *self._calibration(step))

    def _cache(self, step: Step) -> Iterator[Command]:
        save, samples = self.store.work(step) / "cache", self._path(step, TEXT, "samples")
        if (save / "cache.json").is_file():  # of a step that was killed after its last command; a part is continued
            remove(save)
        words: tuple[object, ...] = ("--data", samples, "--save", save, "--states", self.settings.states)
        words += ("--micro-batch-size", EVALUATION_BATCH, *FP32, *self._unchecked())
        yield _command("record", "record", "--teacher", self.teacher(step), *words, "--json")

    def _unchecked(self) -> tuple[str, ...]:
        """The teacher of a trial has seen next to nothing."""
        return ("--no-teacher-check",) if self.settings.tiny else ()

    def _statistics_file(self, step: Step) -> Path:
        return self._path(step, STATISTICS, "teacher.stats")

    def recipe(self, step: Step, where: Path) -> Path:
        """The recipe of a pruning, or of the phases of a cell."""
        file, pruning = where / "recipe.yaml", step.what.get("pruning")
        document: dict[str, Any] = {"version": 1}
        if pruning is None:
            tokens = self.phase_tokens()
            phases = zip(step.what["phases"], tokens, strict=True)
            document |= {**step.what["sections"], "phases": [{"target": each, "tokens": n} for each, n in phases]}
        elif pruning["budgets"]:
            document["budgets"] = [{"name": name, "target": size} for name, size in step.what["budgets"].items()]
        else:
            document |= {**pruning["sections"], "target": step.what["target"]}
        file.write_text(to_json(document))  # YAML reads JSON
        return file

    def phase_tokens(self) -> tuple[int, int]:
        """Tokens of both phases of a schedule."""
        first = max(1, round(self.settings.steps * FIRST_PHASE))
        unit = self.settings.batch * self.settings.seq_length
        return first * unit, (self.settings.steps - first) * unit

    def _pruned(self, step: Step) -> Iterator[Command]:
        where, pruning = self.store.work(step), step.pruning
        save = where / "student"
        if pruning.slice:
            load = self._path(step, "elastic", "student")
            yield _command("slice", "slice", "--load", load, "--budget", pruning.slice, "--save", save)
        else:
            given: tuple[object, ...] = ("--stats", self._statistics_file(step))
            if pruning.sections.get("experts", {}).get("allocation") == "loss":
                given += ("--search-data", self._path(step, TEXT, "measuring.npy"))
            words = ("--load", self.teacher(step), "--recipe", self.recipe(step, where), "--save", save)
            yield _command("prune", "prune", *words, *given)
        yield self._losses(step, save, *(["--elastic"] if pruning.budgets and not pruning.slice else []))

    def _cell(self, step: Step) -> Iterator[Command]:
        if step.what["cell"]["first_phase"]:
            yield from self._two_phases(step)
        else:
            yield self._cell_training(step, self.store.work(step) / "run", self._path(step, PRUNED, "student"))
        load = self.store.work(step) / "run"
        yield self._losses(step, load, *(["--elastic"] if step.cell.elastic else []))
        if step.cell.acceptance:
            yield self._acceptance(step, load)

    def _cell_training(
        self,
        step: Step,
        save: Path,
        student: Path,
        switches: tuple[str, ...] = (),
        flags: tuple[object, ...] = (),
        name: str = "train",
    ) -> Command:
        """The training of a cell, or of a phase of it."""
        cell, given = step.cell, dict[str, object]()
        given["--hf-config" if cell.pruning == RANDOM else "--student"] = student
        if CACHE in step.needs:
            given["--teacher-cache"] = self._path(step, CACHE, "cache")
            flags += tuple(step.what["flags"])
        else:
            given["--data"] = self._path(step, TEXT, "samples")
        if "--progressive" not in switches:
            given["--train-iters"] = self.settings.steps
        rate = cell.lr or self.settings.lr
        given |= {"--lr": rate, "--min-lr": rate / 10}
        if cell.optimizer != "adam":
            flags += ("--optimizer", cell.optimizer, "--adamw-lr", self.settings.lr)
        if cell.elastic:
            flags += ("--elastic", "together")
        if not cell.carried:
            flags += ("--no-save-optim",)
        prepare = "benchmarks.findings.terms:mtp_lm_alone" if cell.loss in MTP_LM_ALONE else ""
        return self._train(
            step, save, given, flags, batch=self.settings.batch, switches=switches, prepare=prepare, name=name
        )

    def _two_phases(self, step: Step) -> Iterator[Command]:
        where, cell = self.store.work(step), step.cell
        recipe = self.recipe(step, where)
        words: tuple[object, ...] = ("--recipe", recipe, "--to", "torch_dist")
        first, second = where / "first", where / "second"
        stats = ("--stats", self._statistics_file(step))
        yield _command("prune-1", "prune", "--load", self.teacher(step), *words, "--phase", 1, "--save", first, *stats)
        yield self._cell_training(step, where / "run-1", first, ("--progressive",), name="train-1")
        carry = ("--carry-optimizer",) if cell.carried else ()
        words += ("--load", where / "run-1", "--phase", 2, "--save", second)
        yield _command("prune-2", "prune", *words, *self._calibration(step), *carry)
        switches = ("--progressive", *carry)
        yield self._cell_training(step, where / "run", second, switches, name="train-2")
