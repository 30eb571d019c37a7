"""Checkpoints that other programs have arranged or quantized: what they are, by their names, and what can be read.

Read are tensors that merely carry a prefix, as language models do that were part of something larger. All else is
refused by what it is, because "tensors are missing" would send people looking for a broken download.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from megatron_slim.aliases import HFConfig
from megatron_slim.architecture.family import MTP
from megatron_slim.architecture.rows import EMBEDDING_ROWS, HEAD_ROWS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import copies_of, hf_tensors, weights
from megatron_slim.checkpoint.fp8 import FP8_METHOD, QUANTIZATION, SCALE
from megatron_slim.checkpoint.safetensors_reader import mlx_layout
from megatron_slim.errors import CheckpointError, summarise

_MLX_QUANTIZATION = "quantization"  # its own key in config.json, next to a copy under everybody else's
_MLX_KEYS = {"group_size", "bits", "mode"}
_METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "quantization_method")
_ORIGINAL = "use the checkpoint in bf16 that they were made of"
# Parts of names that no language model has.
_OTHER_PARTS = {
    *("visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "image_encoder"),
    *("multi_modal_projector", "mm_projector", "audio", "audio_tower", "audio_model", "audio_encoder"),
    *("talker", "code2wav"),
}
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|biases|weight_packed|weight_shape|weight_scale(_2)?|weight_zero_point|input_scale"
    r"|absmax|quant_map|nested_absmax|SCB|weight_format)$|\.quant_state\."
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EMBEDDING = EMBEDDING_ROWS[0].sources[0].name
_TRUNK, _EMBED = _EMBEDDING.split(".", 1)
_OUTSIDE = [row.sources[0].name for row in (*EMBEDDING_ROWS, *HEAD_ROWS)]
# First parts of names within the trunk, its blocks among them, and of those next to it.
_IN_TRUNK = ("layers.", *(name.split(".")[1] + "." for name in _OUTSIDE if name.startswith(f"{_TRUNK}.")))
_BESIDE_TRUNK = (MTP, *(name.split(".")[0] + "." for name in _OUTSIDE if not name.startswith(f"{_TRUNK}.")))


def plain_names(names: Collection[str], path: Path) -> tuple[dict[str, str], str | None]:
    """For every tensor in the files its name without the prefix that all of the language model carries.

    Args:
        names: of all tensors in the files.
        path: the checkpoint, for errors.

    Returns:
        The plain name of each; and what the trunk's names begin with in place of ``model.``, None where that is it.

    Raises:
        CheckpointError: only some tensors carry the prefix, or there are several language models.
    """
    same = {name: name for name in names}
    if _EMBEDDING in names:
        return same, None
    found = [name for name in names if name == _EMBED or name.endswith(f".{_EMBED}")]
    found = [name for name in found if not {"layers", "mtp", *_OTHER_PARTS} & set(name.split("."))]
    if not found:
        return same, None
    if len(found) > 1:
        raise CheckpointError(
            f"several language models: {summarise(found)}", where=str(path), fix="save only the one to use"
        )
    prefix = found[0].removesuffix(_EMBED)
    renamed = {name: _plain(name, prefix) for name in names}
    if mixed := [name for name in names if renamed[name] == name and name.startswith(_in(f"{_TRUNK}."))]:
        raise CheckpointError(
            f"only some tensors carry the prefix {prefix!r}: {summarise(mixed)} do not",
            where=str(path),
            fix="there may be two models in these files",
        )
    if len(set(renamed.values())) < len(renamed):
        by_plain = sorted(renamed, key=lambda name: (renamed[name], name))
        twice = [f"{a} and {b}" for a, b in itertools.pairwise(by_plain) if renamed[a] == renamed[b]]
        raise CheckpointError(
            f"tensors that are one without their prefix: {summarise(twice)}",
            where=str(path),
            fix="there may be two models in these files",
        )
    return renamed, prefix


def _in(prefix: str) -> tuple[str, ...]:
    return tuple(prefix + part for part in _IN_TRUNK)


def _plain(name: str, prefix: str) -> str:
    """A name without the prefix of the trunk; tensors outside the trunk may carry less of it."""
    if name.startswith(_in(prefix)):
        return f"{_TRUNK}.{name.removeprefix(prefix)}"
    parts = prefix.split(".")[:-1]
    for count in range(len(parts), 0, -1):
        outer = ".".join(parts[:count]) + "."
        if name.startswith(tuple(outer + part for part in _BESIDE_TRUNK)):
            return name.removeprefix(outer)
    return name


def refuse_foreign(names: Iterable[str], shape: ModelShape, path: Path) -> list[str]:
    """Refuse what is recognised by its tensors' names.

    Returns:
        The names that no model of this family has.

    Raises:
        CheckpointError: MLX's layout, a vision or audio part, or quantized weights.
    """
    unknown = list(_unknown(names, shape))
    if any(".switch_mlp." in name for name in unknown):
        raise mlx_layout(str(path))
    if parts := [name for name in unknown if _OTHER_PARTS & set(name.split("."))]:
        raise CheckpointError(
            f"{len(parts)} tensors of a vision or audio part, which is not supported: {summarise(parts)}",
            where=str(path),
            fix="save its language model alone",
        )
    if quantized := [name for name in unknown if _QUANTIZED.search(name)]:
        raise CheckpointError(
            f"quantized weights, and config.json does not say how: {summarise(quantized)}",
            where=str(path),
            fix=_ORIGINAL,
        )
    return unknown


def _unknown(names: Iterable[str], shape: ModelShape) -> Iterator[str]:
    """Names that differ from those of the family in more than their numbers; the table itself may be far too large."""
    dense, kinds = min(1, shape.num_dense_layers), shape.family.attention
    small = dataclasses.replace(
        shape,
        num_layers=dense + len(kinds),
        layer_types=kinds[:1] * dense + kinds,
        num_dense_layers=dense,
        num_moe_experts=1,
        experts_per_layer=(),
        mtp_num_layers=int(bool(shape.family.mtp_rows)),
    )
    blocks = {weight.block for weight in weights(small)}
    known = {_NUMBER.sub("N", name) for name in (*hf_tensors(small), *hf_tensors(small, blocks), *copies_of(small))}
    known |= {name + SCALE for name in known}
    return (name for name in names if _NUMBER.sub("N", name) not in known)


def refuse_quantized(config: HFConfig, file: Path, fp8: bool) -> None:
    """Refuse what config.json says is quantized, but for block-scaled FP8 where that is wanted.

    A larger model's file may say it of the language model alone, in its section. Serving programs read that too.

    Args:
        config: the parsed file.
        file: where it is.
        fp8: whether block-scaled FP8 is wanted.

    Raises:
        CheckpointError: says with what the weights are quantized.
    """
    sections = {"": config} | {f"{name}.": section for name, section in config.items() if isinstance(section, Mapping)}
    keys = (_MLX_QUANTIZATION, QUANTIZATION, "compression_config")
    found = {prefix + key: section.get(key) for prefix, section in sections.items() for key in keys}
    for key, quantization in found.items():
        if quantization is None:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != FP8_METHOD or key != QUANTIZATION:
            kind = _kind(quantization)
            raise CheckpointError(
                f"{key}: weights quantized with {kind} are not supported", where=str(file), fix=_ORIGINAL
            )
        if not fp8:
            fix = "give --dequantize-fp8, or convert first: megatron-slim convert --to hf --dequantize-fp8"
            raise CheckpointError(f"{key}: the weights are in FP8", where=str(file), fix=fix)


def _kind(quantization: object) -> str:
    """What quantized the weights: by name where it has one, else by its settings."""
    if not isinstance(quantization, dict):
        return repr(quantization)
    for key in _METHOD_KEYS:
        if isinstance(quantization.get(key), str):
            return repr(quantization[key])
    plain = {key: value for key, value in quantization.items() if not isinstance(value, (dict, list))}
    settings = summarise([f"{key} {value!r}" for key, value in plain.items()]) or "no settings"
    is_mlx = {"group_size", "bits"} <= plain.keys() and all(
        key in _MLX_KEYS or (isinstance(value, bool) and "." in key) for key, value in plain.items()
    )
    return f"{'MLX' if is_mlx else 'a method that it does not name'} ({settings})"
