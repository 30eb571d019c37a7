"""What ``plan`` and ``prune`` decide, from statistics that are given or measured for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.calibration_run import CalibrationOptions, calibration_samples, measure
from megatron_slim.cli.given_statistics import Given
from megatron_slim.errors import SlimError
from megatron_slim.recipe import Recipe, select_phase
from megatron_slim.recipe_elastic import RecipeBudget

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.candidates import Measuring
    from megatron_slim.pruning.elastic import ElasticBudget
    from megatron_slim.pruning.plan import Plan
    from megatron_slim.pruning.statistics import Statistics
    from megatron_slim.streaming.work_dir import WorkDir


def first_recipe(schedule: Recipe, phase: int | None, *, where: str) -> Recipe:
    """The recipe that is applied: of a phase, or of the largest budget."""
    if schedule.budgets and phase is None:
        return schedule.budgets[0].recipe
    return select_phase(schedule, phase, where=where)


def search_options(
    measuring: Measuring | None,
    recipe: Recipe,
    source: Checkpoint,
    calibration: CalibrationOptions | None = None,
    *,
    where: str,
) -> JsonObject:
    """Arguments of `plan.make_plan`. Layers are measured on ``--search-data``, without it on calibration data.

    Raises:
        SlimError: there is nothing to choose between, or nothing to measure layers on.
    """
    by_loss, options = recipe.experts.allocation == "loss", JsonObject()
    if measuring is not None and recipe.budget is None and not by_loss:
        fix = "leave it out"
        raise SlimError("--search-data, but the recipe has no budget and no allocation by loss", where=where, fix=fix)
    if measuring is not None and recipe.budget is not None:
        options |= {"measure": measuring.losses(source), "top": measuring.top}
    if by_loss:
        from megatron_slim.pruning.candidates import MOST_SAMPLES
        from megatron_slim.pruning.sensitivity import expert_sensitivity

        if measuring is not None:
            samples = measuring.samples(source)
        elif calibration is not None:
            samples = calibration_samples(source, calibration).first(MOST_SAMPLES)
        else:
            raise SlimError("experts.allocation loss needs data to measure layers on", fix="give --search-data")
        options["sensitivity"] = partial(expert_sensitivity, source, samples=samples)
    return options


def decide(
    recipe: Recipe,
    source: Checkpoint,
    given: Given | None,
    calibration: CalibrationOptions | None,
    work: WorkDir | None,
    measuring: Measuring | None,
    *,
    where: str,
) -> tuple[Plan, Statistics]:
    """The plan of a recipe, and the statistics that it follows from."""
    from megatron_slim.pruning.plan import make_plan
    from megatron_slim.pruning.recipe_checks import check_recipe

    check_recipe(recipe, source.shape, where=where)
    options = search_options(measuring, recipe, source, calibration, where=where)
    stats = _statistics(source, given, calibration, work)
    return make_plan(recipe, stats, source.shape, **options), stats


def decide_budgets(
    budgets: Sequence[RecipeBudget],
    source: Checkpoint,
    given: Given | None,
    calibration: CalibrationOptions | None,
    work: WorkDir | None,
    measuring: Measuring | None,
    *,
    where: str,
) -> tuple[tuple[ElasticBudget, ...], Statistics]:
    """Nested plans of the source for the budgets of a recipe, and the statistics that all of them follow from."""
    from megatron_slim.pruning.elastic_plans import check_budgets, plan_budgets

    check_budgets(budgets, source.shape, where=where)
    measured = [each for each in budgets if each.recipe.budget or each.recipe.experts.allocation == "loss"]
    options = {
        each.name: search_options(measuring, each.recipe, source, calibration, where=where)
        for each in measured or budgets[:1]  # of which none has what data is for
    }
    stats = _statistics(source, given, calibration, work)
    return plan_budgets(budgets, stats, source.shape, options=options, where=where), stats


def _statistics(
    source: Checkpoint, given: Given | None, calibration: CalibrationOptions | None, work: WorkDir | None
) -> Statistics:
    if given is not None:
        return given.read(source)
    assert calibration is not None
    return measure(source, calibration, work)
