"""The Python API: what the commands do, as functions of checkpoints, recipes, statistics and plans.

Everything here is exported by ``megatron_slim`` itself, lazily. Where a checkpoint is expected, a path will do. Nothing
prints: messages go to the logger ``megatron_slim``, and progress to the reporter that is given (`reporting.Progress`;
without one it is logged). All errors that a caller can fix are `SlimError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from megatron_slim.aliases import Document, JsonObject, WriteOptions
from megatron_slim.api_elastic import open_budget, slice_budget
from megatron_slim.api_inputs import Format, StrPath, above_zero, data_of, expect, opened, shown
from megatron_slim.api_measures import acceptance, count_parameters, evaluate, figures, task_scores
from megatron_slim.api_record import record
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import ParameterCount
from megatron_slim.checkpoint.convert import Checkpoint, open_checkpoint, write_checkpoint
from megatron_slim.checkpoint.optimizer_state import open_optimizer_state
from megatron_slim.checkpoint.reference import carry_records
from megatron_slim.data import read_samples
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
from megatron_slim.reporting import Progress
from megatron_slim.streaming.fingerprint import fingerprint_like
from megatron_slim.streaming.model_input import read_calibration_samples
from megatron_slim.streaming.samples import check_samples, log_calibration

if TYPE_CHECKING:
    from megatron_slim.api_inputs import Data


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
    "open_budget",
    "open_checkpoint",
    "prune",
    "read_plan",
    "read_recipe",
    "read_statistics",
    "record",
    "slice_budget",
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
        data: prefix of a Megatron .bin/.idx pair, a sample set, a .npy file, or token ids [samples, sequence].
        num_samples: samples to draw; None: 1024 of a .bin/.idx pair or a set, all if it has fewer; all of a matrix.
        seq_length: tokens of a sample of a .bin/.idx pair; None: 4096, or what the model can read.
        seed: of the draw.
        micro_batch_size: samples in one forward pass; None: about 4096 tokens.
        work_dir: keep hidden states and progress here instead of in memory; the same call then resumes after a kill.
        progress: where progress is shown.

    Raises:
        DataError: the data do not suit the model.
        CheckpointError: an activation is not finite.
    """
    num_samples, seq_length = above_zero("num_samples", num_samples), above_zero("seq_length", seq_length)
    micro_batch_size = above_zero("micro_batch_size", micro_batch_size)
    source = opened(checkpoint)
    samples = read_calibration_samples(
        data_of(data), source.shape, num_samples=num_samples, seq_length=seq_length, seed=seed
    )
    from megatron_slim.pruning.calibrate import calibrate as measure
    from megatron_slim.streaming.work_dir import open_work_dir

    log_calibration(source, samples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(shown(progress))
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
    return read_carried_statistics(Path(pruned), opened(checkpoint))


def read_recipe(recipe: StrPath | Document, *, phase: int | None = None) -> Recipe:
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
    samples: Data | None = None,
) -> Plan:
    """Decide what survives. ``print(plan)`` shows the decision, ``plan.save(path)`` writes it.

    Sizes that the recipe leaves to a budget are ranked by the statistics.

    Args:
        recipe: what is wanted.
        checkpoint: the model.
        statistics: of it.
        samples: token ids [samples, sequence], an array or a ``.npy`` file, that layers are measured on, where the
            recipe allocates experts by loss.

    Raises:
        RecipeError: the target is impossible for this model; lists every violation.
        CheckpointError: the statistics are of another model.
    """
    expect(recipe, Recipe, "recipe", "read it with read_recipe")
    expect(statistics, Statistics, "statistics", "read them with read_statistics")
    source = opened(checkpoint)
    check_recipe(recipe, source.shape)
    statistics.check(source.shape, fingerprint_like(source, statistics.source), where="statistics")
    sensitivity = None
    if samples is not None:
        from megatron_slim.pruning.sensitivity import expert_sensitivity

        ids = read_samples(data_of(samples), seq_length=None, num_samples=None)
        check_samples(ids, source.shape)
        sensitivity = partial(expert_sensitivity, source, samples=ids)
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
) -> JsonObject:
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
    expect(plan, Plan, "plan", "read it with read_plan, or make it with make_plan")
    if statistics is not None:
        expect(statistics, Statistics, "statistics", "read them with read_statistics")
    refuse_existing(Path(save))
    rule, source = moment_rule(carry_optimizer, moments_of_merged, to), opened(checkpoint)
    pruned = PrunedCheckpoint(plan, source)
    optimizer = None if rule is None else pruned.optimizer_state(open_optimizer_state(source), rule)
    options: WriteOptions = {"verify": verify, "processes": processes}
    with shown(progress):
        return write_pruned(pruned, Path(save), stats=statistics, to=to, optimizer=optimizer, **options)


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
    arguments: Document | None = None,
    progress: Progress | None = None,
) -> JsonObject:
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
    source = opened(checkpoint)
    with shown(progress):
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
            records=partial(carry_records, source, dtype=dtype, quantized=bool(quantize)),
        )
