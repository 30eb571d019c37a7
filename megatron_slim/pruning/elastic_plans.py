"""Planning the budgets of a recipe, each within the one before, and a table of what they are (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import BF16_BYTES, count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.elastic import ElasticBudget, check_nested
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.recipe_checks import check_recipe, least_model, space_before_statistics
from megatron_slim.pruning.report import LABELS, Summary, shown_sizes, summarise
from megatron_slim.pruning.search_grid import Limits
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.pruning.target import wanted_sizes
from megatron_slim.recipe_budget import SEARCHABLE
from megatron_slim.recipe_elastic import RecipeBudget

if TYPE_CHECKING:
    from rich.table import Table


def check_budgets(budgets: Sequence[RecipeBudget], shape: ModelShape, *, where: str) -> None:
    """Refuse before anything is measured what no statistics can plan or nest.

    Raises:
        RecipeError: a budget cannot be met, or cannot be within one before, whatever is measured.
    """
    for budget in budgets:
        check_recipe(budget.recipe, shape, where=f"{where}: budget {budget.name}")
    sizes: dict[str, tuple[int, str]] = {}  # by axis, the most that is left, and by which budget
    found: list[str] = []
    for number, budget in enumerate(budgets):
        most = {key: size for key, (size, _) in sizes.items()}
        searched = _searched(budget, shape, Limits(most))
        sentences = [
            *_larger_sizes(budget, shape, sizes, searched),
            *_larger_counts(budget, shape, budgets[:number]),
        ]
        if budget.recipe.budget and not sentences:
            sentences = list(_unmet(budget, shape, Limits(most, needed_by(budgets[number + 1 :], shape))))
        found += [f"budget {budget.name}: {each}" for each in sentences]
        sizes |= {key: (size, budget.name) for key, size in wanted_sizes(budget.recipe, shape).items()}
        sizes |= {key: (grid[-1], budget.name) for key, grid in searched.items() if grid}
    if found:
        raise RecipeError("; ".join(found), where=where, fix="give sizes and bounds that shrink from budget to budget")


def _larger_sizes(
    budget: RecipeBudget,
    shape: ModelShape,
    sizes: Mapping[str, tuple[int, str]],
    searched: Mapping[str, list[int]],
) -> Iterator[str]:
    """Sizes of a budget above what those before have left."""
    wanted = wanted_sizes(budget.recipe, shape)
    for key, (most, whose) in sizes.items():
        own = wanted.get(key, getattr(shape, key))
        if key not in searched and own > most:
            source = "" if key in wanted else ", which the target leaves as the source's,"
            yield f"{key} {own}{source} is larger than the {most} of budget {whose}"
        elif key in searched and not searched[key]:
            least = _searched(budget, shape)[key][0]
            yield f"{key}: the least size that is searched, {least}, is larger than the {most} of budget {whose}"


def _larger_counts(budget: RecipeBudget, shape: ModelShape, before: Sequence[RecipeBudget]) -> Iterator[str]:
    """Bounds of those before that the smallest model of a budget breaks."""
    smallest = least_model(budget.recipe, shape)
    for larger in before:
        for key in smallest.over(larger.recipe.budget) if larger.recipe.budget else ():
            yield f"has at least {getattr(smallest, key):,} {key}, more than budget {larger.name} may"


def _unmet(budget: RecipeBudget, shape: ModelShape, limits: Limits) -> Iterator[str]:
    """Bounds of a budget that nothing meets, between the budgets before and after it."""
    space = space_before_statistics(budget.recipe, shape, limits)
    needed = ", ".join(f"{key} {limits.least[key]}" for key in space.grid if key in limits.least)
    for sentence in space.violations():
        yield sentence + (f" (smaller budgets need {needed})" if needed else "")


def _searched(budget: RecipeBudget, shape: ModelShape, limits: Limits | None = None) -> dict[str, list[int]]:
    return space_before_statistics(budget.recipe, shape, limits).grid if budget.recipe.budget else {}


def needed_by(budgets: Sequence[RecipeBudget], shape: ModelShape) -> dict[str, int]:
    """By axis, the least size of a budget in which some smaller ones are contained; axes that are free left out."""
    found: dict[str, int] = {}
    for budget in budgets:
        searched, wanted = _searched(budget, shape), wanted_sizes(budget.recipe, shape)
        for axis in SEARCHABLE:
            named = budget.recipe.search.grid.get(axis)
            if axis not in searched:
                found[axis] = max(found.get(axis, 0), wanted.get(axis, getattr(shape, axis)))
            elif named is not None:
                found[axis] = max(found.get(axis, 0), named[0])
    return found


def plan_budgets(
    budgets: Sequence[RecipeBudget],
    stats: Statistics,
    shape: ModelShape,
    *,
    options: Mapping[str, Document] | None = None,
    where: str = "recipe",
) -> tuple[ElasticBudget, ...]:
    """Plan the budgets of a recipe, each within the one before.

    Lists that rank by one statistic are contained in one another by themselves. Layers, sizes that are searched and
    experts by loss need not be: they are chosen from what the budget before keeps.

    Args:
        budgets: of the recipe.
        stats: complete statistics of the source.
        shape: sizes of the source.
        options: arguments of `plan.make_plan`, by the name of a budget.
        where: the recipe's file, for errors.

    Returns:
        The budgets, as plans of the source.

    Raises:
        RecipeError: a budget cannot be met, or is not contained in the one before.
    """
    found: list[ElasticBudget] = []
    for number, each in enumerate(budgets):
        own, within = (options or {}).get(each.name, {}), found[-1].plan if found else None
        needed = needed_by(budgets[number + 1 :], shape)
        try:
            plan = make_plan(each.recipe, stats, shape, **own, within=within, needed=needed)
        except RecipeError as error:
            raise RecipeError(error.what, where=f"{where}: budget {each.name}: {error.where}", fix=error.fix) from None
        found.append(ElasticBudget(each.name, each.weight, plan))
    check_nested(found, where=where)
    return tuple(found)


def summaries(budgets: Sequence[ElasticBudget]) -> list[JsonObject]:
    """Name, weight and sizes of every budget, for ``--json``; bytes are those of bf16 weights."""
    return [{"name": each.name, "weight": each.weight, **bf16_summary(each.plan.target_shape)} for each in budgets]


def bf16_summary(shape: ModelShape) -> Summary:
    """Sizes of a model whose weights are bf16."""
    return summarise(shape, BF16_BYTES * count_parameters(shape).total)


def budgets_table(budgets: Sequence[ElasticBudget]) -> Table:
    """A column for each budget."""
    from rich.table import Table

    columns = [bf16_summary(each.plan.target_shape) for each in budgets]
    table = Table("", *(each.name for each in budgets))
    for column in table.columns[1:]:
        column.justify = "right"
    for key in shown_sizes(columns[0]):
        label = LABELS[key] + (" in bf16" if key == "bytes" else "")
        table.add_row(label, *(f"{column[key]:,}" for column in columns))
    table.add_row("weight in training", *(f"{each.weight:g}" for each in budgets))
    return table
