"""What a directory with a config.json says of a model, whether its weights are next to it or elsewhere.

The weights may be in block-scaled FP8: what they stand for has the same sizes, so the directory describes it too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.hf_config import language_config, shape_from_hf_config, wrapper_of
from megatron_slim.architecture.mtp_keys import stated_mtp_layers
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.carried import CarriedTensors, language_model_alone, read_carried, set_apart
from megatron_slim.checkpoint.expert_storage import Storage, recorded_storage
from megatron_slim.checkpoint.fp8 import FP8_DTYPES
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_files import (
    CONFIG,
    has_tensors,
    is_fp8,
    read_config,
    read_headers,
    read_plain_config,
)


def _opened(directory: Path, *, without_mtp: bool, allow_nonfinite: bool = False) -> HFCheckpoint | None:
    """The checkpoint in a directory, in FP8 as the one that it stands for; None where it has no tensors."""
    if not has_tensors(directory):
        return None
    options = {"without_mtp": without_mtp, "allow_nonfinite": allow_nonfinite}
    return HFCheckpoint.open(directory, dequantize_fp8=is_fp8(directory), **options)


def read_shape(directory: Path, *, without_mtp: bool = False) -> ModelShape:
    """Shape of the model that a config.json describes, ``without_mtp`` as if it had none.

    Where there are tensors next to it, their names say whether there is an MTP block: published files do not.
    """
    if (opened := _opened(directory, without_mtp=without_mtp)) is not None:
        return opened.shape
    config = read_plain_config(directory)
    depth = 0 if without_mtp else stated_mtp_layers(language_config(config), str(directory / CONFIG)) or 0
    return shape_from_hf_config(config, mtp_num_layers=depth, where=str(directory / CONFIG))


def storage_of(directory: Path, *, without_mtp: bool = False) -> Storage:
    """The form of the files next to a config.json, ``without_mtp`` as in `read_shape`; or of those where its weights
    came from.
    """
    if (opened := _opened(directory, without_mtp=without_mtp)) is not None:
        return Storage(opened.fused_blocks, opened.copies)
    return recorded_storage(directory)


def config_and_carried(directory: Path, *, without_mtp: bool = False) -> tuple[JsonObject, CarriedTensors]:
    """The config.json of a directory, next to tensors or not, and what is carried with its language model.

    ``without_mtp`` as in `read_shape`.
    """
    if (opened := _opened(directory, without_mtp=without_mtp, allow_nonfinite=True)) is not None:
        return opened.config, opened.carried
    config, carried = read_plain_config(directory), carried_next_to(directory, allow_nonfinite=True)
    return language_model_alone(config, carried), carried


def carried_next_to(directory: Path, *, allow_nonfinite: bool) -> CarriedTensors:
    """What travels with a language model whose config.json is in a directory: in its own file, or among weights.

    Raises:
        CheckpointError: it is damaged, or is not what config.json describes.
    """
    carried = read_carried(directory)
    config = read_config(directory, fp8=True)
    if not carried and wrapper_of(config) is not None and has_tensors(directory):
        _, carried = set_apart(read_headers(directory, FP8_DTYPES), config, directory)
    return replace(carried, allow_nonfinite=allow_nonfinite)
