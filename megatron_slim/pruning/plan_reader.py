"""Reading a plan back: a plan may have been edited or torn, so everything that applying relies on is checked."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_slim.aliases import Document
from megatron_slim.architecture.family import LAYERS
from megatron_slim.architecture.rope import read_rope
from megatron_slim.architecture.shape import LATER, ModelShape
from megatron_slim.checkpoint.records import PLAN, PLAN_ITEMS
from megatron_slim.errors import PlanError
from megatron_slim.files import read_json
from megatron_slim.pruning.allocation import violations as allocation_violations
from megatron_slim.pruning.experts import ExpertGroup
from megatron_slim.pruning.inner_axes import OPTIONAL, InnerAxes, index_violations, violations
from megatron_slim.pruning.plan import VERSION, Plan
from megatron_slim.pruning.search import Candidate, Ranking, counted, resolved
from megatron_slim.pruning.target import allocation_unit, target_shape
from megatron_slim.recipe import Recipe, parse_recipe

_KEYS = ("version", "recipe", "source", "stats", "search", "target", "kept_layers", "kept_hidden", "experts")
_ALLOCATION = "allocation"  # only where experts are allocated
_SEARCH = {"count", "chosen", "candidates"}
_INNER = tuple(part for part in InnerAxes.__annotations__ if part not in OPTIONAL)
# Weights are shares that sum to 1 up to the rounding of a few hundred additions in float64.
_SUM_TOLERANCE = 1e-9


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Args:
        path: the file, or the directory of a pruned checkpoint, which has it.

    Raises:
        PlanError: the file is not a plan, or is one that cannot be applied.
    """
    path = path / PLAN if path.is_dir() else path
    return parse_plan(read_json(path, max_items=PLAN_ITEMS), where=str(path))


def parse_plan(document: object, *, where: str = "plan") -> Plan:
    """Check a parsed plan.

    Raises:
        PlanError: lists every violation of the part that fails first.
    """
    if not isinstance(document, Mapping) or document.get("version") != VERSION:
        raise PlanError(f"not a plan of version {VERSION}", where=where, fix="make it with megatron-slim plan")
    _refuse([f"missing key {key}" for key in (*_KEYS, *_INNER) if key not in document], where)
    _refuse([f"unknown key {key}" for key in document if key not in (*_KEYS, *_INNER, *OPTIONAL, _ALLOCATION)], where)
    recipe = parse_recipe(document["recipe"], where=f"{where}: recipe")
    source = shape_of(document["source"], f"{where}: source")
    target = shape_of(document["target"], f"{where}: target")
    layers, hidden = document["kept_layers"], document["kept_hidden"]
    found = index_violations("kept_layers", layers, target.num_layers, source.num_layers)
    found += index_violations("kept_hidden", hidden, target.hidden_size, source.hidden_size)
    _refuse(found, where)
    search = _search(document["search"], recipe, target, where)
    followed, losses = resolved(recipe, search), _allocation(document, recipe, source, where)
    shared = target.experts_per_layer or None if losses else None
    if target_shape(followed, source, tuple(layers), shared) != target:
        raise PlanError("target.shape is not what recipe, source.shape and kept_layers give", where=where)
    plan = Plan(
        recipe=recipe,
        source_shape=source,
        target_shape=target,
        source_sha256=_hash(document["source"], f"{where}: source"),
        stats_sha256=_hash(document["stats"], f"{where}: stats"),
        kept_layers=tuple(layers),
        kept_hidden=tuple(hidden),
        experts={},
        inner=InnerAxes(),
        search=search,
        allocation=losses,
    )
    if losses:
        counts = [count for count in target.experts_per_layer if count]
        _refuse(allocation_violations(counts, target.num_moe_experts, allocation_unit(followed)), where)
    experts = _experts(document["experts"], plan, where)
    _refuse(violations(document, list(plan.source_blocks.values()), source, target), where)
    return dataclasses.replace(plan, experts=experts, inner=InnerAxes.from_dict(document))


