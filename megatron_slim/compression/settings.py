"""What a run was asked for: its recipe with the values that the command line replaces, and its paths."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import yaml

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.command_line import last_value
from megatron_slim.compression.given import (
    CACHE,
    absolute_data,
    replace_value,
    with_absolute_source,
    with_length,
    with_train,
)
from megatron_slim.errors import RecipeError, SlimError
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.packaged import find_recipe
from megatron_slim.planning.layouts import Settings
from megatron_slim.recipe import Recipe, parse_recipe, read_document
from megatron_slim.recipe_elastic import refuse_budgets
from megatron_slim.recipe_run import SECTIONS
from megatron_slim.sample_set import length_of_samples
from megatron_slim.training.variables import refuse_spaces

# Of pretrain_distill.sh, where neither recipe nor command line says it.
SCRIPT = Settings()
SEQ_LENGTH, GLOBAL_BATCH_SIZE = SCRIPT.seq_length, SCRIPT.global_batch
# Flags of training that a run gives by itself.
_OWN_FLAGS = (
    *("--recipe", "--student", "--pretrained-checkpoint", "--hf-config", "--teacher", "--teacher-load"),
    *("--save", "--load", "--teacher-cache", "--data", "--valid-data", "--data-path", "--train-data-path"),
    *("--valid-data-path", "--tokens", "--train-iters", "--train-samples", "--progressive", "--progressive-schedule"),
    "--carry-optimizer",
)


@dataclass(frozen=True)
class RunSettings:
    """A run as a whole.

    Attributes:
        file: of the recipe.
        document: the recipe, as YAML has it, with all replaced values.
        recipe: the same, parsed.
        teacher: checkpoint that is pruned and distilled from.
        data: of training, as Megatron takes it: prefixes, or weights and prefixes; may be empty with a teacher's
            cache, whose samples they then are.
        valid_data: of validation in training; empty where a part of ``data`` is set aside for it.
        calibration_data: what calibration draws its samples from.
        evaluation_data: what is evaluated on; None where nothing is.
        save: directory of everything that the run makes.
        megatron: arguments that go to Megatron as they are, behind those of the recipe.
    """

    file: Path
    document: Document
    recipe: Recipe
    teacher: Path
    data: tuple[str, ...]
    valid_data: tuple[str, ...]
    calibration_data: Path
    evaluation_data: Path | None
    save: Path
    megatron: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The recipe with all replaced values, as a file has it."""
        return yaml.safe_dump(dict(self.document), sort_keys=False)

    @property
    def phases(self) -> tuple[Recipe, ...]:
        """The recipe of every phase; a recipe without phases is one."""
        return self.recipe.phases or (self.recipe,)

    def section(self, name: str) -> Document:
        """A section of `recipe_run`; samples are as long as those of training where it does not say."""
        said = self.recipe.run.get(name, {})
        if "seq_length" in said or "seq_length" not in SECTIONS[name]:
            return said
        length = self._default_length(name)
        return said if length is None else {"seq_length": length, **said}

    def _default_length(self, name: str) -> int | None:
        """Tokens of a sample where the section does not say; None where the data do."""
        data = {"calibrate": self.calibration_data, "evaluate": self.evaluation_data}.get(name)
        if data is not None and data.suffix == ".npy":  # a matrix is used as it is
            return None
        if (given := self.counted("seq_length")) is not None:
            return given
        is_stream = data is not None and length_of_samples([str(data)]) is None
        return SEQ_LENGTH if is_stream else None

    @property
    def cluster(self) -> str | None:
        """The settings of a cluster that training takes: of command line, recipe, or environment."""
        named = self.section("train").get("settings") or os.environ.get("SETTINGS")
        return None if named is None else str(named)

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments of training that go to Megatron as they are; the later ones take precedence."""
        return (*map(str, self.recipe.run.get("train", {}).get("flags", ())), *self.megatron)

    def counted(self, key: str) -> int | None:
        """A size by which tokens are counted: of Megatron's flags or of ``train``; None where neither says it."""
        said = last_value(self.flags, f"--{key.replace('_', '-')}") or ""
        given = int(said) if said.isdecimal() else self.recipe.run.get("train", {}).get(key)
        return None if given is None else int(given)

    @property
    def seq_length(self) -> int:
        """Tokens of a sample of training."""
        return self.counted("seq_length") or SEQ_LENGTH

    @property
    def samples_per_iteration(self) -> int:
        """Samples of a training step."""
        return self.counted("global_batch_size") or GLOBAL_BATCH_SIZE

    @property
    def optimizer(self) -> str:
        """That of training, by its name in `OPTIMIZERS`: what the last flag says; an unknown one is refused later."""
        named = last_value(self.flags, "--optimizer")
        return named if named in OPTIMIZERS else ADAM

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of a training step."""
        return self.seq_length * self.samples_per_iteration

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """The iteration at which every phase ends, counted over all phases."""
        tokens: list[int | None] = [self.section("train").get("tokens")]
        if self.recipe.phases:
            tokens = [None if phase.phase is None else phase.phase.tokens for phase in self.recipe.phases]
        given = [each for each in tokens if each is not None]
        if len(given) != len(tokens):
            fix = "give every phase its tokens" if self.recipe.phases else "give train.tokens, or --tokens"
            raise RecipeError("no tokens to train on", where=str(self.file), fix=fix)
        return tuple(math.ceil(upto / self.tokens_per_iteration) for upto in accumulate(given))

    def file_of(self, key: str) -> Path:
        """A file or directory that the section ``evaluate`` names, relative to the recipe."""
        return (self.file.parent / self.section("evaluate")[key]).absolute()

    @property
    def inputs(self) -> JsonObject:
        """Where everything comes from, as run.json has it."""
        return {
            "teacher": str(self.teacher),
            "data": list(self.data),
            "valid_data": list(self.valid_data),
            "calibration_data": str(self.calibration_data),
            "evaluation_data": None if self.evaluation_data is None else str(self.evaluation_data),
        }


def read_settings(
    recipe: Path,
    teacher: Path,
    save: Path,
    *,
    data: Sequence[str],
    valid_data: Sequence[str] = (),
    calibration_data: Path | None = None,
    evaluation_data: Path | None = None,
    replaced: Sequence[str] = (),
    train: Document | None = None,
    megatron: Sequence[str] = (),
) -> RunSettings:
    """Read a recipe and replace what the command line gives.

    Args:
        recipe: its file, or the name of one that comes with the package.
        teacher: checkpoint of either format.
        save: directory of the run.
        data: of training.
        valid_data: of validation.
        calibration_data: None is the training data, where that is one prefix; without any, the teacher's cache.
        evaluation_data: None is the validation data, where that is one prefix.
        replaced: ``key=value`` words; a key is ``section.key``, a value YAML.
        train: values of the section ``train``.
        megatron: arguments for Megatron, after those of the recipe.

    Raises:
        SlimError: the recipe or a replaced value breaks the schema, or something is missing.
    """
    file = find_recipe(recipe)
    document = read_document(file)
    if not isinstance(document, dict):
        parse_recipe(document, where=str(file))  # raises
    document = with_absolute_source(document, file)
    for word in replaced:
        replace_value(document, word)
    document = with_length(with_train(document, train or {}, file), data)
    parsed = parse_recipe(document, where=str(file))
    refuse_budgets(parsed, where=str(file))
    own = data or [str(word) for key, word in parsed.run.get("train", {}).items() if key == CACHE]
    if not own:
        raise SlimError("no training data", fix="give --data, or --teacher-cache, whose samples are data")
    calibration_data = calibration_data or _only(own, "--data", "calibration")
    if evaluation_data is None and valid_data:
        evaluation_data = _only(valid_data, "--valid-data", "evaluation")
    found = RunSettings(
        file,
        document,
        parsed,
        teacher.absolute(),
        absolute_data(data),
        absolute_data(valid_data),
        calibration_data.absolute(),
        None if evaluation_data is None else evaluation_data.absolute(),
        save.absolute(),
        tuple(megatron),
    )
    if own_flags := sorted({word.partition("=")[0] for word in found.flags} & {*_OWN_FLAGS}):
        fix = "leave it out there: recipe and command line say it"
        raise SlimError(f"{own_flags[0]} among the flags for Megatron, which a run gives by itself", fix=fix)
    _ = found.stops  # raises where there are no tokens
    refuse_spaces("--data", found.data)
    refuse_spaces("--valid-data", found.valid_data)
    if "record" in found.section("train"):  # what is recorded there is data of training
        refuse_spaces("--save", [str(found.save)])
    return found


def _only(words: Sequence[str], flag: str, purpose: str) -> Path:
    """The one prefix of a blend."""
    if len(words) != 1:
        fix = f"give --{purpose}-data: one prefix"
        raise SlimError(f"{purpose} reads one data set, and {flag} has {len(words)} words", fix=fix)
    return Path(words[0])
