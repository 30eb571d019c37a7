"""Hugging Face checkpoints, reading: strict and lazy.

The reader looks at every header before any tensor is read, and compares them with the index and the architecture
table in both directions. It never unpickles, never leaves the directory (`huggingface_files` says what it makes of
links) and runs no code from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.family import MOE
from megatron_slim.architecture.hf_config import shape_from_hf_config, wrapper_of
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import hf_tensors, mtp_layers_in, weights
from megatron_slim.checkpoint.carried import CarriedTensors, language_model_alone, set_apart, without_the_rest
from megatron_slim.checkpoint.copies import Copies, copies_apart
from megatron_slim.checkpoint.expert_storage import separated
from megatron_slim.checkpoint.finite import refuse_nonfinite
from megatron_slim.checkpoint.foreign import plain_names, refuse_foreign
from megatron_slim.checkpoint.fp8 import FP8_DTYPES, BlockScaled, dequantized
from megatron_slim.checkpoint.huggingface_files import CONFIG, INDEX, SINGLE, read_config, read_headers
from megatron_slim.checkpoint.mtp import config_without_mtp, count_mtp_layers
from megatron_slim.checkpoint.raw_files import OpenFiles
from megatron_slim.checkpoint.safetensors_reader import DTYPES, TensorEntry
from megatron_slim.errors import CheckpointError, summarise

__all__ = ["CONFIG", "INDEX", "SINGLE", "HFCheckpoint", "Index", "read_config", "select_columns"]
Index: TypeAlias = npt.NDArray[np.int64] | Tensor
Entry: TypeAlias = TensorEntry | BlockScaled
_ANOTHER_CONFIG = "the checkpoint and its config.json do not belong together"
_ANOTHER_LAYOUT = "these are weights of another model, or as another program lays them out: get them from transformers"
MAX_EXPERTS = 100_000  # of a block, far above any model: a fused tensor of more is a mistake


class HFCheckpoint:
    """A Hugging Face Qwen3-Next checkpoint that has been checked whole; tensors are read when asked for.

    Attributes:
        path: the directory.
        config_path: the same; where config.json and the tokenizer are.
        config: its config.json.
        shape: sizes of the model, MTP blocks counted from the tensor names.
        names: every tensor name, in the order of the architecture table.
        entries: where every tensor is; of experts that the files hold fused, where each one's part is.
        fused_blocks: the blocks whose experts the files hold fused.
        copies: names in MTP blocks of tensors that the files have though the trunk has them.
        notes: what a person who has it written again should know.
        dtypes: type of every tensor.
        allow_nonfinite: whether NaN and infinite weights are given as they are.
        left_out: names of tensors in the files that are to be no part of the model.
        carried: tensors of the larger model that holds this one.
    """

    def __init__(
        self,
        path: Path,
        config: JsonObject,
        shape: ModelShape,
        entries: Mapping[str, Entry],
        *,
        fused_blocks: frozenset[str] = frozenset(),
        copies: Copies | None = None,
        prefix: str | None = None,
        allow_nonfinite: bool = False,
        left_out: tuple[str, ...] = (),
        carried: CarriedTensors | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path, self.config, self.shape = path, config, shape
        self.fused_blocks = fused_blocks
        self._copies = copies or Copies(path)
        self.copies = self._copies.names
        self.carried = carried or CarriedTensors()
        wrapper = wrapper_of(config)
        renamed = prefix is not None and (wrapper is None or prefix != wrapper.trunk)
        self.notes = (*notes, *([f"tensors are named {prefix}* here, and are written as model.*"] if renamed else []))
        self.config_path = path
        self.names = tuple(hf_tensors(shape))
        self.entries = entries
        self.dtypes = {name: entries[name].dtype for name in self.names}
        self.allow_nonfinite, self.left_out = allow_nonfinite, left_out
        self._files = OpenFiles()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        allow_nonfinite: bool = False,
        dequantize_fp8: bool = False,
        without_mtp: bool = False,
    ) -> HFCheckpoint:
        """Open a directory and check all of it but the values.

        Args:
            path: the directory.
            allow_nonfinite: give NaN and infinite weights as they are; otherwise reading them is an error.
            dequantize_fp8: the checkpoint is in block-scaled FP8; give it as the bf16 one that it stands for.
            without_mtp: give it as a model without MTP, whether it has tensors of one or only says so.

        Raises:
            CheckpointError: names every kind of error: missing or extra tensors, shapes, types, shards.
            ShapeError: config.json describes no model that can be built.
        """
        path = Path(path)
        config = read_config(path, fp8=dequantize_fp8)
        headers = read_headers(path, FP8_DTYPES if dequantize_fp8 else DTYPES)
        own, carried = set_apart(headers, config, path)
        carried = replace(carried, allow_nonfinite=allow_nonfinite)
        alone = without_the_rest(config, carried)
        config = language_model_alone(config, carried)
        plain, prefix = plain_names(own, path)
        stored = {plain[name]: entry for name, entry in own.items()}
        left_out: tuple[str, ...] = ()
        config = config_without_mtp(config) if without_mtp else config
        trunk = shape_from_hf_config(config, mtp_num_layers=0, where=str(path / CONFIG))
        if without_mtp:
            of_trunk = {name for name in stored if trunk.family.mtp_depth(name, trunk.num_layers) is None}
            left_out = tuple(sorted(stored.keys() - of_trunk))
            stored = {name: entry for name, entry in stored.items() if name in of_trunk}
        unknown = refuse_foreign(stored, trunk, path)  # whatever wrote it may have lost the MTP block, too
        names = trunk.family.mtp_names(trunk.num_layers)
        depth = count_mtp_layers(config, mtp_layers_in(stored, trunk), names, where=str(path))
        shape = shape_from_hf_config(config, mtp_num_layers=depth, where=str(path / CONFIG))
        _refuse_oversize(shape, stored, unknown, path)
        stored, copies = copies_apart(stored, shape, path)
        separate, fused_blocks = separated(stored, shape, config, path)
        entries: Mapping[str, Entry] = separate
        if dequantize_fp8:
            entries, config = dequantized(separate, config, path)
        _check_against_table(entries, shape, unknown, path)
        return cls(
            *(path, config, shape, entries),
            fused_blocks=fused_blocks,
            copies=copies,
            prefix=prefix,
            allow_nonfinite=allow_nonfinite,
            left_out=left_out,
            carried=carried,
            notes=alone,
        )

    def reading_once(self) -> AbstractContextManager[None]:
        """Reads within go past the page cache; see `raw_files.OpenFiles.reading_once`."""
        return self._files.reading_once()

    def read(self, name: str) -> Tensor:
        """Read one tensor; the result is the caller's own memory.

        Raises:
            CheckpointError: values that are NaN or infinite, or the file is not what it was on opening.
        """
        return self.read_rows(name)

    def read_rows(self, name: str, dim0_index: Index | None = None, dim1_index: Index | None = None) -> Tensor:
        """Read the given indices of dim 0 and of dim 1; only the pages with wanted rows leave the disk.

        Args:
            name: tensor name.
            dim0_index: rows in the order wanted, at least one; None for all.
            dim1_index: columns in the order wanted; None for all.

        Raises:
            CheckpointError: as `read`; of values that are not finite, those in the wanted rows.
        """
        entry = self.entries[name]
        rows = None if dim0_index is None else np.asarray(dim0_index, dtype=np.int64)
        assert rows is None or 0 <= rows.min() <= rows.max() < entry.shape[0], "row index out of range"
        try:
            tensor = entry.read(self._files, rows)
        except OSError as error:
            raise CheckpointError(f"{name} is not readable ({error.strerror})", where=str(self.path)) from None
        self._copies.compare(name, tensor, rows, self._files)
        if not self.allow_nonfinite:
            refuse_nonfinite(tensor, name, str(self.path))
        return select_columns(tensor, dim1_index)


def select_columns(tensor: Tensor, index: Index | None) -> Tensor:
    """The given indices of dim 1, in the order wanted; None for all."""
    if index is None:
        return tensor
    # numpy's take is five times as fast as torch's index_select here, if it may neither look at every index nor copy
    # (mode "raise"); it does not know bf16, hence the bits.
    bits = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    columns, content = np.asarray(index, dtype=np.int64), tensor.view(bits).numpy()
    assert 0 <= columns.min() <= columns.max() < content.shape[1], "column index out of range"
    taken = np.empty((len(content), columns.size), dtype=content.dtype)
    np.take(content, columns, axis=1, out=taken, mode="clip")
    return torch.from_numpy(taken).view(tensor.dtype)


def _refuse_oversize(shape: ModelShape, entries: Mapping[str, TensorEntry], unknown: list[str], path: Path) -> None:
    """A table of far more tensors than there are would take minutes and all memory only to say so."""
    routed = shape.num_layers - shape.num_dense_layers
    at_least = sum(shape.experts_per_layer) or routed * shape.num_moe_experts
    fused = tuple(f".{row.fused.name}" for row in shape.family.rows[MOE] if row.fused is not None)
    experts = [entry.shape[0] for name, entry in entries.items() if name.endswith(fused) and entry.nbytes]
    if at_least <= len(entries) + sum(min(count, MAX_EXPERTS) for count in experts):
        return
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(entries)} tensors have names that no {shape.model_type} has: {summarise(unknown)}",
            where=str(path),
            fix=_ANOTHER_LAYOUT,
        )
    raise CheckpointError(
        f"missing tensors: {len(entries)} found; num_hidden_layers {shape.num_layers} and "
        f"{shape.family.keys['num_moe_experts']} "
        f"{shape.num_moe_experts} in config.json need more than {at_least}",
        where=str(path),
        fix=_ANOTHER_CONFIG,
    )


def _check_against_table(entries: Mapping[str, Entry], shape: ModelShape, unknown: list[str], path: Path) -> None:
    table = hf_tensors(shape)
    violations = {
        "missing tensors": [name for name in table if name not in entries],
        "extra tensors": [name for name in entries if name not in table],
        "wrong shapes": [
            f"{name} {list(entries[name].shape)}, config.json says {list(tensor.shape(shape))}"
            for name, tensor in table.items()
            if name in entries and entries[name].shape != tensor.shape(shape)
        ],
        "mixed types in one parameter": [
            weight.key
            for weight in weights(shape)
            if len({entries[t.name].dtype for t, _ in weight.hf_tensors(shape) if t.name in entries}) > 1
        ],
    }
    found = [f"{len(names)} {kind}: {summarise(names)}" for kind, names in violations.items() if names]
    if found:
        fix = _ANOTHER_LAYOUT if unknown and violations["missing tensors"] else _ANOTHER_CONFIG
        raise CheckpointError("; ".join(found), where=str(path), fix=fix)
