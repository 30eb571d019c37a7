"""Checkpoints in block-scaled FP8, as Qwen and DeepSeek publish them, read as bf16; `fp8_writer` writes them.

A weight ``X.weight`` [rows, columns] of type E4M3 comes with ``X.weight_scale_inv``, one scale per block of r x c,
[ceil(rows / r), ceil(columns / c)], where ``quantization_config.weight_block_size`` of config.json is [r, c]. A value
is its E4M3 number times the scale of its block: multiplied in fp32, rounded to bf16, as in transformers and in
DeepSeek's own code. What is not quantized stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.checkpoint.raw_files import OpenFiles
from megatron_slim.checkpoint.safetensors_reader import DTYPES, TensorEntry
from megatron_slim.errors import CheckpointError, summarise

QUANTIZATION = "quantization_config"
FP8_METHOD = "fp8"
FP8 = torch.float8_e4m3fn
FP8_DTYPES = {**DTYPES, "F8_E4M3": FP8}
SCALE = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.bfloat16)
_LEAVE_OUT = "leave --dequantize-fp8 out"


@dataclass(frozen=True)
class BlockScaled:
    """A weight in FP8 and its scales, which read as a tensor in bf16; compare `TensorEntry`."""

    name: str
    weight: TensorEntry
    scale: TensorEntry
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight.shape

    def read(self, files: OpenFiles, rows: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Read the given rows, and the scales of their blocks, or all.

        Raises:
            CheckpointError: scales that no quantization gives.
        """
        wanted = np.arange(self.shape[0]) if rows is None else rows
        blocks, block_of = np.unique(wanted // self.block[0], return_inverse=True)
        scale = self.scale.read(files, blocks).float()
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise CheckpointError(
                f"{self.name}{SCALE}: scales that are NaN, infinite or negative", where=str(self.scale.file)
            )
        return dequantize(self.weight.read(files, rows), scale[torch.from_numpy(block_of)], self.block[1])


def dequantize(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Numbers in FP8 times their scales, in bf16.

    Args:
        codes: [rows, width].
        scale: of every row and every ``columns`` columns, [rows, ceil(width / columns)], fp32.
        columns: of a block.
    """
    return codes.float().mul_(scale.repeat_interleave(columns, dim=1)[:, : codes.shape[1]]).bfloat16()


def dequantized(
    entries: Mapping[str, TensorEntry], config: HFConfig, path: Path
) -> tuple[dict[str, TensorEntry | BlockScaled], JsonObject]:
    """Tensors and config.json of the bf16 checkpoint that an FP8 checkpoint reads as.

    Args:
        entries: every tensor on disk.
        config: config.json.
        path: the checkpoint, for errors.

    Raises:
        CheckpointError: it is not an FP8 checkpoint, or weights and scales do not belong together.
    """
    weights = {name: entry for name, entry in entries.items() if entry.dtype == FP8}
    if not weights:
        raise CheckpointError("is not FP8: no tensor is of type F8_E4M3", where=str(path), fix=_LEAVE_OUT)
    block = block_size(config, str(path / "config.json"))
    _check_pairs(weights, entries, block, path)
    found: dict[str, TensorEntry | BlockScaled] = {}
    for name, entry in entries.items():
        if name in weights:
            found[name] = BlockScaled(name, entry, entries[name + SCALE], block)
        elif not name.endswith(SCALE):
            found[name] = entry
    return found, plain_config(config)


def plain_config(config: HFConfig) -> JsonObject:
    """A config.json as the dequantized weights have it; of other weights, as it is."""
    if QUANTIZATION not in config:
        return dict(config)
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}
    return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in plain.items()}


def block_size(config: HFConfig, where: str) -> tuple[int, int]:
    """Rows and columns of a block that shares a scale, as config.json says it.

    Raises:
        CheckpointError: it does not, or something else than block-scaled E4M3.
    """
    quantization = config.get(QUANTIZATION)
    if quantization is None:
        raise CheckpointError(f"no {QUANTIZATION}, but tensors in FP8", where=where, fix="get config.json again")
    assert isinstance(quantization, dict) and quantization["quant_method"] == FP8_METHOD
    if (fmt := quantization.get("fmt", "e4m3")) != "e4m3":
        raise CheckpointError(f"{QUANTIZATION}.fmt {fmt!r} is not supported (only 'e4m3')", where=where)
    match size := quantization.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0 and bool not in (type(rows), type(columns)):
            return rows, columns
    raise CheckpointError(f"{QUANTIZATION}.weight_block_size {size!r} is not two positive integers", where=where)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Number of blocks in each dimension; those at the edges may be smaller."""
    return tuple(-(-extent // step) for extent, step in zip(shape, block, strict=False))


def _check_pairs(
    weights: Mapping[str, TensorEntry], entries: Mapping[str, TensorEntry], block: tuple[int, int], path: Path
) -> None:
    scales = {name.removesuffix(SCALE): entry for name, entry in entries.items() if name.endswith(SCALE)}
    violations = {
        "FP8 tensors that are not matrices": [name for name, entry in weights.items() if len(entry.shape) != 2],
        "FP8 weights without scales": [name for name in weights if name not in scales],
        "scales without FP8 weights": [name + SCALE for name in scales if name not in weights],
        "scales that are not F32 or BF16": [
            name + SCALE for name, entry in scales.items() if entry.dtype not in _SCALE_DTYPES
        ],
        "scales of wrong shapes": [
            f"{name}{SCALE} {list(scales[name].shape)} for {list(entry.shape)} in blocks of {list(block)}"
            for name, entry in weights.items()
            if name in scales and scales[name].shape != grid(entry.shape, block)
        ],
    }
    found = [f"{len(names)} {kind}: {summarise(names)}" for kind, names in violations.items() if names]
    if found:
        raise CheckpointError("; ".join(found), where=str(path), fix="weights and scales must belong together")
