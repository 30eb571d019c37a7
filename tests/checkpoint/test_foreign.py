"""What other programs rename or quantize: read where it is only a prefix, else refused with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_slim.checkpoint.convert import same_bytes, write_checkpoint
from megatron_slim.checkpoint.huggingface import CONFIG, SINGLE, HFCheckpoint
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape

TOOL = "tools/convert_checkpoint.py"
SHAPE = tiny_shape()
Tensors = dict[str, Tensor]


def write(directory: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / SINGLE, metadata=metadata)
    (directory / CONFIG).write_text(json.dumps({**tiny_hf_config(SHAPE), **config}))
    return directory


def renamed(*rules: tuple[str, str]) -> Tensors:
    """The model's tensors, their names with the first rule's prefix that fits replaced."""
    found = {}
    for name, tensor in random_tensors(SHAPE).items():
        new = next((to + name.removeprefix(old) for old, to in rules if name.startswith(old)), name)
        found[new] = tensor
    return found


# As a text model within a larger one, as a wrapper's state, as a compiled or adapted module's.
PREFIXES = {
    "model.language_model.": renamed(("model.", "model.language_model.")),
    "language_model.model.": renamed(("model.", "language_model.model."), ("", "language_model.")),
    "language_model.model., mtp outside": renamed(
        ("mtp.", "mtp."), ("model.", "language_model.model."), ("", "language_model.")
    ),
    "model.language_model., all within": renamed(("model.", "model.language_model."), ("", "model.language_model.")),
    "module.": renamed(("", "module.")),
    "_orig_mod.": renamed(("", "_orig_mod.")),
    "base_model.model.": renamed(("", "base_model.model.")),
    "model.": renamed(("", "model.")),
    "none in the trunk": renamed(("model.", "")),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_pure_prefix_is_read(tmp_path: Path, prefix: str) -> None:
    tensors = random_tensors(SHAPE)
    checkpoint = HFCheckpoint.open(write(tmp_path / "hf", PREFIXES[prefix]))
    assert set(checkpoint.names) == tensors.keys() and checkpoint.shape == SHAPE
    assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_what_is_written_has_plain_names_and_a_line_says_so(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write(tmp_path / "hf", PREFIXES["model.language_model."])
    line = f"{source}: tensors are named model.language_model.* here, and are written as model.*"
    for target, arguments in (("dist", ()), ("plain", ("--to", "hf"))):
        made = tool(TOOL, "--load", source, "--save", tmp_path / target, *arguments)
        assert made.code == 0 and made.stderr.splitlines().count(line) == 1
    found = load_file(tmp_path / "plain" / SINGLE)
    assert all(same_bytes(found.pop(name), tensor) for name, tensor in random_tensors(SHAPE).items()) and not found
    assert (
        "is a hf checkpoint already"
        in tool(TOOL, "--load", tmp_path / "plain", "--save", tmp_path / "x", "--to", "hf").error
    )


def test_a_prefix_and_fused_experts_together(tmp_path: Path) -> None:
    """As the files of larger models have it: a prefix, the trunk's experts fused, those of the MTP block not."""
    tensors = random_tensors(SHAPE)
    found = dict(PREFIXES["model.language_model."])
    for layer in range(SHAPE.num_layers):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        parts = [[found.pop(f"{experts}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")] for e in range(8)]
        found[f"{experts}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in parts])
        found[f"{experts}.down_proj"] = torch.stack([down for *_, down in parts])
    checkpoint = HFCheckpoint.open(write(tmp_path / "hf", found))
    assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    made = write_checkpoint(checkpoint, tmp_path / "out", to="hf")
    assert made["expert_storage"] == "mixed"
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "out" / SINGLE)


def _switch_mlp(tensors: Tensors) -> Tensors:
    """MLX's names: experts stacked, each projection of its own; convolutions transposed."""
    found = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            before, _, after = name.partition(".experts.")
            if after.startswith("0."):
                each = [tensors[f"{before}.experts.{e}.{after[2:]}"] for e in range(SHAPE.num_moe_experts)]
                found[f"{before}.switch_mlp.{after[2:]}"] = torch.stack(each)
        elif not name.startswith("mtp."):
            found[name] = tensor.transpose(1, 2).contiguous() if "conv1d" in name else tensor
    return found


def _other(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(2, 2).bfloat16() for name in names}


def _mixtral(tensors: Tensors) -> Tensors:
    return {name.replace(".mlp.experts.", ".block_sparse_moe.experts."): tensor for name, tensor in tensors.items()}


def _mixed(tensors: Tensors) -> Tensors:
    half = PREFIXES["model.language_model."]
    return {n: t for n, t in half.items() if "layers.2." not in n} | {
        n: t for n, t in tensors.items() if n.startswith("model.layers.2.")
    }


def _bare(tensors: Tensors) -> Tensors:
    """A base model, saved without its head."""
    return {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith(("model.", "mtp."))}


