"""Megatron's distributed checkpoints (torch_dist), reading: strict and lazy, whatever layout saved them.

See `distributed_writer` for what is where.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.axes import size
from megatron_slim.architecture.family import MTP
from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import copies_of, weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.carried import CarriedTensors, language_model_alone, without_the_rest
from megatron_slim.checkpoint.described import carried_next_to
from megatron_slim.checkpoint.expert_storage import expert_blocks, recorded_storage
from megatron_slim.checkpoint.finite import refuse_nonfinite
from megatron_slim.checkpoint.huggingface import CONFIG, Index, select_columns
from megatron_slim.checkpoint.huggingface_files import read_plain_config
from megatron_slim.checkpoint.integrity import verify_metadata
from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.layout import as_rows, fits, rows_in_megatron, split_keys, stored_shapes
from megatron_slim.checkpoint.metadata_pickle import Metadata, TensorStorageMetadata
from megatron_slim.checkpoint.mtp import config_without_mtp, count_mtp_layers
from megatron_slim.checkpoint.torch_dist_files import Piece, locate_pieces, read_metadata
from megatron_slim.checkpoint.torch_dist_names import HF_DIR, HIDDEN_KD, STATE, hf_files
from megatron_slim.checkpoint.torch_dist_reader import PieceReader
from megatron_slim.errors import CheckpointError, summarise

# What Megatron saves in addition to the weights; none of it describes the model.
_NOT_WEIGHTS = ("optimizer", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")
_NOT_THE_MODEL = (*_NOT_WEIGHTS, HIDDEN_KD)


class DistCheckpoint:
    """A torch_dist checkpoint of a Qwen3-Next model, checked whole; weights are read when asked for.

    Attributes:
        path: directory of the weights (``release`` or ``iter_...``).
        config_path: directory of the model's config.json and tokenizer.
        config: that config.json.
        shape: sizes of the model, MTP blocks counted from the checkpoint.
        names: every Hugging Face tensor name, in the order of the architecture table.
        dtypes: type of every Hugging Face tensor by name.
        fused_blocks: the blocks whose experts were fused in the files that it was made of.
        copies: as of `HFCheckpoint`, of the files that it was made of.
        notes: as of `HFCheckpoint`.
        carried: tensors of the larger model that holds this one.
        num_ignored: entries that are not weights (optimizer, random state, ...).
        left_out: names of tensors that are not part of the model: projections of hidden states (`HIDDEN_KD`), and the
            MTP block where it is not wanted.
        vocab_rows: rows, padding included, of what has a row for every token, by key.
        optimizer_by_buckets: its optimizer state has the layout of the run's buffers, not of its parameters.
        optimizer_by_names: it has optimizer state by the names of parameters (`optimizer_state`).
    """

    def __init__(
        self,
        path: Path,
        config_path: Path,
        config: JsonObject,
        shape: ModelShape,
        metadata: Metadata,
        *,
        allow_nonfinite: bool = False,
        label: str = "",
        trained_only: bool = False,
        carried: CarriedTensors | None = None,
    ) -> None:
        self.path, self.config_path, self.config, self.shape = path, config_path, config, shape
        recorded = recorded_storage(config_path)
        self.fused_blocks = recorded.fused_blocks & expert_blocks(shape)
        self.copies = recorded.copies & frozenset(short for short, _ in copies_of(shape).values())
        self.carried = carried or CarriedTensors()
        self.notes: tuple[str, ...] = ()
        # An optimizer has no state of what is not trained.
        self.weights = tuple(weight for weight in weights(shape) if not (trained_only and weight.buffer))
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._entries = {key: tensors[key] for weight in self.weights for key, _ in split_keys(weight, shape)}
        self.num_ignored = len(metadata.state_dict_metadata) - len(self._entries)
        self.left_out = tuple(
            sorted(key for key in tensors if key.startswith((HIDDEN_KD, MTP)) and key not in self._entries)
        )
        self.vocab_rows = {
            each.key: self._entries[each.key].size[0] for each in self.weights if each.dims[0] == "vocab"
        }
        self.optimizer_by_buckets = any(".gbuf_idx_" in key for key in metadata.state_dict_metadata)
        self.optimizer_by_names = any(key.startswith(STATE) for key in tensors)
        self.allow_nonfinite, self._label = allow_nonfinite, label
        self.pieces = locate_pieces(path, self._entries, metadata.storage_data)
        self._longest = {key: max(piece.sizes[0] for piece in pieces) for key, pieces in self.pieces.items()}
        self._reader = PieceReader()
        self._owners: dict[str, tuple[Weight, int, int | None]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for weight in self.weights:
            dtype = self._entries[split_keys(weight, shape)[0][0]].properties.dtype
            for number, (tensor, expert) in enumerate(weight.hf_tensors(shape)):
                self.dtypes[tensor.name] = dtype
                self._owners[tensor.name] = (weight, number % len(weight.sources), expert)
        self.names = tuple(self.dtypes)

    @classmethod
    def open(
        cls,
        path: Path | str,
        hf_config: Path | str | None = None,
        *,
        allow_nonfinite: bool = False,
        without_mtp: bool = False,
    ) -> DistCheckpoint:
        """Open a checkpoint directory, or one iteration of it, and check all of it but the values.

        Args:
            path: what ``--load`` takes, or the iteration's own directory.
            hf_config: directory with the model's config.json where that is not in ``hf/``.
            allow_nonfinite: give NaN and infinite weights as they are; otherwise reading them is an error.
            without_mtp: give it as a model without MTP, whether it has weights of one or only says so.

        Raises:
            CheckpointError: missing or unknown weights, wrong shapes, missing or truncated files.
            ShapeError: config.json describes no model that can be built.
        """
        path = Path(path)
        directory = iteration_directory(path)
        metadata = read_metadata(directory)
        config_path = _find_config(path, directory, hf_config)
        carried = carried_next_to(config_path, allow_nonfinite=allow_nonfinite)
        whole, entries = read_plain_config(config_path), metadata.state_dict_metadata
        config, notes = language_model_alone(whole, carried), without_the_rest(whole, carried)
        if without_mtp:
            config = config_without_mtp(config)
            entries = {key: entry for key, entry in entries.items() if not key.startswith(MTP)}
        depth = count_mtp_layers(config, _mtp_layers(entries), f"{MTP}*", where=str(directory))
        shape = shape_from_hf_config(config, mtp_num_layers=depth, where=str(config_path / CONFIG))
        _check_against_table(directory, config_path, shape, entries)
        found = cls(directory, config_path, config, shape, metadata, allow_nonfinite=allow_nonfinite, carried=carried)
        found.notes = notes
        verify_metadata(directory)  # last: what else is wrong says more
        return found

    def read_weight(self, weight: Weight, *, expert: int | None = None) -> Tensor:
        """Read a whole Megatron parameter, padding of the vocabulary cut off; of a stacked one, ``expert`` alone."""
        assert not weight.stacked or expert is not None, f"{weight.key}: one expert at a time"
        return self._read(weight, expert, self._all_rows(weight), weight.key)

    def _all_rows(self, weight: Weight) -> npt.NDArray[np.int64]:
        """Of one expert where it is stacked."""
        return np.arange(size(weight.dims[0], self.shape.in_block(weight.block).sizes))

    def check_parts(self) -> None:
        """From now on compare data with their checksums even where only rows of a piece are wanted."""
        self._reader.check_parts = True

    def reading_once(self) -> AbstractContextManager[None]:
        """Reads within go past the page cache; see `raw_files.OpenFiles.reading_once`."""
        return self._reader.files.reading_once()

    def read(self, name: str) -> Tensor:
        """Read one Hugging Face tensor."""
        return self.read_rows(name)

    def read_rows(self, name: str, dim0_index: Index | None = None, dim1_index: Index | None = None) -> Tensor:
        """Read the given rows and columns of one Hugging Face tensor, in the order wanted; no other row is read."""
        weight, source, expert = self._owners[name]
        rows = rows_in_megatron(weight, self.shape, source)
        if dim0_index is not None:
            rows = rows[np.asarray(dim0_index, dtype=np.int64)]
        return self._read(weight, expert, rows, name, dim1_index)

    def _read(
        self, weight: Weight, expert: int | None, rows: npt.NDArray[np.int64], name: str, columns: Index | None = None
    ) -> Tensor:
        """Rows of a Megatron parameter, of one expert where it is stacked.

        One that is stored under a key per label is put together of what is wanted of each: it may be the largest of
        the model.
        """
        if expert is not None:
            return self._wanted(self._gather(weight.key, rows, expert), name, columns)
        out: Tensor | None = None
        for key, part in split_keys(weight, self.shape):
            first, last, _ = part.indices(weight.shape(self.shape)[0])
            here = np.flatnonzero((rows >= first) & (rows < last))
            if not here.size:
                continue
            tensor = self._wanted(self._gather(key, rows[here] - first), name, columns)
            if here.size == rows.size:
                return tensor
            if out is None:
                out = torch.empty((rows.size, *tensor.shape[1:]), dtype=tensor.dtype)
            out[as_rows(here)] = tensor
        assert out is not None, f"{name}: no key holds rows {rows}"
        return out

    def _wanted(self, tensor: Tensor, name: str, columns: Index | None) -> Tensor:
        """Some columns, after a look at the values of all."""
        if not self.allow_nonfinite:
            refuse_nonfinite(tensor, self._label + name, str(self.path))
        return select_columns(tensor, columns)

    def _gather(self, key: str, rows: npt.NDArray[np.int64], expert: int | None = None) -> Tensor:
        """Rows of a stored tensor; of a stacked one, rows of one expert, which its pieces hold on dim 1."""
        leading = () if expert is None else (expert,)
        extents = tuple(self._entries[key].size)[len(leading) :]
        out: Tensor | None = None
        for piece in self._pieces_with(key, rows, expert):
            offsets, sizes = piece.offsets[len(leading) :], piece.sizes[len(leading) :]
            here = np.flatnonzero((rows >= offsets[0]) & (rows < offsets[0] + sizes[0]))
            if not here.size:
                continue
            first = 0 if expert is None else (expert - piece.offsets[0]) * sizes[0]
            content = self._reader.read_rows(piece, first + rows[here] - offsets[0], dims=len(leading) + 1)
            if here.size == rows.size and sizes[1:] == extents[1:]:
                return content
            if out is None:
                out = torch.empty((rows.size, *extents[1:]), dtype=piece.dtype)
            part = out[tuple(slice(o, o + n) for o, n in zip((0, *offsets[1:]), (rows.size, *sizes[1:]), strict=True))]
            part[as_rows(here)] = content
        assert out is not None, f"{key}: no piece holds rows {rows}"
        return out

    def _pieces_with(self, key: str, rows: npt.NDArray[np.int64], expert: int | None) -> Iterator[Piece]:
        """Pieces, sorted by their first index, that can hold some of these rows (of an expert)."""
        pieces = self.pieces[key]
        start, stop = (int(rows.min()), int(rows.max()) + 1) if expert is None else (expert, expert + 1)
        near = bisect.bisect_right(pieces, start - self._longest[key], key=lambda piece: piece.offsets[0])
        for piece in pieces[near:]:
            if piece.offsets[0] >= stop:
                return
            if piece.offsets[0] + piece.sizes[0] > start:
                yield piece


def _mtp_layers(keys: Iterable[str]) -> int:
    """Number of MTP blocks by Megatron's keys."""
    numbers = (key.removeprefix(f"{MTP}layers.").partition(".")[0] for key in keys if key.startswith(MTP))
    return max((int(number) if number.isdecimal() else 0 for number in numbers), default=-1) + 1


