"""The teacher's caches that a run records, and the one that it trains from.

``train: {record: KIND}`` records the teacher before the first training, once, on the data of all phases;
``train: {teacher_cache: DIR}`` takes a cache that is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_slim.compression.settings import RunSettings
from megatron_slim.data import exact_prefix, read_stream
from megatron_slim.errors import SlimError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.training.blends import parse_blend
from megatron_slim.training.variables import DEFAULTS, SPLIT

RECORDED, RECORDED_VALIDATION = "teacher-cache", "teacher-cache-validation"


@dataclass(frozen=True)
class Recording:
    """What a step records.

    Attributes:
        data: prefix of .bin/.idx, or a sample set.
        cache: directory of the result.
        samples: of the cache.
        seq_length: positions of each.
        drawn: whether the data have more samples, of which these are drawn.
        is_set: whether the data are a sample set.
    """

    data: Path
    cache: Path
    samples: int
    seq_length: int
    drawn: bool
    is_set: bool

    @property
    def tokens(self) -> int:
        """Positions that are recorded."""
        return self.samples * self.seq_length


def cache_of(settings: RunSettings) -> Path | None:
    """The cache that every phase trains from, whether it is there or not; None where the teacher itself is."""
    return cache_path(settings.section("train"), settings.save)


def cache_path(train: Mapping[str, Any], save: Path) -> Path | None:
    """`cache_of` a section ``train`` and the directory of a run."""
    if "record" in train:
        return save / RECORDED
    return Path(train["teacher_cache"]) if "teacher_cache" in train else None


def validates(settings: RunSettings) -> bool:
    """Whether training validates."""
    return eval_iters(settings) > 0


def recordings(settings: RunSettings) -> list[Recording]:
    """What is recorded: the data of training, then those of validation; nothing without ``train.record``.

    No more samples than training reads, and validation in one go.

    Raises:
        SlimError: data that are several data sets, or cannot be read.
    """
    if "record" not in settings.section("train"):
        return []
    batch = settings.samples_per_iteration
    # Without data of its own a part of the cache is set aside for validation.
    first, *others = map(float, SPLIT.split(","))
    own = bool(settings.valid_data) and validates(settings)
    wanted = settings.stops[-1] * batch
    found = [("--data", settings.data, RECORDED, wanted if own else math.ceil(wanted * (first + sum(others)) / first))]
    if own:
        found.append(("--valid-data", settings.valid_data, RECORDED_VALIDATION, eval_iters(settings) * batch))
    return [_recording(settings, flag, words, name, most) for flag, words, name, most in found]


def _recording(settings: RunSettings, flag: str, words: Sequence[str], name: str, most: int) -> Recording:
    prefixes = parse_blend(words, flag).prefixes
    if len(prefixes) > 1:
        fix = "record each with megatron-slim record, and give --teacher-cache and the caches as --data"
        raise SlimError(f"train.record records one data set, and {flag} has {len(prefixes)}", fix=fix)
    data, cache = Path(prefixes[0]), settings.save / name
    if is_sample_set(data):
        samples = open_samples(data)
        return Recording(data, cache, len(samples), samples.seq_length, drawn=False, is_set=True)
    length = settings.seq_length
    there = len(read_stream(exact_prefix(data))) // (length + 1)
    return Recording(data, cache, min(there, most), length, drawn=there > most, is_set=False)


def eval_iters(settings: RunSettings) -> int:
    """Steps of a validation."""
    said = settings.counted("eval_iters")
    return int(DEFAULTS["EVAL_ITERS"]) if said is None else said
