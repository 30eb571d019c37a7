"""Synthetic checkpoints to measure with: dense random ones of any size, and the published layout as files of holes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_slim.architecture.hf_config import shape_from_hf_config
from megatron_slim.architecture.published import QWEN3_NEXT_80A3B
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters, hf_tensors, weights
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, to_json

ITEMSIZE = 2  # bf16
MAX_SHARD_BYTES = 4_000_000_000
RECIPES = Path(__file__).resolve().parents[1] / "examples" / "slimqwen" / "recipes"
RECIPE = RECIPES / "qwen3_next_80a3b_to_23a2b.yaml"

PUBLISHED = QWEN3_NEXT_80A3B.config
_SCALED_WITH_HIDDEN = (
    "head_dim linear_key_head_dim linear_value_head_dim moe_intermediate_size shared_expert_intermediate_size"
).split()
_TOP_K, _LEAST_EXPERTS = 4, 8


def scaled_config(layers: int, hidden_size: int, nbytes: float) -> dict[str, Any]:
    """config.json of a model of about ``nbytes`` bytes: the published sizes, a quarter of the vocabulary, few experts.

    Heads and widths keep their proportion to the hidden size; the number of experts is what the bytes allow.

    Raises:
        SlimError: a model of these layers and this width is larger even with the least experts.
    """
    base, scale = dict(PUBLISHED), hidden_size / PUBLISHED["hidden_size"]
    base.update({key: int(base[key] * scale) for key in _SCALED_WITH_HIDDEN})
    base.update(hidden_size=hidden_size, num_hidden_layers=layers, num_experts_per_tok=_TOP_K)
    base["vocab_size"] = int(base["vocab_size"] * scale) // 4

    def size(experts: int) -> int:
        return model_bytes(shape_of(base | {"num_experts": experts}))

    least = size(_LEAST_EXPERTS)
    each = size(_LEAST_EXPERTS + 1) - least
    if nbytes < least:
        raise SlimError(f"{layers} layers of hidden size {hidden_size} are at least {least / 1e9:.2f} GB")
    base["num_experts"] = _LEAST_EXPERTS + int(nbytes - least) // each // 2 * 2
    return base


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Sizes of a model with one MTP block."""
    return shape_from_hf_config(config, mtp_num_layers=1)


def demo_shapes() -> tuple[ModelShape, ModelShape]:
    """Teacher and student of `make demo`."""
    config = read_json(RECIPES.parent / "demo_teacher" / "config.json")
    student = {"num_hidden_layers": 6, "hidden_size": 144, "num_experts": 8, "num_experts_per_tok": 3}
    return shape_of(config), shape_of(config | student)


def model_bytes(shape: ModelShape) -> int:
    """Bytes of all weights, in bf16."""
    return count_parameters(shape).total * ITEMSIZE


def largest_layer_group(shape: ModelShape) -> int:
    """Bytes of the transformer block, or of the parameter outside the blocks, that is largest."""
    groups: dict[str, int] = {}
    for weight in weights(shape):
        group = weight.block or weight.key
        groups[group] = groups.get(group, 0) + weight.numel(shape) * ITEMSIZE
    return max(groups.values())


def write_model(directory: Path, config: Mapping[str, Any], *, sparse: bool) -> None:
    """Write a checkpoint of a config as published ones are: MTP tensors in the last shard, all others before it.

    Args:
        directory: created, with its parents.
        config: of a model with one MTP block.
        sparse: leave all weights out: they read as zeros and take no place. Else random values, finite and as good as
            incompressible.
    """
    directory.mkdir(parents=True)
    shards = plan_shards(shape_of(config))
    generator = np.random.Generator(np.random.SFC64(0))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(file, shard, None if sparse else generator)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": model_bytes(shape_of(config))}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(to_json(index))
    (directory / "config.json").write_text(to_json(dict(config)))


