"""How a file holds the experts of a block: one tensor per expert and projection, or all of them fused in one.

Everything else names one tensor per expert (`architecture.table`). transformers 5 has them fused in memory, and so have
the files of Qwen3.5 and 3.6, of trunk and MTP block each in a form of its own. What is fused is read and written
through views: an expert's part of such a tensor is a run of bytes, so no more than that part is ever in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_slim.aliases import HFConfig
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.fp8 import FP8, SCALE, block_size, grid
from megatron_slim.checkpoint.huggingface_files import CONFIG, find_file
from megatron_slim.checkpoint.layout import runs_of_sources
from megatron_slim.checkpoint.records import STORAGE
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import read_json, to_json

FUSED, SEPARATE, MIXED = "fused", "separate", "mixed"
_KEY, _COPIES = "fused_experts", "copies"


class Storage(NamedTuple):
    """What Hugging Face files have that Megatron's layout cannot say.

    Attributes:
        fused_blocks: the blocks whose experts are fused.
        copies: names in MTP blocks of the tensors that are there though the trunk has them (`copies`).
    """

    fused_blocks: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()


PLAIN = Storage()


def expert_blocks(shape: ModelShape) -> frozenset[str]:
    """The blocks whose experts a file may hold fused."""
    return frozenset(weight.block for weight in weights(shape) if weight.fused is not None)


def fused_blocks_for(storage: str | None, shape: ModelShape, source: Collection[str]) -> frozenset[str]:
    """The blocks to write fused: what was asked for, or what the source has (None)."""
    blocks = expert_blocks(shape)
    return {FUSED: blocks, SEPARATE: frozenset(), None: blocks & frozenset(source)}[storage]


def storage_name(fused_blocks: Collection[str], shape: ModelShape) -> str:
    """One word for the form of a whole checkpoint."""
    if not fused_blocks:
        return SEPARATE
    return FUSED if frozenset(fused_blocks) == expert_blocks(shape) else MIXED


def separated(
    entries: Mapping[str, TensorEntry], shape: ModelShape, config: HFConfig, path: Path
) -> tuple[dict[str, TensorEntry], frozenset[str]]:
    """The tensors of a checkpoint with one entry per expert, and the blocks that are fused in the files.

    Args:
        entries: every tensor in the files.
        shape: the model.
        config: config.json, which says how large the blocks of FP8 scales are.
        path: the checkpoint, for errors.

    Raises:
        CheckpointError: a block in both forms, half of one, or fused tensors of another shape.
    """
    found = dict(entries)
    fused = [weight for weight in weights(shape) if weight.fused is not None and weight.fused.name in entries]
    blocks = frozenset(weight.block for weight in fused)
    _check_forms(entries, shape, blocks, path)
    _check_shapes(entries, shape, fused, path)
    for weight in fused:
        assert weight.fused is not None
        entry, runs = found.pop(weight.fused.name), _runs(weight, shape)
        found |= zip(_names(weight, shape), _views(entry, runs), strict=True)
        if entry.dtype == FP8 and (scale := found.pop(weight.fused.name + SCALE, None)) is not None:
            parts = _views(scale, _scale_runs(weight, scale, entry, runs, config, path))
            found |= zip((name + SCALE for name in _names(weight, shape)), parts, strict=True)
    return found, blocks


def _names(weight: Weight, shape: ModelShape) -> list[str]:
    return [tensor.name for tensor, _ in weight.hf_tensors(shape)]


def _runs(weight: Weight, shape: ModelShape) -> list[slice]:
    """Rows of an expert's part of the fused tensor that each source is."""
    assert weight.fused is not None
    runs = runs_of_sources(dataclasses.replace(weight, dims=weight.fused.dims[1:]), shape)
    assert runs is not None, f"{weight.fused.name}: a source is not a run of rows"
    return runs


def _views(entry: TensorEntry, runs: list[slice]) -> Iterator[TensorEntry]:
    """The parts of a fused tensor, expert by expert."""
    row_bytes = math.prod(entry.shape[2:]) * entry.dtype.itemsize
    for expert in range(entry.shape[0]):
        for run in runs:
            offset = entry.offset + expert * entry.row_bytes + run.start * row_bytes
            yield TensorEntry(entry.file, offset, entry.dtype, (run.stop - run.start, *entry.shape[2:]))


