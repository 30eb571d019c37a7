"""The Python API: what the commands do, as functions of checkpoints, recipes, statistics and plans.

Everything here is exported by ``megatron_slim`` itself, lazily. Where a checkpoint is expected, a path will do. Nothing
prints: messages go to the logger ``megatron_slim``, and progress to the reporter that is given (`reporting.Progress`;
without one it is logged). All errors that a caller can fix are `SlimError`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import ParameterCount
from megatron_slim.architecture.table import count_parameters as _count_parameters
from megatron_slim.checkpoint.convert import Checkpoint, log_left_out, open_checkpoint, write_checkpoint
from megatron_slim.checkpoint.optimizer_state import open_optimizer_state
from megatron_slim.checkpoint.reference import carry_reference
from megatron_slim.compat.runtime import default_dtype
from megatron_slim.errors import SlimError
from megatron_slim.files import refuse_existing
from megatron_slim.pruning.apply import PrunedCheckpoint
from megatron_slim.pruning.carried_statistics import read_carried_statistics
from megatron_slim.pruning.pipeline import write_pruned
from megatron_slim.pruning.plan import Plan
from megatron_slim.pruning.plan import make_plan as _make_plan
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.recipe_checks import check_recipe
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.recipe import Recipe, load_recipe, parse_recipe, select_phase
from megatron_slim.recipe_run import moment_rule
from megatron_slim.reporting import Progress, use_progress
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.streaming.samples import check_samples, log_calibration, read_calibration_samples

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from megatron_slim.evaluation.acceptance import Acceptance
    from megatron_slim.evaluation.perplexity import Evaluation

    Data: TypeAlias = str | os.PathLike[str] | npt.NDArray[np.int64]

StrPath: TypeAlias = str | os.PathLike[str]
Format: TypeAlias = Literal["hf", "torch_dist"]

__all__ = [
    "Checkpoint",
    "ModelShape",
    "ParameterCount",
    "Plan",
    "Recipe",
    "SlimError",
    "Statistics",
    "acceptance",
    "calibrate",
    "carry_statistics",
    "convert",
    "count_parameters",
    "evaluate",
    "figures",
    "make_plan",
    "open_checkpoint",
    "prune",
    "read_plan",
    "read_recipe",
    "read_statistics",
    "task_scores",
]


def calibrate(
    checkpoint: Checkpoint | StrPath,
    data: Data,
    *,
    num_samples: int | None = None,
    seq_length: int | None = None,
    seed: int = 1234,
    micro_batch_size: int | None = None,
    work_dir: StrPath | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Measure what pruning is based on, with one transformer block of the model in memory at a time.

    Args:
        checkpoint: the model, opened or as its path.
        data: prefix of a Megatron .bin/.idx pair, a .npy file, or token ids [samples, sequence].
        num_samples: samples to draw; None: 1024 of a .bin/.idx pair or all if it has fewer, all of a matrix.
        seq_length: tokens of a sample of a .bin/.idx pair; None: 4096, or what the model can read.
        seed: of the draw.
        micro_batch_size: samples in one forward pass; None: about 4096 tokens.
        work_dir: keep hidden states and progress here instead of in memory; the same call then resumes after a kill.
        progress: where progress is shown.

    Raises:
        DataError: the data do not suit the model.
        CheckpointError: an activation is not finite.
    """
    source = _opened(checkpoint)
    samples = read_calibration_samples(
        _data(data), source.shape, num_samples=num_samples, seq_length=seq_length, seed=seed
    )
    from megatron_slim.pruning.calibrate import calibrate as measure
    from megatron_slim.streaming.work_dir import open_work_dir

    log_calibration(source, samples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_shown(progress))
        work = stack.enter_context(open_work_dir(Path(work_dir))) if work_dir is not None else None
        return measure(source, samples, micro_batch_size=micro_batch_size, work=work)


def read_statistics(path: StrPath) -> Statistics:
    """Read what `calibrate` gave, from its file or from a pruned checkpoint that keeps it; ``save(path)`` writes it.

    Raises:
        CheckpointError: it is missing, or holds something else.
    """
    return Statistics.load(Path(path))