def _allocation(document: Document, recipe: Recipe, source: ModelShape, where: str) -> dict[str, float]:
    """What pruning the experts of a layer alone adds, where the recipe allocates them by that."""
    value = document.get(_ALLOCATION, {})
    if not isinstance(value, Mapping) or not all(type(loss) in (int, float) for loss in value.values()):
        raise PlanError(f"{_ALLOCATION} is not an object with a loss for every layer", where=where)
    layers = {block for block in source.routed_blocks if block.startswith(LAYERS)}
    if value and set(value) != layers:
        raise PlanError(f"{_ALLOCATION} is not an object with a loss for every layer", where=where)
    if bool(value) != (recipe.experts.allocation == "loss"):
        raise PlanError(f"{_ALLOCATION} and experts.allocation of the recipe contradict each other", where=where)
    return {str(block): float(loss) for block, loss in value.items()}


def _refuse(violations: list[str], where: str) -> None:
    if violations:
        more = f"; and {len(violations) - 5} more" if len(violations) > 5 else ""
        raise PlanError("; ".join(violations[:5]) + more, where=where, fix="make the plan again")


def shape_of(section: object, where: str) -> ModelShape:
    """The sizes of a model in a section of a document, under the key ``shape``.

    Raises:
        SlimError: there are none, or they are those of a model that cannot be built.
    """
    value = section.get("shape") if isinstance(section, Mapping) else None
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    kinds |= dict.fromkeys(("tuple[str, ...]", "tuple[int, ...]"), (list,))
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(ModelShape) if field.type in kinds}
    known = {*fields, *LATER}
    if not isinstance(value, Mapping) or not fields.keys() - set(LATER) <= value.keys() <= known:
        raise PlanError("shape is not an object with all sizes of a model", where=where)
    given = {key: kind for key, kind in fields.items() if key in value}
    _refuse([f"shape.{key} {value[key]!r}" for key, kind in given.items() if type(value[key]) not in kind], where)
    _, yarn, found = read_rope(value)
    _refuse([f"shape.{sentence}" for sentence in found], where)
    lists = {"layer_types": tuple(map(str, value["layer_types"]))}
    lists["experts_per_layer"] = tuple(value.get("experts_per_layer", ()))
    shape = ModelShape(**{**value, **lists, "rope_scaling": yarn})
    shape.validate(where)
    return shape


def _search(value: object, recipe: Recipe, target: ModelShape, where: str) -> Ranking | None:
    """The search of a recipe with a budget, what was chosen being the target."""
    if (value is None) != (recipe.budget is None):
        raise PlanError("search is given without a budget, or a budget without search", where=where)
    if recipe.budget is None:
        return None
    found = value if isinstance(value, Mapping) and set(value) == _SEARCH else {}
    rows = found.get("candidates")
    if not isinstance(rows, list) or type(found["count"]) is not int or not 0 < len(rows) <= found["count"]:
        raise PlanError(f"search is not an object with {', '.join(sorted(_SEARCH))}", where=where)
    axes = {axis for axis in recipe.search.axes if getattr(recipe.target, axis) is None}
    _refuse([f"search.candidates {k} {row!r}" for k, row in enumerate(rows) if not _is_candidate(row, axes)], where)
    if type(found["chosen"]) is not int or not 0 <= found["chosen"] < len(rows):
        raise PlanError(f"search.chosen {found['chosen']!r} is not one of {len(rows)} candidates", where=where)
    candidates = tuple(Candidate(**row) for row in rows)
    chosen = candidates[found["chosen"]]
    if counted(target, chosen.sizes, chosen.score, chosen.loss) != chosen or chosen.over(recipe.budget):
        raise PlanError("search.chosen is over the recipe's budget, or target.shape has other counts", where=where)
    return Ranking(found["count"], found["chosen"], candidates)


