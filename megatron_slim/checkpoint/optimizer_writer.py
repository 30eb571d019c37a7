"""Writing the state of an optimizer next to the weights, and looking at what was written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.distributed_writer import TorchDistWriter
from megatron_slim.checkpoint.optimizer_state import OptimizerState
from megatron_slim.checkpoint.torch_dist_files import Part
from megatron_slim.checkpoint.torch_dist_names import STATE
from megatron_slim.checkpoint.transfer import TransferOptions, transfer
from megatron_slim.checkpoint.units import Checkpoint as Checkpoint
from megatron_slim.checkpoint.units import units
from megatron_slim.errors import CheckpointError


def write_states(optimizer: OptimizerState, release: Path, first: int, options: TransferOptions) -> list[Part]:
    """Write all states of an optimizer, one after the other, each in its own types, as parts from number ``first``."""
    written: list[Part] = []
    as_they_are: TransferOptions = {**options, "dtype": None}
    for name, state in optimizer.tensors.items():
        number, prefix = first + len(written), f"{STATE}{name}."
        parts, _ = transfer(
            state,
            partial(_state_writer, release, state.shape, number, prefix),
            list(units(state.shape, state.dtypes, trained_only=True)),
            **as_they_are,
        )
        written += parts
    return written


def _state_writer(release: Path, shape: ModelShape, first: int, prefix: str, number: int) -> TorchDistWriter:
    return TorchDistWriter(release, shape, first + number, prefix=prefix)


def check_states(written: OptimizerState, wanted: OptimizerState) -> None:
    """Compare steps and types of what was written with those of the source.

    Raises:
        CheckpointError: they differ.
    """
    dtypes = [{name: _trained(state) for name, state in each.tensors.items()} for each in (written, wanted)]
    if written.step != wanted.step or dtypes[0] != dtypes[1]:
        raise CheckpointError("its optimizer state differs from its source after writing", fix="check the disk")


def _trained(state: Checkpoint) -> dict[str, torch.dtype]:
    """Types of the tensors that an optimizer has state of."""
    found = (
        tensor.name for each in weights(state.shape) if not each.buffer for tensor, _ in each.hf_tensors(state.shape)
    )
    return {name: state.dtypes[name] for name in found}
