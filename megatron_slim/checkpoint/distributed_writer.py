"""Megatron's distributed checkpoints (torch_dist), writing: the directory that ``--load`` takes.

    DIR/latest_checkpointed_iteration.txt   "release"
    DIR/release/
        .metadata                           names, shapes, and which bytes of which file hold them
        metadata.json                       {"sharded_backend": "torch_dist", ...}
        __0_0.distcp ...                    one torch.save archive after another
        integrity.json                      SHA-256 of every file, for Megatron's --verify-integrity
    DIR/hf/                                 config.json and tokenizer of the same model in Hugging Face form, and in
                                            slim_storage.json which experts to fuse when it is written in that form

Experts are written one by one, as Megatron does: a rank reads whole pieces, so a single piece for all experts of a
layer would be read by every rank in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.expert_storage import PLAIN, Storage, write_storage
from megatron_slim.checkpoint.huggingface import CONFIG
from megatron_slim.checkpoint.layout import from_megatron, runs_of_sources, split_keys, stored_shapes, to_megatron
from megatron_slim.checkpoint.side_files import carry_files
from megatron_slim.checkpoint.torch_dist_files import Part, Piece, PieceWriter, write_metadata
from megatron_slim.checkpoint.torch_dist_names import (
    BACKEND,
    CARRIED,
    COMMON_STATE,
    INTEGRITY,
    METADATA,
    RELEASE,
    TRACKER,
    hf_files,
)
from megatron_slim.checkpoint.torch_dist_reader import PieceReader
from megatron_slim.checkpoint.units import Unit
from megatron_slim.files import sha256, to_json


class TorchDistWriter:
    """Writes one process's part; see `transfer.Writer`."""

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        number: int = 0,
        *,
        prefix: str = "",
        optimizer_step: int | None = None,
    ) -> None:
        """Nothing is written yet, but for what is not tensors, which the first part has.

        Args:
            directory: of the weights.
            shape: of the model.
            number: of the part.
            prefix: of all keys, for a state of the optimizer.
            optimizer_step: steps of the optimizer, where its state will be among the parts.
        """
        self._shape, self._prefix = shape, prefix
        self._writer = PieceWriter(directory, number)
        self._reader = PieceReader(self._writer.frames)
        self._last: list[Piece] = []
        if number == 0:
            self._writer.add_object(COMMON_STATE, [_common_state(optimizer_step)])

    def write(self, unit: Unit, tensors: dict[str, Tensor]) -> None:
        """Write a unit."""
        shapes = dict(stored_shapes(unit.weight, self._shape))
        self._last = [
            self._writer.add(self._prefix + key, shapes[key], offsets, tensor)
            for key, offsets, tensor in _pieces(unit, self._shape, tensors)
        ]

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Read the unit back that was written last."""
        if unit.rows is not None or _runs(unit.weight, self._shape) is not None:
            found = (self._reader.read_rows(piece, np.arange(piece.sizes[0])) for piece in self._last)
            return {
                name: tensor if unit.expert is None else tensor[0]
                for (name, _), tensor in zip(unit.tensors, found, strict=True)
            }
        whole = torch.empty(unit.weight.shape(self._shape), dtype=self._last[0].dtype)
        for piece, (_, rows) in zip(self._last, split_keys(unit.weight, self._shape), strict=True):
            whole[rows] = self._reader.read_rows(piece, np.arange(piece.sizes[0]))
        return from_megatron(unit.weight, self._shape, whole)

    def finish(self) -> Part:
        """Close the files."""
        self._writer.close()
        return self._writer.part


def _runs(weight: Weight, shape: ModelShape) -> list[slice] | None:
    """Rows of the pieces in which a parameter is stored under its own key, each one Hugging Face tensor."""
    return None if weight.split else runs_of_sources(weight, shape)


def _pieces(unit: Unit, shape: ModelShape, tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Key, offsets and content of every piece of a unit."""
    weight, rest = unit.weight, (0,) * (len(unit.weight.dims) - 1)
    if unit.rows is not None:
        (tensor,) = tensors.values()
        yield weight.key, (unit.rows.start, *rest), tensor
    elif (runs := _runs(weight, shape)) is None:
        whole = to_megatron(weight, shape, tensors.__getitem__)
        for key, rows in split_keys(weight, shape):
            yield key, (0, *rest), whole[rows]
    else:
        for run, tensor in zip(runs, tensors.values(), strict=True):
            if unit.expert is None:
                yield weight.key, (run.start, *rest), tensor
            else:
                yield weight.key, (unit.expert, run.start, *rest), tensor.unsqueeze(0)


def _common_state(optimizer_step: int | None) -> JsonObject:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    carried = {} if optimizer_step is None else {CARRIED: {"step": optimizer_step}}
    return {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content, **carried}


def finish_torch_dist(
    directory: Path,
    parts: Sequence[Part],
    config: HFConfig,
    storage: Storage = PLAIN,
    *,
    copy_files_from: Path | None = None,
) -> None:
    """Write all that is not weights; afterwards the directory is a checkpoint.

    Args:
        directory: what ``--load`` takes; its ``release`` holds the weights.
        parts: what the processes have written.
        config: the model's config.json, kept in ``hf/``.
        storage: the form that the files of an export are to have, kept there too.
        copy_files_from: directory whose `side_files` are carried over to ``hf/``.
    """
    release = directory / RELEASE
    hashes = {name: digest for part in parts for name, digest in part.sha256.items()}
    hashes[METADATA] = sha256(write_metadata(release, parts))
    backend = to_json({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (release / BACKEND).write_text(backend)
    hashes[BACKEND] = sha256(backend)
    (release / INTEGRITY).write_text(to_json({"algorithm": "sha256", "files": hashes}))
    write_storage(write_hf_files(directory, config, copy_files_from), storage)
    (directory / TRACKER).write_text(RELEASE)


def write_hf_files(directory: Path, config: HFConfig, copy_files_from: Path | None = None) -> Path:
    """Put config.json and tokenizer files into ``DIR/hf``, where conversion and training look for the model's shape."""
    hf = hf_files(directory)
    hf.mkdir(exist_ok=True)
    (hf / CONFIG).write_text(to_json(config), encoding="utf-8")
    if copy_files_from is not None and copy_files_from.resolve() != hf.resolve():
        carry_files(copy_files_from, hf)
    return hf
