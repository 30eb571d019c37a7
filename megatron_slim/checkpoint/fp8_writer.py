"""Checkpoints in block-scaled FP8, written: the linear layers that the published ones have in FP8, all else in bf16.

A block of 128 x 128 weights has the scale amax / 448, in fp32, and each of its weights is divided by the scale and
rounded to the nearest E4M3 number, half to even. A block of zeros has the scale 1. Blocks at the edges are smaller.
(DeepSeek-V3, section 3.3.2; the layers and config.json as in Qwen3-Next-80B-A3B-Instruct-FP8.) Which layers these are
the table says (`architecture.weight.HFTensor`): projections of attention and of all experts. Gates, convolutions, beta
and alpha of Gated DeltaNet are not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import mod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.hf_config import wrapper_of
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import OUTPUT, hf_tensors, names_of
from megatron_slim.architecture.weight import HFTensor
from megatron_slim.architecture.wrapper import Wrapper
from megatron_slim.checkpoint.carried import content_of_all
from megatron_slim.checkpoint.copies import names_of_copies, with_copies
from megatron_slim.checkpoint.expert_storage import FUSED
from megatron_slim.checkpoint.fp8 import FP8, FP8_METHOD, QUANTIZATION, SCALE, dequantize, dequantized, grid
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import HFWriter, finish_hf_checkpoint, start_hf_checkpoint
from megatron_slim.checkpoint.precision import float32_weights
from megatron_slim.checkpoint.quantization_report import TensorError, merged
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.checkpoint.safetensors_writer import TensorSpec
from megatron_slim.checkpoint.transfer import TransferOptions, transfer
from megatron_slim.checkpoint.units import Checkpoint, Unit, units
from megatron_slim.errors import CheckpointError

BLOCK = (128, 128)
LARGEST = torch.finfo(FP8).max


def check_quantization(
    method: str, source: Checkpoint, to: str, dtype: torch.dtype | None, expert_storage: str | None
) -> None:
    """Refuse what cannot be written; arguments as `convert.write_checkpoint`.

    Raises:
        CheckpointError: an unknown method, or one that does not go with the other arguments.
    """
    if method != FP8_METHOD:
        raise CheckpointError(f"quantization {method!r} is unknown", fix=f"give {FP8_METHOD}")
    if to != "hf":
        raise CheckpointError(f"a {to} checkpoint holds no block-scaled FP8", fix="give --to hf, or no --quantize")
    if dtype is not None:
        raise CheckpointError("--dtype and --quantize exclude one another", fix="what stays is bf16: leave --dtype out")
    if expert_storage == FUSED:
        raise CheckpointError(
            "fused experts and --quantize exclude one another",
            fix="the published FP8 checkpoints have one tensor per expert: leave --expert-storage out",
        )
    if getattr(source, "allow_nonfinite", False):
        fix = "a block with NaN or infinity has no scale: leave --allow-nonfinite out"
        raise CheckpointError("--allow-nonfinite and --quantize exclude one another", fix=fix)


def quantize(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """A weight in block-scaled FP8.

    Args:
        weight: [rows, columns], finite.
        block: rows and columns of a block.

    Returns:
        The weight in E4M3, [rows, columns], and the scales, [ceil(rows / block rows), ceil(columns / block columns)],
        fp32.
    """
    rows, columns = weight.shape
    down, across = grid((rows, columns), block)
    missing = down * block[0] - rows, across * block[1] - columns
    values = weight.float().contiguous()
    if any(missing):
        values = pad(values, (0, missing[1], 0, missing[0]))
    values = values.view(down, block[0], across, block[1])
    scale = values.abs().amax(dim=(1, 3)) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    # amax / scale may be above 448: by a rounding, or by more where the scale is subnormal. Some releases of torch make
    # NaN of such numbers, others 448.
    codes = (values / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST).to(FP8)
    return codes.view(down * block[0], across * block[1])[:rows, :columns].contiguous(), scale


def quantization_config(
    shape: ModelShape, wrapper: Wrapper | None = None, carried: Iterable[str] = (), copies: Iterable[str] = ()
) -> JsonObject:
    """What config.json says of a model in FP8, with every module in layers that is not, as the published ones do.

    Args:
        shape: the language model.
        wrapper: the larger model whose names the files have.
        carried: names of tensors that are not of the language model, none of which is quantized.
        copies: names of tensors that are there twice, none of which is either.
    """
    # The published list has no embedding nor final norm: no reader looks there for linear layers.
    left_out = {each.sources[0].name for each in (*shape.family.first_rows, *shape.family.last_rows)}
    head = names_of(shape)[OUTPUT].removesuffix(".weight")
    tensors = hf_tensors(shape)
    linear = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.fp8}
    kept = [name for name, tensor in tensors.items() if not tensor.fp8 and name not in left_out]
    kept = [name for name in kept if name.rpartition(".")[0] not in linear]  # a bias of what is converted
    kept += copies
    named = (name if wrapper is None else wrapper.file_name(name) for name in kept)
    modules = {name.removesuffix(".weight") for name in named} | {name.rpartition(".")[0] for name in carried}
    listed = sorted(modules, key=_natural)
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [head, *listed],
        "quant_method": FP8_METHOD,
        "weight_block_size": list(BLOCK),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Order by name, and by number where there are numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def fp8_specs(shape: ModelShape, dtypes: Mapping[str, torch.dtype] | None = None) -> list[TensorSpec]:
    """Specs of every tensor in the files of a model in FP8; ``dtypes`` of those that stay, all bf16 without it."""
    found = []
    for name, tensor in hf_tensors(shape).items():
        extents = tensor.shape(shape)
        if tensor.fp8:
            found.append(TensorSpec(name, extents, FP8))
            found.append(TensorSpec(name + SCALE, grid(extents, BLOCK), torch.float32))
        else:
            found.append(TensorSpec(name, extents, torch.bfloat16 if dtypes is None else dtypes[name]))
    return found


@dataclass(frozen=True)
class Fp8Unit(Unit):
    """A unit of a model that is quantized as it is read: weights in FP8 with their scales, all else as it stays.

    Attributes:
        dtypes: type of every tensor that stays.
        errors: takes the error of every part that is quantized.
    """

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    errors: list[TensorError] = field(default_factory=list)

    @property
    def tensors(self) -> Iterator[tuple[str, HFTensor]]:
        """Its tensors by name, scales after their weights."""
        for name, tensor in super().tensors:
            yield name, tensor
            if tensor.fp8:
                yield name + SCALE, tensor

    def rows_of(self, name: str) -> slice | None:
        """The rows of one of its tensors that it holds; of scales, those of its blocks."""
        if self.rows is None or not name.endswith(SCALE):
            return self.rows
        return slice(self.rows.start // BLOCK[0], -(-self.rows.stop // BLOCK[0]))

    def read(self, source: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read and quantize it."""
        found: dict[str, Tensor] = {}
        plain = Unit(self.weight, self.expert, self.rows, self.nbytes).read(source, dtype)
        ours = super().tensors
        linear = {name for name, tensor in ours if tensor.fp8}
        for name, tensor in plain.items():
            if name not in linear:
                found[name] = tensor.to(self.dtypes[name])
                continue
            codes, scale = quantize(tensor)
            found[name], found[name + SCALE] = codes, scale
            of_rows = scale[torch.arange(len(codes)) // BLOCK[0]]
            first = 0 if self.rows is None else self.rows.start
            self.errors.append(TensorError.of(name, first, tensor, dequantize(codes, of_rows, BLOCK[1])))
        return found


class Fp8Writer(HFWriter):
    """A writer whose result are the errors of the tensors that its process has quantized."""

    def __init__(
        self, entries: Mapping[str, TensorEntry], errors: list[TensorError], copies: Mapping[str, str]
    ) -> None:
        super().__init__(entries, copies)
        self._errors = errors

    def finish(self) -> list[TensorError]:  # type: ignore[override]
        """Close the files."""
        super().finish()
        return self._errors


class Fp8Export:
    """What a checkpoint will be in block-scaled FP8.

    Attributes:
        dtypes: type of every tensor as the result reads with ``--dequantize-fp8``: bf16, but for those that stay fp32.
        specs: every tensor in the files.
        partial: the quantized weights whose blocks at the edges are smaller.
    """

    def __init__(self, source: Checkpoint) -> None:
        exact = {
            tensor.name
            for weight in float32_weights(source, torch.bfloat16)
            for tensor, _ in weight.hf_tensors(source.shape)
        }
        self._source = source
        self.dtypes = {name: torch.float32 if name in exact else torch.bfloat16 for name in source.dtypes}
        self.copies = names_of_copies(source.shape, source.copies)
        self.specs = list(with_copies(fp8_specs(source.shape, self.dtypes), self.copies))
        weights = [spec for spec in self.specs if spec.dtype == FP8]
        self.partial = [spec.name for spec in weights if any(map(mod, spec.shape, BLOCK))]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(spec.nbytes for spec in self.specs)

    def write(self, directory: Path, config: HFConfig, options: TransferOptions) -> tuple[str, list[TensorError]]:
        """Write it into an existing, empty directory; ``options`` as `transfer`.

        Returns:
            The digest of its content, and the error of every quantized tensor.

        Raises:
            CheckpointError: what was read back differs from what was written.
        """
        source, wrapper, errors = self._source, wrapper_of(config), list[TensorError]()
        described = quantization_config(source.shape, wrapper, source.carried.entries, self.copies.values())
        full = {**config, QUANTIZATION: described}
        stored = start_hf_checkpoint(directory, self.specs, wrapper=wrapper, carried=source.carried)
        entries = {name: entry for name, entry in stored.items() if name not in source.carried.entries}
        todo = [
            Fp8Unit(unit.weight, unit.expert, unit.rows, unit.nbytes, self.dtypes, errors)
            for unit in units(source.shape, source.dtypes, row_multiple=BLOCK[0])
        ]
        found, content = transfer(source, lambda _: Fp8Writer(entries, errors, self.copies), todo, **options)
        carried = source.carried.write(stored, verify=options["verify"], where=options["where"])
        finish_hf_checkpoint(directory, full, copy_files_from=source.config_path)
        written = HFCheckpoint.open(directory, dequantize_fp8=True)
        opened = (written.shape, written.dtypes, written.fused_blocks, written.copies)
        if opened != (source.shape, self.dtypes, frozenset(), source.copies):
            raise CheckpointError("differs from its source after writing", where=str(directory), fix="check the disk")
        own = {name: entry for name, entry in entries.items() if name not in self.copies.values()}
        assert written.entries == dequantized(own, full, directory)[0], "headers of other places"
        return content_of_all(content, carried), merged((error for part in found for error in part), source.names)
