"""The steps of a run: each is one command of megatron-slim, and each shows by what it leaves that it is done.

SAVE/recipe.yaml            the recipe with all replaced values
SAVE/run.json               what was asked for, and how far it is (`state`)
SAVE/logs, SAVE/results     of every step: what it printed, and what it found as JSON
SAVE/teacher-cache          the teacher's hidden states on the data of training, where the recipe records them, and
SAVE/teacher-cache-validation  on those of validation
SAVE/phase-K/pruned         student before training, with its plan and report: Hugging Face, or torch_dist where it
                            carries the optimizer's state from the phase before
SAVE/phase-K/plan           the plan as a page
SAVE/phase-K/training       the run: checkpoints (torch_dist) and logs
SAVE/phase-K/model          trained student (Hugging Face); that of the last phase is SAVE/model
SAVE/model-fp8              the same in block-scaled FP8, where the recipe has ``export: {quantize: fp8}``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_slim.checkpoint.torch_dist_names import TRACKER
from megatron_slim.compression.recordings import Recording, cache_of, eval_iters, recordings, validates
from megatron_slim.compression.settings import RunSettings
from megatron_slim.teacher_cache.names import is_finished

EVALUATE_TEACHER, PRUNE, EVALUATE_PRUNED = "evaluate-teacher", "prune", "evaluate-pruned"
TRAIN, EXPORT, EVALUATE, ACCEPTANCE = "train", "export", "evaluate", "acceptance"
SHOW_PLAN = "show-plan"
QUANTIZE, EVALUATE_FP8 = "quantize", "evaluate-fp8"
RECORD, RECORD_VALIDATION = "record", "record-validation"
# The section of a recipe that a step of a kind follows; prune follows all that `pruning` reads too. Recording follows
# some values of ``train`` alone.
SECTION = {
    EVALUATE_TEACHER: "evaluate",
    PRUNE: "calibrate",
    EVALUATE_PRUNED: "evaluate",
    TRAIN: "train",
    EVALUATE: "evaluate",
    ACCEPTANCE: "evaluate",
    QUANTIZE: "export",
    EVALUATE_FP8: "evaluate",
}
RECIPE_FILE, MODEL, MODEL_FP8 = "recipe.yaml", "model", "model-fp8"
OF_RECORDING = ("record", "tokens", "seq_length", "global_batch_size", "eval_iters")
_NO_TEACHER_CHECK = "--no-teacher-check"
_ACCEPTANCE = ("acceptance", "draft_tokens", "max_new_tokens", "num_prompts", "prompt_tokens", "micro_batch_size")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: such as ``phase-1/prune``.
        kind: one of the constants above.
        phase: from 1; None of what is done once.
        command: arguments of ``megatron-slim``.
        output: what it makes.
        done: whether that is complete.
        result: file that its last line of output goes to.
        recover: the command that gives the result where the output is complete and the result was lost; None is an
            empty one.
    """

    name: str
    kind: str
    phase: int | None
    command: tuple[str, ...]
    output: Path
    done: Callable[[], bool]
    result: Path
    recover: tuple[str, ...] | None = None

    @property
    def log_name(self) -> str:
        """Name of its files in ``logs``."""
        return self.name.replace("/", "-")


def steps(settings: RunSettings) -> list[Step]:
    """All steps in order; those of evaluation only where there is something to evaluate on."""
    found = _evaluation(settings, EVALUATE_TEACHER, None, settings.teacher)
    if settings.section("evaluate").get("teacher_acceptance", True):
        found += _acceptance(settings, None, settings.teacher)
    before = settings.teacher
    for phase in range(1, len(settings.phases) + 1):
        folder = settings.save / f"phase-{phase}"
        pruned, training = folder / "pruned", _training(settings, phase)
        model = settings.save / MODEL if phase == len(settings.phases) else folder / MODEL
        found.append(_prune(settings, phase, before, pruned))
        found += _plan_page(settings, phase, pruned, folder / "plan")
        found += _evaluation(settings, EVALUATE_PRUNED, phase, pruned)
        found += _recordings(settings) if phase == 1 else []
        found.append(_train(settings, phase, pruned))
        command = ("convert", "--load", str(training), "--save", str(model), "--to", "hf", "--json")
        found.append(_step(settings, EXPORT, phase, command, model, model.is_dir))
        found += _evaluation(settings, EVALUATE, phase, model) + _acceptance(settings, phase, model)
        before = training
    return found + _quantization(settings, len(settings.phases), settings.save / MODEL)


