"""Which models a run would train: sizes of teacher and student from a recipe, a plan or config.json files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.published import MODELS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import RecipeError, SlimError
from megatron_slim.packaged import find_recipe
from megatron_slim.pruning.depth import layers_before_statistics
from megatron_slim.pruning.plan_reader import load_plan
from megatron_slim.pruning.recipe_checks import check_recipe, space_before_statistics
from megatron_slim.pruning.search import Ranking, resolved
from megatron_slim.pruning.target import shape_before_statistics
from megatron_slim.recipe import Recipe, load_recipe, select_phase


@dataclass(frozen=True)
class Models:
    """The student and its teacher.

    Attributes:
        student: its sizes.
        teacher: None for training without one.
        source: what the student is pruned from; None where nothing says.
        tokens: that the recipe trains on; None where it does not say.
        notes: what was assumed on the way.
        progressive: whether that is a phase's part in a schedule of known length.
    """

    student: ModelShape
    teacher: ModelShape | None
    source: ModelShape | None
    tokens: int | None = None
    notes: tuple[str, ...] = ()
    progressive: bool = False


@dataclass(frozen=True)
class Asked:
    """Where sizes come from, as on the command line; what is None was not given."""

    recipe: Path | None = None
    phase: int | None = None
    plan: Path | None = None
    hf_config: Path | None = None
    teacher_config: Path | None = None
    no_teacher: bool = False
    without_mtp: bool = False
    teacher_without_mtp: bool = False


def find_models(asked: Asked) -> Models:
    """Sizes of both models.

    Raises:
        SlimError: nothing says what the student or the teacher is; the student cannot be made of its source; or a
            phase is asked for and no recipe given.
    """
    if asked.phase is not None and asked.recipe is None:
        raise SlimError("--phase without --recipe", fix="give the recipe, or leave --phase out")
    if asked.plan is not None:
        plan = load_plan(asked.plan)
        found = Models(plan.target_shape, plan.source_shape, plan.source_shape, **_length(plan.recipe))
    elif asked.recipe is not None:
        found = _of_recipe(asked.recipe, asked)
    else:
        assert asked.hf_config is not None, "the command line requires one of them"
        found = Models(_read(asked.hf_config, asked.without_mtp), None, None)
    if asked.without_mtp:
        found = replace(found, student=found.student.replace(mtp_num_layers=0))
    teacher = found.teacher
    if teacher is not None and asked.teacher_without_mtp:
        teacher = teacher.replace(mtp_num_layers=0)
    if asked.teacher_config is not None:
        teacher = _read(asked.teacher_config, asked.teacher_without_mtp)
    if asked.no_teacher:
        teacher = None
    elif teacher is None:
        fix = "give --teacher-config DIR, or --no-teacher for training without one"
        raise SlimError("nothing says what the teacher is", fix=fix)
    if teacher is not None and teacher.vocab_size != found.student.vocab_size:
        raise SlimError(f"teacher: vocabulary {teacher.vocab_size}, the student has {found.student.vocab_size}")
    return replace(found, teacher=teacher)


def _length(recipe: Recipe) -> JsonObject:
    """What a recipe says of how long training is."""
    return {} if recipe.phase is None else {"tokens": recipe.phase.tokens, "progressive": bool(recipe.phase.schedule)}


def _read(directory: Path, without_mtp: bool) -> ModelShape:
    from megatron_slim.checkpoint.described import read_shape

    return read_shape(directory, without_mtp=without_mtp)


def _of_recipe(file: Path, asked: Asked) -> Models:
    if asked.hf_config is not None:
        raise SlimError("--hf-config and --recipe both say what the student is", fix="leave one out")
    file = find_recipe(file)
    whole = load_recipe(file)
    recipe = select_phase(whole, asked.phase, where=str(file))
    origin, source = _source(recipe, file, asked)
    notes = [f"pruned from {origin}"]
    earlier = whole.phases[: recipe.phase.number - 1] if recipe.phase else ()
    pruned = before = source
    for step in [*earlier, recipe]:
        before = pruned
        pruned, more = _pruned(step, before, file)
        notes += more
    return Models(pruned, source, before, notes=tuple(notes), **_length(recipe))


def _source(recipe: Recipe, file: Path, asked: Asked) -> tuple[str, ModelShape]:
    """What the recipe prunes, and where that is stated; where it states nothing, the teacher."""
    if recipe.source in MODELS:
        return recipe.source, MODELS[recipe.source].shape
    if recipe.source:
        directory = file.parent / recipe.source
        if not directory.is_dir():
            known = ", ".join(MODELS)
            what = f"source {recipe.source!r} is not a directory here and not one of {known}"
            raise RecipeError(what, where=str(file), fix="name one of them, or a directory with a config.json")
        return os.path.normpath(directory), _read(directory, asked.teacher_without_mtp)
    if asked.teacher_config is not None:
        return str(asked.teacher_config), _read(asked.teacher_config, asked.teacher_without_mtp)
    fix = f"add 'source: NAME' ({', '.join(MODELS)}, or a directory), or give --teacher-config DIR"
    raise RecipeError("says nothing of the model that it prunes", where=str(file), fix=fix)


def _pruned(recipe: Recipe, source: ModelShape, file: Path) -> tuple[ModelShape, list[str]]:
    """What a recipe makes of a model, as far as that is known before anything is measured."""
    check_recipe(recipe, source, where=str(file))
    notes = []
    if recipe.budget is not None:
        found = list(space_before_statistics(recipe, source).candidates())
        best = max(found, key=lambda candidate: (candidate.params, candidate.active_params))
        sizes = " and ".join(f"{axis} {size}" for axis, size in best.sizes.items()) or "the sizes given"
        notes.append(f"the largest student within the budget: {sizes} (pruning may choose another: give its --plan)")
        recipe = resolved(recipe, Ranking(len(found), 0, (best,)))
    layers = recipe.target.num_layers or source.num_layers
    like_the_first = recipe.depth.pattern == "source" and not source.experts_per_layer
    if recipe.depth.method != "last" and not like_the_first and layers < source.num_layers:
        notes.append(f"depth {recipe.depth.method}: counted as if the first {layers} layers stayed")
    if recipe.experts.allocation == "loss":
        notes.append("experts allocated by loss: counted with an example (prune, and give the --plan, for its own)")
    return shape_before_statistics(recipe, source, layers_before_statistics(source, layers)), notes
