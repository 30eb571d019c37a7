"""MTP blocks of a checkpoint: by the names of its tensors, which its config.json must not contradict."""

from __future__ import annotations

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.hf_config import language_config, wrapper_of
from megatron_slim.architecture.mtp_keys import stated_mtp_layers, without_mtp_keys
from megatron_slim.errors import CheckpointError

WITHOUT_MTP = "leave MTP out with --without-mtp (a teacher's with --teacher-without-mtp)"


def count_mtp_layers(config: HFConfig, found: int, names: str, *, where: str) -> int:
    """Number of MTP blocks whose tensors are there.

    Args:
        config: its config.json, which may say nothing.
        found: how many its tensors are of.
        names: pattern of the names that were looked for, for errors.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: config.json says another number, as it does where transformers has loaded and saved a model.
        ShapeError: it contradicts itself.
    """
    stated = stated_mtp_layers(language_config(config), where)
    if stated is not None and stated > 0 and not found:
        raise CheckpointError(
            f"config.json declares an MTP block ({stated}), but there is no {names} tensor",
            where=where,
            fix=f"get the weights again from where they have it, or {WITHOUT_MTP}",
        )
    if stated is not None and stated != found:
        raise CheckpointError(
            f"config.json says {stated} MTP blocks, the tensors {found}",
            where=where,
            fix=f"correct config.json, or {WITHOUT_MTP}",
        )
    return found


def config_without_mtp(config: HFConfig) -> JsonObject:
    """A config.json that says nothing of MTP, of a larger model too."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return without_mtp_keys(config)
    return {**config, wrapper.text: without_mtp_keys(language_config(config))}
