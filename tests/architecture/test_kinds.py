"""Each axis that can be pruned is declared once, and each choice is listed once; everything else reads these."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_slim.architecture import fp8_sizes
from megatron_slim.architecture.axes import axes_of
from megatron_slim.architecture.kinds import AXES, BLOCK_AXES, FEED_FORWARD, KINDS, SUBLAYERS
from megatron_slim.architecture.prunable import Heads, Neurons, PrunableAxis
from megatron_slim.architecture.shape import FAMILIES, unused_fields
from megatron_slim.architecture.table import weights
from megatron_slim.distillation.loss_options import HIDDEN_LOSSES, KD_LOSSES
from megatron_slim.optimizers import OPTIMIZERS
from megatron_slim.pruning.inner_axes import InnerAxes
from megatron_slim.recipe_sections import CHOICES, Target
from megatron_slim.testing import tiny_shape

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_slim"

# Where sizes may be named in quotes: what declares them, and what translates them into another's words.
NAMING = {
    "architecture": {
        *("prunable", "feed_forward", "full_attention", "delta_net"),  # declarations
        *("family", "glm4_moe", "hf_config", "published"),  # Hugging Face's keys
        *("rows", "weight", "qwen3_next", "shape", "layer_specs"),  # tables and fields of Megatron's config
    },
    "training": {"arguments"},  # Megatron's flags
    "checkpoint": {"huggingface", "carried"},  # keys of config.json
    "teacher_cache": {"cache", "record"},  # keys of its own document
    "planning": {"report"},  # of JSON
    "pruning": {"depth"},  # the fields that say which layers a model has
    "": {"testing"},  # sizes of tiny models
}


def constants(tree: ast.AST) -> Iterator[str]:
    """Strings that are not docstrings."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


@functools.cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def test_axes_are_named_where_they_are_declared() -> None:
    """No field, statistic or part of a plan is in quotes elsewhere: a new axis has no second list to enter."""
    declared = {name for axis in AXES.values() for name in (*axis.labels, axis.statistic)} - {""}
    declared |= {axis.key for axis in AXES.values() if isinstance(axis, Neurons)} - {"neurons"}
    assert {"num_query_groups", "moe_router_topk", "mlp.experts.ffn", "dense_neurons"} <= declared
    found = []
    for path, tree in trees().items():
        folder = path.parent.relative_to(PACKAGE).as_posix().removeprefix(".")
        if path.stem not in NAMING.get(folder, ()):
            found += [(path.relative_to(PACKAGE).as_posix(), name) for name in constants(tree) if name in declared]
    assert found == []


def test_a_recipe_names_every_axis_and_nothing_else() -> None:
    fields = [field.name for field in dataclasses.fields(Target)]
    assert sorted(fields) == sorted(name for axis in AXES.values() for name in axis.labels)
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert [name for name in fields if f"`{name}`" not in page] == []


def test_a_plan_has_a_place_for_all_that_survives_inside_blocks() -> None:
    keys = {axis.key for axis in BLOCK_AXES.values() if isinstance(axis, Neurons)}
    assert {field.name for field in dataclasses.fields(InnerAxes)} == keys | {"heads"}


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_what_an_axis_declares_is_there(axis: PrunableAxis) -> None:
    """Its fields are those of shapes, its axes those of rows, and each family has Hugging Face's keys or lacks it."""
    rows = {each for name in FAMILIES for row in weights(tiny_shape(name)) for dim in row.dims for each in axes_of(dim)}
    stacked = {"expert"}  # a row of its own for each
    in_table = {name for name in (axis.axis, axis.group_axis) if name}
    assert in_table <= rows | stacked and in_table <= tiny_shape().sizes.keys()
    for family in FAMILIES.values():
        for name in axis.labels:
            assert name in {*family.keys, *family.multiples, *unused_fields(family)}
    assert axis.statistic or axis.field in ("num_layers", "hidden_size", "num_moe_experts", "moe_router_topk")


def test_axes_of_kinds_are_all_there_are() -> None:
    assert sum(len(kind.axes) for kind in SUBLAYERS.values()) == len(BLOCK_AXES)
    assert all(isinstance(kind.heads, Heads) for kind in KINDS.values())
    assert all(isinstance(kind.neurons, Neurons) for kind in FEED_FORWARD.values())


# By name: what may be chosen, and the module that lists it.
LISTS = {
    **{key: (set(values), "recipe_sections") for key, values in CHOICES.items()},
    "experts.importance": (set(CHOICES["experts.importance"]), "expert_metrics"),
    "experts.similarity": (set(CHOICES["experts.similarity"]), "expert_metrics"),
    "--kd-loss": (set(KD_LOSSES), "distillation/loss_options"),
    "--hidden-kd-loss": (set(HIDDEN_LOSSES), "distillation/loss_options"),
    "--optimizer": (set(OPTIMIZERS), "optimizers"),
    "FP8 recipes": (set(fp8_sizes.RECIPES), "architecture/fp8_sizes"),
    "kinds of sublayers": (set(SUBLAYERS), "architecture/family"),
    "families": (set(FAMILIES), "architecture/shape"),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_choice_is_listed_in_one_place(name: str) -> None:
    """Whoever needs all of them reads that one: no other tuple, list, set or dictionary spells two of them."""
    choices, home = LISTS[name]
    found = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                parts: list[ast.expr] = [key for key in node.keys if key is not None]
            elif isinstance(node, ast.Tuple | ast.List | ast.Set):
                parts = node.elts
            else:
                continue
            spelled = {part.value for part in parts if isinstance(part, ast.Constant)} & choices
            if len(spelled) > 1 and path != PACKAGE / f"{home}.py":
                found.append((path.relative_to(PACKAGE).as_posix(), node.lineno, spelled))
    assert found == []
