"""``budgets`` of a recipe: several sizes for one elastic checkpoint, each contained in the one before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_slim.aliases import Document, JsonObject, YamlMapping
from megatron_slim.errors import RecipeError
from megatron_slim.recipe_budget import BOUNDS, is_number, search_violations, unknown_keys, whole_number
from megatron_slim.recipe_sections import SECTIONS, section_violations

if TYPE_CHECKING:
    from megatron_slim.recipe import Recipe

BUDGETS = "budgets"
EXCLUDED = ("target", "phases", "stage")  # what a recipe with budgets has no use for
NAME_RULE = "letters, digits, '.', '_' and '-'"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MERGING = (
    "a merged expert is a new value, which no smaller budget contains (merge in a pruning before, then give budgets "
    "over its result)"
)


@dataclass(frozen=True)
class RecipeBudget:
    """One size of an elastic checkpoint.

    Attributes:
        name: what commands call it.
        weight: of its loss in training.
        recipe: what it makes of the source.
    """

    name: str
    weight: float
    recipe: Recipe


def name_violation(name: object) -> str | None:
    """What is wrong with the name of a budget, or None; it names directories too."""
    good = isinstance(name, str) and _NAME.fullmatch(name) and name.strip(".")
    return None if good else f"name {name!r} is not made of {NAME_RULE}"


def weight_violation(weight: object) -> str | None:
    """What is wrong with the weight of a budget's loss, or None."""
    good = is_number(weight) and weight > 0
    return None if good else f"weight {weight!r} is not a finite number above zero"


def repeated_names(names: list[object]) -> list[str]:
    """A sentence for each name that is there twice."""
    counts = Counter(name for name in names if isinstance(name, str))
    return [f"name {name!r} is there {count} times" for name, count in counts.items() if count > 1]


def refuse_budgets(recipe: Recipe, *, where: str) -> None:
    """Refuse a recipe with budgets where one recipe is followed.

    Raises:
        RecipeError: it has some.
    """
    if recipe.budgets:
        raise RecipeError(
            "the recipe has budgets, for an elastic checkpoint",
            where=where,
            fix="give the recipe to megatron-slim prune (--dry-run shows the sizes), and its result to other commands",
        )


def read_budgets(document: Document, recipe_of: Callable[[Document], Recipe]) -> tuple[RecipeBudget, ...]:
    """The budgets of a document without violations.

    Args:
        document: a recipe.
        recipe_of: makes a recipe of its sections.
    """
    return tuple(
        RecipeBudget(str(each["name"]), float(each.get("weight", 1.0)), recipe_of(_sections(document, each)))
        for each in document.get(BUDGETS, ())
    )


def budgets_violations(document: YamlMapping) -> list[str]:
    """What is wrong with the budgets of a recipe, and what they exclude."""
    budgets = document[BUDGETS]
    found = [f"{key} and {BUDGETS} exclude one another" for key in EXCLUDED if key in document]
    if not isinstance(budgets, list) or not budgets:
        return [*found, f"{BUDGETS} {budgets!r} is not a list of budgets"]
    if not isinstance(document.get("search", {}), Mapping):
        found.append(f"search {document['search']!r} is not a mapping")
    for number, budget in enumerate(budgets, 1):
        if not isinstance(budget, Mapping):
            found.append(f"budget {number}: {budget!r} is not a mapping")
            continue
        found += [f"budget {_label(budget, number)}: {sentence}" for sentence in _violations(document, budget)]
    if found:
        return found
    found = [f"{BUDGETS}: {sentence}" for sentence in repeated_names([budget["name"] for budget in budgets])]
    if "search" in document and not any(_bounded(budget) for budget in budgets):
        found.append(f"search without a bound ({', '.join(BOUNDS)}) in the target of any budget")
    return found + list(_growing(budgets))


def _label(budget: YamlMapping, number: int) -> object:
    return number if "name" not in budget or name_violation(budget["name"]) else budget["name"]


def _sections(document: YamlMapping, budget: YamlMapping) -> JsonObject:
    """A budget's sections, with what it leaves out taken from the recipe's own, key by key."""
    found: JsonObject = {
        name: {**(document.get(name) or {}), **(budget.get(name) or {})} for name in (*SECTIONS, "search")
    }
    found["experts"] = {"method": "prune", **found["experts"]}
    return found | ({"source": document["source"]} if "source" in document else {})


def _violations(document: YamlMapping, budget: YamlMapping) -> Iterator[str]:
    """What is wrong with one budget by itself."""
    yield from unknown_keys(budget, ["name", "weight", *SECTIONS, "search"], "")
    if "name" not in budget:
        yield "name is missing"
    elif sentence := name_violation(budget["name"]):
        yield sentence
    if "weight" in budget and (sentence := weight_violation(budget["weight"])):
        yield sentence
    wrong = [
        sentence
        for name, kind in SECTIONS.items()
        if name in budget and not (name == "target" and budget[name] is None)
        for sentence in section_violations(name, kind, budget[name])
    ]
    yield from wrong
    common = [document.get(name, {}) for name in (*SECTIONS, "search")]
    if wrong or not all(isinstance(each, Mapping) for each in (*common, budget.get("search", {}))):
        if not isinstance(budget.get("search", {}), Mapping):
            yield f"search {budget['search']!r} is not a mapping"
        return
    sections = _sections(document, budget)
    yield from _merging(sections["experts"])
    if _bounded(budget):
        yield from search_violations(sections["search"], sections["target"])
    elif "search" in budget:
        yield f"search without a bound ({', '.join(BOUNDS)}) in target"


def _merging(experts: Document) -> Iterator[str]:
    """Values of a merge, wherever they stand."""
    if experts["method"] != "prune":
        yield f"experts.method {experts['method']!r}: {_MERGING}"
    for key, without in (("align", "none"), ("weighting", "group")):
        if experts.get(key, without) != without:
            yield f"experts.{key} {experts[key]!r} is for merging, and budgets merge nothing (leave it out)"


def _bounded(budget: YamlMapping) -> bool:
    return any(bound in (budget.get("target") or {}) for bound in BOUNDS)


def _growing(budgets: list[Document]) -> Iterator[str]:
    """Sizes and bounds that grow from one budget to a later one."""
    least: dict[str, tuple[Any, str]] = {}  # size -> the smallest so far, and whose it is
    for budget in budgets:
        for key, value in (budget.get("target") or {}).items():
            size = whole_number(value) if key in ("params", "active_params") else value
            if key in least and size > least[key][0]:
                smaller, whose = least[key]
                yield f"budget {budget['name']}: target.{key} {size} is larger than the {smaller} of budget {whose}"
            least[key] = min(least.get(key, (size, budget["name"])), (size, budget["name"]))