def _find_config(path: Path, directory: Path, hf_config: Path | str | None) -> Path:
    if hf_config is not None:
        return Path(hf_config)
    for place in (hf_files(path), hf_files(directory), hf_files(directory.absolute().parent)):
        if (place / CONFIG).is_file():
            return place
    raise CheckpointError(
        f"no {HF_DIR}/{CONFIG} in this checkpoint",
        where=str(path),
        fix="name the directory of the model's config.json with --hf-config",
    )


def _check_against_table(
    directory: Path, config_path: Path, shape: ModelShape, entries: Mapping[str, TensorStorageMetadata | Any]
) -> None:
    table = {key: (weight, extents) for weight in weights(shape) for key, extents in stored_shapes(weight, shape)}
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    violations = {
        "missing weights": [key for key in table if key not in tensors],
        "unknown weights": [key for key in tensors if key not in table and not key.startswith(_NOT_THE_MODEL)],
        "wrong shapes": [
            f"{key} {list(tensors[key].size)}, config.json says {list(extents)}"
            for key, (weight, extents) in table.items()
            if key in tensors and not fits(weight, tuple(tensors[key].size), extents)
        ],
    }
    found = [f"{len(names)} {kind}: {summarise(names)}" for kind, names in violations.items() if names]
    if found:
        raise CheckpointError(
            "; ".join(found), where=str(directory), fix=f"the checkpoint and {config_path} do not belong together"
        )
