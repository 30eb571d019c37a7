"""What a step would refuse after hours of others, refused before the first."""

from __future__ import annotations

from pathlib import Path

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.compression.settings import RunSettings
from megatron_slim.data import data_prefix, open_stream
from megatron_slim.errors import DataError
from megatron_slim.pruning.plan import check_later_phases, check_recipe
from megatron_slim.training.blends import parse_blend


def check(settings: RunSettings) -> ModelShape:
    """Open the teacher and all data, and look whether every phase can be met; gives the teacher's sizes.

    Raises:
        SlimError: what would fail.
    """
    from megatron_slim.checkpoint.convert import open_checkpoint

    shape = open_checkpoint(settings.teacher).shape
    where = str(settings.file)
    check_recipe(settings.phases[0], shape, where=where)
    check_later_phases(settings.recipe, 1, shape, where=where)
    for flag, words in (("--data", settings.data), ("--valid-data", settings.valid_data)):
        for prefix in parse_blend(words, flag).prefixes if words else ():
            _check_data(Path(prefix), shape, flag, needs_prefix=True)
    _check_data(settings.calibration_data, shape, "--calibration-data")
    if settings.evaluation_data is not None:
        _check_data(settings.evaluation_data, shape, "--evaluation-data")
    if "acceptance" in settings.section("evaluate") and not settings.prompts.is_file():
        raise DataError("no such file", where=f"evaluate.acceptance {settings.prompts}", fix="give a file of prompts")
    return shape


def _check_data(path: Path, shape: ModelShape, flag: str, *, needs_prefix: bool = False) -> None:
    if path.suffix == ".npy" and path.is_file() and not needs_prefix:
        return  # a matrix is looked at when it is used
    found = data_prefix(path, or_matrix=not needs_prefix)
    if needs_prefix and found != path:
        raise DataError("is a file of a data set", where=f"{flag} {path}", fix=f"name its prefix, {found}")
    open_stream(found, shape.vocab_size)