def command_line(step: Step) -> list[str]:
    """A step as a process."""
    return [sys.executable, "-m", "megatron_slim", *step.command]


def _step(
    settings: RunSettings,
    kind: str,
    phase: int | None,
    command: tuple[str, ...],
    output: Path,
    done: Callable[[], bool],
    recover: tuple[str, ...] | None = None,
) -> Step:
    name = f"teacher/{kind.removesuffix('-teacher')}" if phase is None else f"phase-{phase}/{kind}"
    result = settings.save / "results" / f"{name.replace('/', '-')}.json"
    return Step(name, kind, phase, command, output, done, result, recover)


def _options(values: Mapping[str, Any], *names: str) -> list[str]:
    """Values as arguments: ``--num-samples 8``; of those names alone, where there are any."""
    kept = {key: value for key, value in values.items() if key in names or not names}
    return [
        word
        for key, value in kept.items()
        for word in ("--" + key.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, list) else str(value))
    ]


def _quantization(settings: RunSettings, phase: int, model: Path) -> list[Step]:
    """The last export once more in FP8, and its losses."""
    method, quantized = settings.section("export").get("quantize"), settings.save / MODEL_FP8
    if method is None:
        return []
    command = ("convert", "--load", str(model), "--save", str(quantized), "--to", "hf", "--quantize", method, "--json")
    step = _step(settings, QUANTIZE, phase, command, quantized, quantized.is_dir)
    evaluation = _evaluation(settings, EVALUATE_FP8, phase, quantized)
    return [step, *(replace(each, command=(*each.command, "--dequantize-fp8")) for each in evaluation)]


def _evaluation(settings: RunSettings, kind: str, phase: int | None, model: Path) -> list[Step]:
    if settings.evaluation_data is None:
        return []
    left_out = (*_ACCEPTANCE[:-1], "teacher_acceptance")
    values = {key: value for key, value in settings.section("evaluate").items() if key not in left_out}
    if "tasks_dir" in values:
        values["tasks_dir"] = str(settings.file_of("tasks_dir"))
    command = ["evaluate", "--load", str(model), "--data", str(settings.evaluation_data)]
    command += [] if kind == EVALUATE_TEACHER else ["--teacher", str(settings.teacher)]
    return [_measuring(settings, kind, phase, [*command, *_options(values)])]


def _acceptance(settings: RunSettings, phase: int | None, model: Path) -> list[Step]:
    """A step of its own, because it holds the whole model in memory."""
    values = settings.section("evaluate")
    if "acceptance" not in values:
        return []
    values = {**values, "acceptance": str(settings.file_of("acceptance"))}
    command = ["evaluate", "--load", str(model), *_options(values, *_ACCEPTANCE)]
    return [_measuring(settings, ACCEPTANCE, phase, command)]


def _measuring(settings: RunSettings, kind: str, phase: int | None, command: list[str]) -> Step:
    """A step that leaves nothing but its result."""
    step = _step(settings, kind, phase, (*command, "--json"), settings.save, lambda: False)
    return replace(step, output=step.result, done=step.result.is_file)


def _prune(settings: RunSettings, phase: int, load: Path, pruned: Path) -> Step:
    command = ["prune", "--load", str(load), "--save", str(pruned), "--recipe", str(settings.save / RECIPE_FILE)]
    command += ["--phase", str(phase)] if settings.recipe.phases else []
    command += _statistics(settings, phase) + (_carrying(settings, phase) or ["--to", "hf"])
    recover = ("prune", "--load", str(load), "--plan", str(pruned), "--dry-run", "--json")
    return _step(settings, PRUNE, phase, (*command, "--json"), pruned, pruned.is_dir, recover)


def carries_optimizer(settings: RunSettings, phase: int) -> bool:
    """Whether the pruning of a phase carries the optimizer of the phase before."""
    return phase > 1 and bool(settings.section("train").get("carry_optimizer"))


def measures(settings: RunSettings, phase: int) -> bool:
    """Whether the pruning of a phase calibrates; with ``carry_statistics`` only that of the first does."""
    return phase == 1 or not settings.section("calibrate").get("carry_statistics")