MLX = "is in MLX's layout: experts under switch_mlp.*norms of Qwen3-Next shifted by 1; get the checkpoint that it was"
ERRORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "MLX": (_switch_mlp, MLX),
    "vision tower": (
        lambda t: _other("model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.weight")(
            PREFIXES["model.language_model."]
        ),
        r"2 tensors of a vision or audio part, which is not supported: model\.visual\.blocks\.0.*; save its language",
    ),
    "vision tower next to plain names": (_other("vision_tower.x.weight"), r"1 tensors of a vision .*vision_tower\.x"),
    "two towers": (
        _other("visual.a.weight", "audio_tower.b.weight"),
        r"2 tensors of .*: audio_tower\.b\.weight, visual\.a\.weight",
    ),
    "two models": (
        lambda t: {f"{outer}.{n}": v.clone() for outer in ("a", "b") for n, v in t.items()},
        r"several language models: a\.model\.embed_tokens\.weight, b\.model\.embed_tokens\.weight",
    ),
    "half a prefix": (_mixed, r"only some tensors carry the prefix 'model\.language_model\.': model\.layers\.2\..* do"),
    "a prefix twice": (
        lambda t: PREFIXES["module."] | {"lm_head.weight": t["lm_head.weight"].clone()},
        r"tensors that are one without their prefix: lm_head\.weight and module\.lm_head\.weight",
    ),
    "no head": (_bare, r"1 missing tensors: lm_head\.weight; the checkpoint"),
    "names of another model": (
        _mixtral,
        r"missing tensors: model\.layers\.0\.mlp\.experts\.0.*extra tensors: .*block_sparse_moe.*another program lays",
    ),
    "GPTQ that config.json does not state": (
        _other("model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.q_proj.scales"),
        r"quantized weights, and config.json does not say how: model\.layers\.0\.self_attn\.q_proj\.qweight",
    ),
    "compressed": (_other("model.layers.0.self_attn.q_proj.weight_packed"), "quantized weights, and config.json does"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_the_message_says_what_it_is(tmp_path: Path, case: str) -> None:
    change, message = ERRORS[case]
    path = write(tmp_path / "hf", change(random_tensors(SHAPE)))
    with pytest.raises(CheckpointError, match=message) as caught:
        HFCheckpoint.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_few_tensors_of_other_names_are_named(tmp_path: Path) -> None:
    """Stacked by another program: far fewer tensors than experts."""
    found = {n.replace("switch_mlp", "moe"): t for n, t in _switch_mlp(random_tensors(SHAPE)).items()}
    message = r"15 of \d+ tensors have names that no qwen3_next has: model\.layers\.0\.mlp\.moe\.down_proj.* 11 more"
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint.open(write(tmp_path / "hf", found, num_experts=64))


def test_what_mlx_has_saved_is_refused_under_any_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MLX):
        HFCheckpoint.open(write(tmp_path / "hf", random_tensors(SHAPE), {"format": "mlx"}))


MLX_BITS = {"group_size": 64, "bits": 4, "mode": "affine"}
GATE = {"model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}}
QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "MLX": (
        {"quantization": MLX_BITS | GATE, "quantization_config": MLX_BITS | GATE},
        r"quantization: weights quantized with MLX \(group_size 64, bits 4, mode 'affine'\)",
    ),
    "MLX, one key": (
        {"quantization_config": {"group_size": 64, "bits": 4}},
        r"quantized with MLX \(group_size 64, bits",
    ),
    "MLX, layers left out": ({"quantization": {"group_size": 64, "bits": 4, "lm_head.x": False}}, "with MLX"),
    "GPTQ of old": (
        {"quantization_config": {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}},
        r"quantized with a method that it does not name \(bits 4, group_size 128, desc_act True, sym True\)",
    ),
    "ModelOpt": ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantized with 'NVFP4'"),
    "torchao": ({"quantization_config": {"quant_type": "int4_weight_only"}}, "quantized with 'int4_weight_only'"),
    "compressed-tensors of old": (
        {"compression_config": {"quant_method": "sparseml"}},
        "compression_config: .*'sparseml'",
    ),
    "nothing stated": ({"quantization_config": {}}, r"a method that it does not name \(no settings\)"),
    "method a number": ({"quantization_config": {"quant_method": 4}}, "a method that it does not name"),
    "FP8 in a section": (
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        "text_config.quantization_config: weights quantized with 'fp8'",
    ),
    "FP8 under another key": ({"quantization": {"quant_method": "fp8"}}, "quantization: weights quantized with 'fp8'"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dequantize", [False, True])
def test_quantization_is_named(tmp_path: Path, kind: str, dequantize: bool) -> None:
    config, message = QUANTIZED[kind]
    path = write(tmp_path / "hf", {"x": torch.zeros(1)}, **config)
    with pytest.raises(SlimError, match=f"{message}.*use the checkpoint in bf16 that they were made of"):
        HFCheckpoint.open(path, dequantize_fp8=dequantize)


@pytest.mark.parametrize("name", ["weights.npz", "weights.00.npz", "tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_other_frameworks_files(tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(tiny_hf_config(SHAPE)))
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="holds only weights of "):
        HFCheckpoint.open(tmp_path)