def _is_candidate(row: object, axes: set[str]) -> bool:
    if not isinstance(row, Mapping) or set(row) != {part.name for part in dataclasses.fields(Candidate)}:
        return False
    sizes = row["sizes"]
    if not isinstance(sizes, Mapping) or set(sizes) != axes or not all(type(size) is int for size in sizes.values()):
        return False
    if type(row["params"]) is not int or type(row["active_params"]) is not int:
        return False
    numbers = [row["memory_gb"], row["score"], *([] if row["loss"] is None else [row["loss"]])]
    return all(type(number) is float for number in numbers)


def _hash(section: object, where: str) -> str:
    value = section.get("sha256") if isinstance(section, Mapping) else None
    if not isinstance(value, str) or len(value) != 64:
        raise PlanError(f"sha256 {value!r} is not a hash", where=where)
    return value


def _experts(value: object, plan: Plan, where: str) -> dict[str, tuple[ExpertGroup, ...]]:
    routed = set(plan.source_shape.routed_blocks)
    expected = [block for block in plan.source_blocks.values() if block in routed]
    if not isinstance(value, Mapping) or sorted(value) != sorted(expected):
        raise PlanError(f"experts are not given for exactly the blocks {', '.join(expected)}", where=where)
    found = [violation for block in expected for violation in _block_violations(block, value[block], plan)]
    _refuse(found, where)
    return {block: _groups(value[block]) for block in expected}


def _block_violations(block: str, value: object, plan: Plan) -> list[str]:
    if not isinstance(value, Mapping) or set(value) != {"kept", "merged"} or not isinstance(value["merged"], Mapping):
        return [f"experts of {block} are not an object with 'kept' and 'merged'"]
    limit, count = plan.source_shape.in_block(block).num_moe_experts, _survivors(block, plan)
    found = index_violations(f"{block}: kept", value["kept"], count, limit)
    if found:
        return found
    runs = plan.recipe.experts.num_groups
    if limit % runs or Counter(base * runs // limit for base in value["kept"]) != Counter(
        dict.fromkeys(range(runs), count // runs)
    ):
        return [f"{block}: kept are not equally many of each of the recipe's {runs} expert groups"]
    used = set(value["kept"])
    for base, group in value["merged"].items():
        if sentence := _group_violation(base, group, value["kept"], used, limit):
            found.append(f"{block}: merged group {base} {sentence}")
        elif len({member * runs // limit for member in group["members"]}) > 1:
            found.append(f"{block}: merged group {base} has members of several of the recipe's {runs} expert groups")
        else:
            used |= set(group["members"])
    return found


def _survivors(block: str, plan: Plan) -> int:
    """How many experts of a block of the source are to survive."""
    (new,) = (new for new, old in plan.source_blocks.items() if old == block)
    return plan.target_shape.in_block(new).num_moe_experts


def _group_violation(base: str, group: object, kept: list[int], used: set[int], limit: int) -> str | None:
    """What is wrong with one merged group, or None; ``used`` are the survivors and the members of earlier groups."""
    if not isinstance(group, Mapping) or set(group) != {"members", "weights"}:
        return "is not an object with 'members' and 'weights'"
    members, weights = group["members"], group["weights"]
    if not isinstance(members, list) or not isinstance(weights, list) or len(members) != len(weights):
        return "has no weight for every member"
    if index_violations("members", members, len(members), limit) or base not in map(str, kept):
        return "has members that are not ascending expert indices, or a base that is not kept"
    if int(base) not in members or used & (set(members) - {int(base)}):
        return "lacks its base or shares a member with another group"
    if any(type(w) not in (int, float) or not math.isfinite(w) or w < 0 for w in weights):
        return "has weights that are negative or not finite"
    return None if abs(math.fsum(weights) - 1) <= _SUM_TOLERANCE else "has weights that do not sum to 1"


def _groups(value: Document) -> tuple[ExpertGroup, ...]:
    merged = value["merged"]
    return tuple(
        ExpertGroup(base, tuple(merged[str(base)]["members"]), tuple(map(float, merged[str(base)]["weights"])))
        if str(base) in merged
        else ExpertGroup(base, (base,), (1.0,))
        for base in value["kept"]
    )