def _statistics(settings: RunSettings, phase: int) -> list[str]:
    """Arguments that say where a pruning has its statistics from."""
    if not measures(settings, phase):
        return ["--carry-statistics", str(settings.save / f"phase-{phase - 1}" / "pruned")]
    values = dict(settings.section("calibrate"))
    work = values.pop("work_dir", None)
    values.pop("carry_statistics", None)
    command = ["--calibration-data", str(settings.calibration_data), *_options(values)]
    return [*command, "--work-dir", f"{Path(work).absolute()}-{phase}"] if work else command


def _carrying(settings: RunSettings, phase: int) -> list[str]:
    """Arguments of a pruning that carries the optimizer of the phase before; none where it does not."""
    train = settings.section("train")
    if not carries_optimizer(settings, phase):
        return []
    rule = ["--moments-of-merged", train["moments_of_merged"]] if "moments_of_merged" in train else []
    return ["--to", "torch_dist", "--carry-optimizer", *rule]


def _plan_page(settings: RunSettings, phase: int, pruned: Path, page: Path) -> list[Step]:
    """The plan as a page, which the report links; only where pictures can be drawn."""
    if find_spec("matplotlib") is None:
        return []
    command = ("show-plan", str(pruned), "--stats", str(pruned), "--save", str(page), "--json")
    return [_step(settings, SHOW_PLAN, phase, command, page, page.is_dir)]


def _recordings(settings: RunSettings) -> list[Step]:
    """The teacher's passes over the data of training and validation, where training reads them."""
    kinds = (RECORD, RECORD_VALIDATION)
    return [_record(settings, kind, found) for kind, found in zip(kinds, recordings(settings), strict=False)]


def _record(settings: RunSettings, kind: str, found: Recording) -> Step:
    command = ["record", "--teacher", str(settings.teacher), "--data", str(found.data), "--save", str(found.cache)]
    command += ["--states", settings.section("train")["record"]]
    command += [] if found.is_set else ["--seq-length", str(found.seq_length)]
    command += ["--num-samples", str(found.samples)] if found.drawn else []
    command += [_NO_TEACHER_CHECK] if _NO_TEACHER_CHECK in settings.flags else []

    def done() -> bool:  # what was recorded may be removed once it has been read
        return is_finished(found.cache) or is_trained(settings)

    return _step(settings, kind, None, (*command, "--json"), found.cache, done)


def _training(settings: RunSettings, phase: int) -> Path:
    return settings.save / f"phase-{phase}" / "training"


def is_trained(settings: RunSettings) -> bool:
    """Whether every phase has been trained to its end."""
    return all(last_iteration(_training(settings, phase)) == stop for phase, stop in enumerate(settings.stops, 1))


def _train(settings: RunSettings, phase: int, pruned: Path) -> Step:
    command = ["distill", *_teaching(settings), "--student", str(pruned), "--save", str(_training(settings, phase))]
    command += ["--recipe", str(settings.save / RECIPE_FILE)]
    command += ["--progressive"] if settings.recipe.phases else ["--train-iters", str(settings.stops[0])]
    command += ["--carry-optimizer"] if _carrying(settings, phase) else []
    command += [*_counted(settings), *settings.megatron]
    training, stop = _training(settings, phase), settings.stops[phase - 1]
    show = ("show-run", str(training), "--json")
    return _step(settings, TRAIN, phase, tuple(command), training, lambda: last_iteration(training) == stop, show)


def _counted(settings: RunSettings) -> list[str]:
    """Sizes that the run counts tokens and recorded samples by: training must not take them from elsewhere."""
    sizes = {"--seq-length": settings.seq_length, "--global-batch-size": settings.samples_per_iteration}
    sizes |= {"--eval-iters": eval_iters(settings)} if recordings(settings) else {}
    return [word for flag, size in sizes.items() for word in (flag, str(size))]


def _teaching(settings: RunSettings) -> list[str]:
    """Arguments of training that name the teacher or its cache, and the data."""
    cache, caches = cache_of(settings), recordings(settings)
    teacher = ["--teacher", str(settings.teacher)] if cache is None else ["--teacher-cache", str(cache)]
    if caches:  # the samples of the first are the data
        return [*teacher, *(word for each in caches[1:] for word in ("--valid-data", str(each.cache)))]
    data = ["--data", *settings.data] if settings.data else []
    reads_valid = settings.valid_data and (cache is None or validates(settings))
    return [*teacher, *data, *(["--valid-data", *settings.valid_data] if reads_valid else [])]


def last_iteration(training: Path) -> int | None:
    """Of the newest complete checkpoint of a run."""
    tracker = training / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdigit() else None
