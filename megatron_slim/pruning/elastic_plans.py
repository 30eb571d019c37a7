"""Planning the budgets of a recipe, each within the one before, and a table of what they are (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import BF16_BYTES, count_parameters
from megatron_slim.errors import RecipeError
from megatron_slim.pruning.elastic import ElasticBudget, check_nested
from megatron_slim.pruning.plan import make_plan
from megatron_slim.pruning.recipe_checks import check_recipe, space_before_statistics
from megatron_slim.pruning.report import LABELS, Summary, shown_sizes, summarise
from megatron_slim.pruning.statistics import Statistics
from megatron_slim.pruning.target import wanted_sizes
from megatron_slim.recipe_elastic import RecipeBudget

if TYPE_CHECKING:
    from rich.table import Table


def check_budgets(budgets: Sequence[RecipeBudget], shape: ModelShape, *, where: str) -> None:
    """Refuse before anything is measured what no statistics can plan or nest.

    Raises:
        RecipeError: a budget cannot be met, or a size grows from one to the next; what is searched is not known yet.
    """
    sizes: dict[str, tuple[int, str]] = {}
    found = []
    for budget in budgets:
        check_recipe(budget.recipe, shape, where=f"{where}: budget {budget.name}")
        wanted = wanted_sizes(budget.recipe, shape)
        searched = space_before_statistics(budget.recipe, shape).grid if budget.recipe.budget else {}
        for key, (least, whose) in sizes.items():
            size = wanted.get(key, getattr(shape, key))
            if key in searched and searched[key][0] > least:
                there = f"the least size that is searched, {searched[key][0]}, is larger than"
                found.append(f"budget {budget.name}: {key}: {there} the {least} of budget {whose}")
            elif size > least and key not in searched:
                own = "" if key in wanted else ", which the target leaves as the source's,"
                found.append(f"budget {budget.name}: {key} {size}{own} is larger than the {least} of budget {whose}")
        sizes |= {key: (size, budget.name) for key, size in wanted.items()}
    if found:
        raise RecipeError("; ".join(found), where=where, fix="give sizes that shrink from budget to budget")


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
    for each in budgets:
        own, within = (options or {}).get(each.name, {}), found[-1].plan if found else None
        try:
            plan = make_plan(each.recipe, stats, shape, **own, within=within)
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
