"""``elastic.json``: the budgets that one checkpoint holds, each a plan of what it keeps of it (imports no torch).

Weights that were trained since are sliced by the same document: it binds the sizes of a model, not its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.elastic_record import elastic_file
from megatron_slim.checkpoint.records import ELASTIC, PLAN_ITEMS
from megatron_slim.errors import PlanError, SlimError
from megatron_slim.files import read_json, sha256, write_atomic
from megatron_slim.pruning.nesting import ElasticBudget as ElasticBudget
from megatron_slim.pruning.nesting import check_nested as check_nested
from megatron_slim.pruning.nesting import contained as contained
from megatron_slim.pruning.nesting import relative as relative
from megatron_slim.pruning.nesting import without_mtp
from megatron_slim.pruning.order_reader import order_dict, read_order
from megatron_slim.pruning.plan import Plan, rendered
from megatron_slim.pruning.plan_reader import parse_plan, shape_of
from megatron_slim.recipe_elastic import name_violation, repeated_names, weight_violation

VERSION = 1
MAKE = "make one with megatron-slim prune and a recipe with budgets"
_KEYS, _BUDGET_KEYS = {"version", "parent", "budgets"}, {"name", "weight", "plan"}


@dataclass(frozen=True)
class Elastic:
    """The budgets of a checkpoint.

    Attributes:
        budgets: from the largest, which is the checkpoint itself, whole; each contained in the one before.
        order: of a checkpoint that was sorted (`sorting`), the permutation that undoes it.
    """

    budgets: tuple[ElasticBudget, ...]
    order: Plan | None = None

    @property
    def shape(self) -> ModelShape:
        """Sizes of the checkpoint itself."""
        return self.budgets[0].plan.source_shape

    def named(self, name: str) -> ElasticBudget:
        """The budget of a name.

        Raises:
            SlimError: there is none; lists the names that there are.
        """
        for budget in self.budgets:
            if budget.name == name:
                return budget
        names = ", ".join(budget.name for budget in self.budgets)
        raise SlimError(f"there is no budget {name!r}", fix=f"give one of {names}")

    def down_from(self, name: str) -> tuple[ElasticBudget, ...]:
        """The budget of a name and those within it; `elastic_of` makes a document of its slice of them."""
        return self.budgets[self.budgets.index(self.named(name)) :]

    def without_mtp(self) -> Elastic:
        """The same of the model without its MTP block, as one that was trained without it."""
        budgets = (ElasticBudget(each.name, each.weight, without_mtp(each.plan)) for each in self.budgets)
        return Elastic(tuple(budgets), None if self.order is None else without_mtp(self.order))

    def to_dict(self) -> JsonObject:
        """As a document."""
        return {
            "version": VERSION,
            "parent": {"shape": self.shape.to_dict()},
            "budgets": [
                {"name": budget.name, "weight": budget.weight, "plan": budget.plan.to_dict()} for budget in self.budgets
            ],
            **({} if self.order is None else {"order": order_dict(self.order)}),
        }

    def to_json(self) -> str:
        """Deterministic JSON, every list of numbers on one line."""
        document = self.to_dict()
        budgets = ",\n    ".join(rendered(budget, "    ") for budget in document["budgets"])
        head = rendered({key: document[key] for key in ("version", "parent")}).removesuffix("\n}")
        order = f',\n  "order": {rendered(document["order"], "  ")}' if "order" in document else ""
        return f'{head},\n  "budgets": [\n    {budgets}\n  ]{order}\n}}\n'

    @property
    def sha256(self) -> str:
        """Hash of the document."""
        return sha256(self.to_json())

    def save(self, path: Path | str) -> None:
        """Write the document."""
        write_atomic(Path(path), self.to_json())


def elastic_of(budgets: Sequence[ElasticBudget], *, source_sha256: str | None = None) -> Elastic:
    """What the result of the first budget's plan holds.

    Args:
        budgets: nested plans of one source, largest first.
        source_sha256: fingerprint of that result, for the plans of it.
    """
    large = budgets[0].plan
    return Elastic(
        tuple(
            ElasticBudget(each.name, each.weight, relative(each.plan, large, source_sha256=source_sha256))
            for each in budgets
        )
    )


def find_elastic(checkpoint: Path) -> Elastic | None:
    """The budgets of a checkpoint directory of either format, None where it has none.

    Raises:
        PlanError: the document there is damaged.
    """
    file = elastic_file(checkpoint)
    return None if file is None else read_elastic(file)


def read_elastic(path: Path) -> Elastic:
    """Read and check a document.

    Raises:
        PlanError: lists every violation.
    """
    return parse_elastic(read_json(path, max_items=PLAN_ITEMS), where=str(path))


def parse_elastic(document: object, *, where: str = ELASTIC) -> Elastic:
    """Check a parsed document.

    Raises:
        PlanError: lists every violation.
    """
    if not isinstance(document, Mapping) or document.get("version") != VERSION:
        raise PlanError(f"not a document of budgets of version {VERSION}", where=where, fix=MAKE)
    rows = document.get("budgets")
    found = [f"missing key {key}" for key in sorted(_KEYS - document.keys())]
    found += [f"unknown key {key}" for key in document if key not in (*_KEYS, "order")]
    if not isinstance(rows, list) or not rows:
        found.append("budgets are not a list of at least one")
        rows = []
    shape, sentences = _shape(document, where) if "parent" in document else (None, [])
    found += sentences
    budgets: list[ElasticBudget] = []
    for number, row in enumerate(rows):
        budget, sentences = _budget(row, number)
        found += sentences
        budgets += [] if budget is None else [budget]
    found += repeated_names([row["name"] for row in rows if isinstance(row, Mapping) and "name" in row])
    if not found and shape is not None:
        found = _violations(budgets, shape)
    order = None
    if not found and "order" in document:
        order, found = read_order(document["order"], budgets[0].plan)
    if found:
        raise PlanError("; ".join(found), where=where, fix=f"{MAKE}, or get the file again")
    return Elastic(tuple(budgets), order)


def _shape(document: Document, where: str) -> tuple[ModelShape | None, list[str]]:
    try:
        return shape_of(document["parent"], "parent"), []
    except SlimError as error:
        return None, [f"parent: {error.what}"]


def _budget(row: object, number: int) -> tuple[ElasticBudget | None, list[str]]:
    """A budget of the document, or what is wrong with it."""
    if not isinstance(row, Mapping) or set(row) != _BUDGET_KEYS:
        return None, [f"budget {number} is not an object with {', '.join(sorted(_BUDGET_KEYS))}"]
    wrong = [sentence for sentence in (name_violation(row["name"]), weight_violation(row["weight"])) if sentence]
    found = [f"budget {number}: {sentence}" for sentence in wrong]
    try:
        plan = parse_plan(row["plan"], where="plan")
    except SlimError as error:
        where = f"{error.where}: " if error.where else ""
        return None, [*found, f"budget {row['name']}: {where}{error.what}"]
    return (None, found) if found else (ElasticBudget(row["name"], float(row["weight"]), plan), [])


def _violations(budgets: Sequence[ElasticBudget], shape: ModelShape) -> list[str]:
    """What does not fit together in plans that are right by themselves."""
    found = [
        f"budget {budget.name}: its plan is for a model of other sizes than the parent"
        for budget in budgets
        if budget.plan.source_shape != shape
    ]
    if not found and budgets[0].plan.target_shape != shape:
        found.append(f"budget {budgets[0].name}: the first is the parent itself, and this one is smaller")
    return found or contained(budgets)
