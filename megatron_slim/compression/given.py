"""A recipe, as YAML has it, with what a command line gives in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_slim.aliases import Document, JsonObject
from megatron_slim.errors import SlimError
from megatron_slim.sample_set import length_of_samples
from megatron_slim.training.blends import number_of

CACHE = "teacher_cache"
_STATES = ("record", CACHE)  # of ``train``: where the teacher's states come from, if the teacher is not in training


def _section(document: Document, name: str) -> JsonObject:
    """A section as a mapping; anything else is left for the schema to refuse."""
    section = document.get(name, {})
    return dict(section) if isinstance(section, Mapping) else {}


def replace_value(document: JsonObject, word: str) -> None:
    """Put ``section.key=value`` into a recipe."""
    name, equals, text = word.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise SlimError(f"{word!r} is not SECTION.KEY=VALUE", where="--set", fix="such as train.lr=1.0e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SlimError(f"the value of {word!r} is not YAML", where="--set") from None
    document[section] = _section(document, section) | {key: value}


def with_train(document: Document, given: Document, file: Path) -> JsonObject:
    """A copy whose ``train`` has what was given; a cache relative to the recipe, or to here, holds anywhere.

    What is given of the teacher's states replaces all that the recipe says of them.
    """
    train = _section(document, "train")
    if isinstance(train.get(CACHE), str):
        train[CACHE] = str((file.parent / train[CACHE]).absolute())
    if any(key in given for key in _STATES):
        train = {key: value for key, value in train.items() if key not in _STATES}
    train |= given
    if isinstance(given.get(CACHE), str):
        train[CACHE] = str(Path(given[CACHE]).absolute())
    return {**document, "train": train} if train else dict(document)


def with_length(document: JsonObject, data: Sequence[str]) -> JsonObject:
    """A copy whose ``train`` says how long samples are, where it does not and those of a cache or a sample set do."""
    train = _section(document, "train")
    cache = [train[CACHE]] if isinstance(train.get(CACHE), str) else []
    if "seq_length" in train or (length := length_of_samples([*cache, *data])) is None:
        return document
    return {**document, "train": {**train, "seq_length": length}}


def with_absolute_source(document: Document, file: Path) -> JsonObject:
    """A copy whose ``source``, a directory relative to the recipe, holds in the run's directory too."""
    source = document.get("source")
    if isinstance(source, str) and (file.parent / source).is_dir():
        return {**document, "source": str((file.parent / source).resolve())}
    return dict(document)


def absolute_data(data: Sequence[str]) -> tuple[str, ...]:
    """Prefixes that hold anywhere; weights of a blend as they are. A number is a weight, but for the only word."""
    return tuple(word if len(data) > 1 and number_of(word) is not None else str(Path(word).absolute()) for word in data)