def _check_forms(entries: Mapping[str, TensorEntry], shape: ModelShape, blocks: frozenset[str], path: Path) -> None:
    """Refuse blocks whose experts are there twice, or of which only some projections are fused."""
    twice, half = set(), []
    for weight in weights(shape) if blocks else ():
        if weight.fused is not None and weight.block in blocks:
            if any(name in entries for name in _names(weight, shape)):
                twice.add(weight.block)
            elif weight.fused.name not in entries:
                half.append(weight.fused.name)
    if twice:
        raise CheckpointError(
            f"experts both fused and one by one in {summarise(sorted(twice))}",
            where=str(path),
            fix="get it again: one of the two belongs to another state of the model",
        )
    if half:
        raise CheckpointError(
            f"half of the fused experts is missing: {summarise(half)}", where=str(path), fix="get it again"
        )


def _check_shapes(entries: Mapping[str, TensorEntry], shape: ModelShape, fused: list[Weight], path: Path) -> None:
    wrong, transposed = [], 0
    for weight in fused:
        assert weight.fused is not None
        found, wanted = entries[weight.fused.name].shape, weight.fused.shape(shape)
        if found != wanted:
            wrong.append(f"{weight.fused.name} {list(found)}, config.json says {list(wanted)}")
            transposed += found == (wanted[0], *reversed(wanted[1:]))
    if not wrong:
        return
    if transposed == len(wrong):
        raise CheckpointError(
            f"fused experts that are stored transposed: {summarise(wrong)}",
            where=str(path),
            fix="save them as transformers 5 has them: [experts, out, in]",
        )
    raise CheckpointError(
        f"{len(wrong)} wrong shapes of fused experts: {summarise(wrong)}",
        where=str(path),
        fix="the checkpoint and its config.json do not belong together",
    )


def _scale_runs(
    weight: Weight,
    scale: TensorEntry,
    entry: TensorEntry,
    runs: list[slice],
    config: HFConfig,
    path: Path,
) -> list[slice]:
    """Rows of an expert's scales that belong to each source."""
    assert weight.fused is not None
    block = block_size(config, str(path / CONFIG))
    if scale.shape != (entry.shape[0], *grid(entry.shape[1:], block)):
        raise CheckpointError(
            f"{weight.fused.name}{SCALE} {list(scale.shape)}: not the scales of {list(entry.shape)} in blocks of "
            f"{list(block)}",
            where=str(path),
            fix="weights and scales must belong together",
        )
    if any(run.start % block[0] for run in runs):
        raise CheckpointError(
            f"{weight.fused.name}: gate and up share blocks of {block[0]} rows of FP8 scales",
            where=str(path),
            fix="use the checkpoint in bf16 that it was made from",
        )
    return [slice(run.start // block[0], -(-run.stop // block[0])) for run in runs]


def write_storage(directory: Path, storage: Storage) -> None:
    """Record the form of files next to a config.json; nothing where it is the usual one."""
    content = {_KEY: sorted(storage.fused_blocks)} | ({_COPIES: sorted(storage.copies)} if storage.copies else {})
    if any(content.values()):
        (directory / STORAGE).write_text(to_json(content), encoding="utf-8")


def recorded_storage(directory: Path) -> Storage:
    """What `write_storage` recorded; some blocks may have been left out of the model since, as MTP may be.

    Raises:
        CheckpointError: the file is malformed.
    """
    file = find_file(directory, STORAGE)
    if file is None:
        return PLAIN
    content = read_json(file, max_bytes=10_000_000)
    found = [content.get(_KEY), content.get(_COPIES, [])] if isinstance(content, dict) else []
    if not found or not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in found):
        fix = "remove it: experts are then written one by one"
        raise CheckpointError("is not a record of which experts are stored fused", where=str(file), fix=fix)
    return Storage(*map(frozenset, found))