def plan_shards(shape: ModelShape) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of every shard's tensors."""
    tensors = {name: tensor.shape(shape) for name, tensor in hf_tensors(shape).items()}
    names = _as_modules_have_them(tensors)
    mtp = {name: tensors[name] for name in names if name.startswith("mtp.")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    left = MAX_SHARD_BYTES
    for name in names:
        if name in mtp:
            continue
        if shards[-1] and _nbytes(tensors[name]) > left:
            shards.append({})
            left = MAX_SHARD_BYTES
        shards[-1][name] = tensors[name]
        left -= _nbytes(tensors[name])
    return [*shards, mtp]


def _as_modules_have_them(names: Iterable[str]) -> list[str]:
    """Expert by expert, each with all of its matrices, as the published files are."""
    first: dict[str, int] = {}
    keys = {}
    for position, name in enumerate(names):
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+\.weight", name)
        group, expert = (match[1], int(match[2])) if match else (name, 0)
        keys[name] = (first.setdefault(group, position), expert, position)
    return sorted(keys, key=keys.__getitem__)


def _nbytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * ITEMSIZE


def _write_shard(file: Path, shard: Mapping[str, tuple[int, ...]], generator: np.random.Generator | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + _nbytes(shape)]}
        end += _nbytes(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if generator is None:
            stream.truncate(stream.tell() + end)
            return
        for block in _random_bf16(generator, end):
            stream.write(block)


def _random_bf16(generator: np.random.Generator, nbytes: int) -> Iterator[memoryview]:
    """Random signs, mantissas and low exponent bits; magnitudes from 2**-31 to 2."""
    clear, fill = np.uint64(0xBFFF_BFFF_BFFF_BFFF), np.uint64(0x3000_3000_3000_3000)
    while nbytes > 0:
        bits = generator.integers(0, 2**64, size=1 << 20, dtype=np.uint64)
        bits &= clear
        bits |= fill
        yield memoryview(bits).cast("B")[:nbytes]
        nbytes -= bits.nbytes


def write_statistics(checkpoint: Path, file: Path) -> None:
    """Statistics of a checkpoint as calibration would write them, with random values in them."""
    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.pruning.statistics import FORMAT, Statistics, expected_shapes
    from megatron_slim.streaming.fingerprint import fingerprint

    source, generator = open_checkpoint(checkpoint), np.random.default_rng(0)
    tensors = {key: generator.random(size, dtype=np.float32) for key, size in expected_shapes(source.shape)}
    tensors = {key: np.asarray(value, dtype=np.float32) for key, value in tensors.items()}
    Statistics(tensors, {"format": FORMAT, "source_sha256": fingerprint(source)}).save(file)


def write_recipe(config: Mapping[str, Any], file: Path) -> None:
    """The recipe of the published 80B -> 23B pruning, in proportion to this model."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    target, hidden_multiple = recipe["target"], 8
    layers, hidden, experts = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_experts"))
    target["num_layers"] = max(
        target["num_layers"] * layers // PUBLISHED["num_hidden_layers"], config["full_attention_interval"]
    )
    scaled = target["hidden_size"] * hidden // PUBLISHED["hidden_size"]
    target["hidden_size"] = scaled // hidden_multiple * hidden_multiple
    target["num_moe_experts"] = target["num_moe_experts"] * experts // PUBLISHED["num_experts"]
    target["moe_router_topk"] = min(target["moe_router_topk"], config["num_experts_per_tok"], target["num_moe_experts"])
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")


@dataclass(frozen=True)
class Needed:
    """What a direction must move at the least, in bytes.

    Attributes:
        kept: of the source, rows and columns that survive or are merged into others.
        rows: of the source, the same rows with all of their columns: a page of a row holds kept and dropped ones.
        written: of the result.
    """

    kept: int
    rows: int
    written: int


def needed_by_plan(plan_file: Path, itemsize: int = ITEMSIZE, *, merged: bool = True) -> Needed:
    """What applying a plan must move of tensors of one item size; ``merged`` or not, members of experts are read."""
    from megatron_slim.pruning.plan_reader import load_plan

    plan = load_plan(plan_file)
    shape, source = plan.target_shape, plan.source_shape
    kept = rows = 0
    for weight in weights(shape):
        block = plan.source_blocks[weight.block] if weight.stacked else ""
        members = sum(len(group.members) if merged else 1 for group in plan.experts[block]) if weight.stacked else 1
        for tensor in weight.sources:
            height, *columns = tensor.shape(shape)
            kept += members * height * math.prod(columns) * itemsize
            rows += members * height * math.prod(tensor.shape(source)[1:]) * itemsize
    return Needed(kept, rows, count_parameters(shape).total * itemsize)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory."""
    return dict(read_json(directory / "config.json"))