def carry_statistics(pruned: StrPath, checkpoint: Checkpoint | StrPath) -> Statistics:
    """Statistics for a model that was pruned and trained, without a new calibration: those that the pruning kept.

    What its plan kept has the numbers measured before it, a merged expert those of its base.

    Args:
        pruned: the pruned checkpoint that the model was trained from, with plan and statistics.
        checkpoint: the model.

    Raises:
        SlimError: plan or statistics are missing, or did not give this model.
    """
    return read_carried_statistics(Path(pruned), _opened(checkpoint))


def read_recipe(recipe: StrPath | Mapping[str, Any], *, phase: int | None = None) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a YAML file, the name of a recipe that comes with the package, or the content of one.
        phase: which phase of a recipe with phases, from 1.

    Raises:
        RecipeError: it breaks the schema; lists every violation.
    """
    if isinstance(recipe, Mapping):
        return select_phase(parse_recipe(recipe), phase, where="recipe")
    return select_phase(load_recipe(Path(recipe)), phase, where=str(recipe))


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint | StrPath,
    statistics: Statistics,
    *,
    samples: npt.NDArray[np.int64] | None = None,
) -> Plan:
    """Decide what survives. ``print(plan)`` shows the decision, ``plan.save(path)`` writes it.

    Sizes that the recipe leaves to a budget are ranked by the statistics.

    Args:
        recipe: what is wanted.
        checkpoint: the model.
        statistics: of it.
        samples: token ids [samples, sequence] that layers are measured on, where the recipe allocates experts by loss.

    Raises:
        RecipeError: the target is impossible for this model; lists every violation.
        CheckpointError: the statistics are of another model.
    """
    _expect(recipe, Recipe, "recipe", "read it with read_recipe")
    _expect(statistics, Statistics, "statistics", "read them with read_statistics")
    source = _opened(checkpoint)
    check_recipe(recipe, source.shape)
    statistics.check(source.shape, fingerprint(source), where="statistics")
    sensitivity = None
    if samples is not None:
        from megatron_slim.pruning.sensitivity import expert_sensitivity

        check_samples(samples, source.shape)
        sensitivity = partial(expert_sensitivity, source, samples=samples)
    return _make_plan(recipe, statistics, source.shape, sensitivity=sensitivity)


def read_plan(path: StrPath) -> Plan:
    """Read a plan that `make_plan` or the command has made: the file, or the pruned checkpoint that has it.

    Raises:
        RecipeError: it is missing, or is not a plan.
    """
    return load_plan(Path(path))


def prune(
    checkpoint: Checkpoint | StrPath,
    plan: Plan,
    save: StrPath,
    *,
    to: Format = "hf",
    statistics: Statistics | None = None,
    carry_optimizer: bool = False,
    moments_of_merged: Literal["sum", "base"] | None = None,
    verify: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model of a plan to a new directory, which appears only when everything in it is complete.

    Args:
        checkpoint: the model that the plan was made for.
        plan: what survives.
        save: the new directory.
        to: format of the result.
        statistics: are kept next to it, where given.
        carry_optimizer: prune the optimizer's moments and main weights as the weights; the checkpoint is the
            torch_dist one of a run that saved with ``--dist-ckpt-optim-fully-reshardable``, and so is the result.
        moments_of_merged: moments of a merged expert, the sum of its members' or its base's own; None: ``base``.
        verify: read the result back and compare.
        processes: how many write; None: chosen by size and cores.
        progress: where progress is shown.

    Returns:
        What was written: ``tensors``, ``parameters``, ``bytes`` and more, as ``megatron-slim prune --json``.

    Raises:
        CheckpointError: the plan is of another model, what was read back differs, or there is no optimizer to carry.
    """
    _expect(plan, Plan, "plan", "read it with read_plan, or make it with make_plan")
    if statistics is not None:
        _expect(statistics, Statistics, "statistics", "read them with read_statistics")
    refuse_existing(Path(save))
    rule, source = moment_rule(carry_optimizer, moments_of_merged, to), _opened(checkpoint)
    pruned = PrunedCheckpoint(plan, source)
    optimizer = None if rule is None else pruned.optimizer_state(open_optimizer_state(source), rule)
    options = {"to": to, "verify": verify, "processes": processes, "optimizer": optimizer}
    with _shown(progress):
        return write_pruned(pruned, Path(save), stats=statistics, **options)


def convert(
    checkpoint: Checkpoint | StrPath,
    save: StrPath,
    *,
    to: Format,
    dtype: torch.dtype | None = None,
    expert_storage: Literal["fused", "separate"] | None = None,
    quantize: Literal["fp8"] | None = None,
    verify: bool = True,
    processes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in the other format, or the same one with changes, every weight bit for bit, or quantized.

    Args:
        checkpoint: the model, opened or as its path.
        save: a new directory, which appears only when everything in it is complete.
        to: format of the result.
        dtype: cast every tensor; None keeps each as it is.
        expert_storage: how Hugging Face files hold the experts of a layer; None as the source does.
        quantize: ``fp8`` writes the linear layers in block-scaled FP8; only to ``hf``.
        verify: read the result back and compare.
        processes: how many write; None: chosen by size and cores.
        arguments: kept in the result's provenance.
        progress: where progress is shown.

    Returns:
        What was written: ``tensors``, ``parameters``, ``bytes`` and more, as ``megatron-slim convert --json``.

    Raises:
        CheckpointError: the source is incomplete, or what was read back differs.
    """
    refuse_existing(Path(save))
    source = _opened(checkpoint)
    with _shown(progress):
        return write_checkpoint(
            source,
            Path(save),
            to=to,
            dtype=dtype,
            verify=verify,
            processes=processes,
            expert_storage=expert_storage,
            quantize=quantize,
            arguments=arguments,
            records=None if quantize else partial(carry_reference, source, dtype=dtype),
        )


def evaluate(
    checkpoint: Checkpoint | StrPath,
    data: Data,
    *,
    seq_length: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    teacher: Checkpoint | StrPath | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Loss of a checkpoint, main head and MTP heads, with one transformer block in memory at a time.

    Args:
        checkpoint: the model, opened or as its path.
        data: prefix of a Megatron .bin/.idx pair, a .npy file, or token ids [samples, sequence].
        seq_length: tokens of a sample; needed with a .bin/.idx pair.
        num_samples: samples to draw; None: all.
        seed: of the draw.
        micro_batch_size: samples in one forward pass.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.
        teacher: a model of the same vocabulary to compare with; its last hidden states wait in memory.
        progress: where progress is shown.

    Returns:
        ``loss`` (nats per token), ``perplexity``, ``tokens``, ``mtp_loss`` (one number per MTP depth). With a teacher
        also ``kl`` (nats per token), ``top1_agreement``, ``teacher_loss``, ``loss_difference``, ``mtp_kl``,
        ``mtp_top1_agreement``. ``stderr`` has the standard errors over samples by name.

    Raises:
        DataError: the data do not suit the model.
        CheckpointError: a loss is not finite, or the teacher has another vocabulary.
    """
    from megatron_slim.evaluation.perplexity import evaluate_on
    from megatron_slim.evaluation.teacher import Teacher

    with _shown(progress):
        result, _ = evaluate_on(
            _opened(checkpoint),
            _data(data),
            seq_length=seq_length,
            num_samples=num_samples,
            seed=seed,
            micro_batch_size=micro_batch_size,
            dtype=dtype or default_dtype(),
            teacher=None if teacher is None else Teacher(_opened(teacher)),
        )
    return result


def acceptance(
    checkpoint: Checkpoint | StrPath,
    prompts: StrPath | list[list[int]],
    *,
    draft_tokens: int = 5,
    max_new_tokens: int = 128,
    num_prompts: int | None = None,
    prompt_tokens: int | None = None,
    stop_at_eos: bool = False,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Acceptance:
    """How many drafts of its MTP block a model accepts in greedy speculative decoding; the whole model is in memory.

    Args:
        checkpoint: the model, opened or as its path.
        prompts: token ids of each; or JSON lines with ``text`` or ``tokens``, or a .npy matrix of ids.
        draft_tokens: tokens drafted in a round.
        max_new_tokens: tokens to generate after each prompt.
        num_prompts: of a file, the first so many; None: all.
        prompt_tokens: of each prompt of a file, the first so many; None: all.
        stop_at_eos: end texts at the ``eos_token_id`` of config.json.
        micro_batch_size: prompts that are continued at the same time.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.
        progress: where progress is shown.

    Returns:
        ``per_round`` and ``per_position``, each with ``acc``, ``mean_accepted_length`` and ``drafts``; ``rounds`` and
        ``tokens``.

    Raises:
        CheckpointError: the model has no MTP block.
        DataError: the prompts do not suit the model.
    """
    from megatron_slim.evaluation.acceptance import acceptance_of

    with _shown(progress):
        result, _ = acceptance_of(
            _opened(checkpoint),
            None,
            Path(prompts) if isinstance(prompts, (str, os.PathLike)) else prompts,
            number=num_prompts,
            length=prompt_tokens,
            draft_tokens=draft_tokens,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            micro_batch_size=micro_batch_size,
            dtype=dtype or default_dtype(),
        )
    return result


def task_scores(
    checkpoint: Checkpoint | StrPath,
    tasks: Sequence[str],
    *,
    tasks_dir: StrPath | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Scores of a model on tasks of lm-evaluation-harness, offline (extra ``eval``); the whole model is in memory.

    Args:
        checkpoint: the model, opened or as its path, with its tokenizer.
        tasks: names of tasks or groups of the harness, or ``slimqwen``: those of the paper whose data are there.
        tasks_dir: directory with YAML files of further tasks.
        num_fewshot: examples in a prompt; None: as the task says.
        limit: documents of each task; None: all.
        micro_batch_size: requests in one forward pass.
        dtype: of weights and activations; None: bf16 on a GPU, fp32 on a CPU.

    Returns:
        ``tasks``, by task its ``metrics``, each with ``value`` and ``stderr``, and ``documents``; and
        ``tasks_left_out``, why tasks of a preset cannot run; as ``megatron-slim evaluate --json``.

    Raises:
        SlimError: the extra is not installed.
        DataError: a task is unknown or its data are not there, or the checkpoint has no tokenizer of its own.
    """
    from megatron_slim.evaluation.tasks import Tasks, check_tokenizer

    source = _opened(checkpoint)
    check_tokenizer(source)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    directory = None if tasks_dir is None else Path(tasks_dir)
    loaded = Tasks(names, tasks_dir=directory, num_fewshot=num_fewshot, limit=limit)
    found = loaded.run(source, micro_batch_size=micro_batch_size, dtype=dtype)
    return {"tasks": found, "tasks_left_out": loaded.left_out}


def count_parameters(model: ModelShape | Checkpoint | StrPath, *, include_mtp: bool = True) -> ParameterCount:
    """Count a model's parameters: ``total``, and ``active``, all but the routed experts that a token does not visit.

    Args:
        model: its sizes, such as ``plan.target_shape``, or a checkpoint, opened or as its path.
        include_mtp: count the MTP block too.
    """
    shape = model if isinstance(model, ModelShape) else _opened(model).shape
    return _count_parameters(shape, include_mtp=include_mtp)


def figures(plan: Plan, statistics: Statistics) -> dict[str, bytes]:
    """Pictures of a plan by file name, as PNG: importances and what was cut, experts and their groups.

    Raises:
        SlimError: matplotlib is not installed, or the statistics are not those of the plan.
    """
    from megatron_slim.pruning.plan_plots import figures as draw
    from megatron_slim.pruning.plan_view import check_statistics

    _expect(plan, Plan, "plan", "read it with read_plan, or make it with make_plan")
    _expect(statistics, Statistics, "statistics", "read them with read_statistics")
    check_statistics(plan, statistics, where="statistics")
    return draw(plan, statistics)


def _expect(value: object, kind: type, name: str, fix: str) -> None:
    """Refuse an argument of another type, such as the path of what is expected."""
    if not isinstance(value, kind):
        raise SlimError(f"is of type {type(value).__name__}, not {kind.__name__}", where=name, fix=fix)


def _data(data: Data) -> Path | npt.NDArray[np.int64]:
    return Path(data) if isinstance(data, (str, os.PathLike)) else data


def _opened(checkpoint: Checkpoint | StrPath) -> Checkpoint:
    if not isinstance(checkpoint, (str, os.PathLike)):
        if not hasattr(checkpoint, "read_rows"):
            raise SlimError(
                f"is of type {type(checkpoint).__name__}, not a checkpoint",
                where="checkpoint",
                fix="give its path, or open it with open_checkpoint",
            )
        return checkpoint
    source = open_checkpoint(Path(checkpoint))
    log_left_out(source)
    return source


@contextlib.contextmanager
def _shown(progress: Progress | None) -> Iterator[None]:
    with use_progress(progress) if progress is not None else contextlib.nullcontext():
        yield
