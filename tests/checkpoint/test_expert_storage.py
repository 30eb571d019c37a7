"""Experts fused and one by one: against transformers' own parameters, through every direction, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.expert_storage import expert_blocks, separated
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE, HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import HFWriter, finish_hf_checkpoint, specs_of, start_hf_checkpoint
from megatron_slim.checkpoint.records import STORAGE
from megatron_slim.checkpoint.units import units
from megatron_slim.errors import CheckpointError
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape, write_tiny_checkpoint

TOOL = "tools/convert_checkpoint.py"
SHAPE = tiny_shape(moe_ffn_hidden_size=24, num_moe_experts=5)  # no two dimensions of a fused tensor are equal
TRUNK, MTP = frozenset(f"model.layers.{layer}" for layer in range(4)), frozenset({"mtp.layers.0"})
FORMS = {"all": TRUNK | MTP, "trunk": TRUNK, "MTP": MTP, "two layers": frozenset({"model.layers.1", "model.layers.3"})}
Tensors = dict[str, Tensor]


def fused(tensors: Tensors, blocks: Collection[str]) -> Tensors:
    """Experts of these blocks as transformers 5 has them: [experts, gate then up, hidden], [experts, hidden, ffn]."""
    found = dict(tensors)
    for block in blocks:
        experts = f"{block}.mlp.experts"
        count = sum(name.startswith(f"{experts}.") and name.endswith(".up_proj.weight") for name in tensors)
        parts = [
            {part: found.pop(f"{experts}.{expert}.{part}_proj.weight") for part in ("gate", "up", "down")}
            for expert in range(count)
        ]
        found[f"{experts}.gate_up_proj"] = torch.stack([torch.cat([part["gate"], part["up"]]) for part in parts])
        found[f"{experts}.down_proj"] = torch.stack([part["down"] for part in parts])
    return found


def write(directory: Path, tensors: Tensors, shape: ModelShape = SHAPE, **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps({**tiny_hf_config(shape), **config}))
    return directory


def on_disk(directory: Path) -> Tensors:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(same_bytes(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_parameters_are_read_expert_by_expert(tmp_path: Path, family: str) -> None:
    """What it has in memory, saved as it is; and it loads what is written fused."""
    transformers = pytest.importorskip("transformers")
    shape = tiny_shape(family, moe_ffn_hidden_size=24, num_moe_experts=5, mtp_num_layers=0)
    float32 = ("mlp.gate.weight",) if family == "glm4_moe" else ()  # as transformers has it in memory
    separate = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "separate", shape, float32=float32))
    model = transformers.AutoModelForCausalLM.from_pretrained(separate.path, dtype=torch.bfloat16)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert state["model.layers.1.mlp.experts.gate_up_proj"].shape == (5, 48, 64)
    checkpoint = HFCheckpoint.open(write(tmp_path / "memory", state, shape))
    assert checkpoint.fused_blocks == expert_blocks(shape) == set(shape.routed_blocks)
    assert (checkpoint.names, checkpoint.dtypes) == (separate.names, separate.dtypes)
    assert all(same_bytes(checkpoint.read(name), separate.read(name)) for name in separate.names)
    assert fingerprint(checkpoint) == fingerprint(separate)
    write_checkpoint(separate, tmp_path / "written", to="hf", expert_storage="fused")
    assert_equal(on_disk(tmp_path / "written"), state)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "written", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values())
    assert_equal(dict(again.state_dict()), state)


@pytest.mark.parametrize("form", FORMS)
def test_every_direction_follows_the_source_block_by_block(tmp_path: Path, form: str) -> None:
    tensors = random_tensors(SHAPE)
    files = fused(tensors, FORMS[form])
    source = HFCheckpoint.open(write(tmp_path / "hf", files))
    assert source.fused_blocks == FORMS[form]
    assert_equal({name: source.read(name) for name in source.names}, tensors)
    there = write_checkpoint(source, tmp_path / "torch_dist", to="torch_dist")
    distributed = open_checkpoint(tmp_path / "torch_dist")
    back = write_checkpoint(distributed, tmp_path / "back", to="hf", processes=2)
    assert_equal(on_disk(tmp_path / "back"), files)
    assert (tmp_path / "back" / CONFIG).read_bytes() == (tmp_path / "torch_dist" / "hf" / CONFIG).read_bytes()
    assert not (tmp_path / "back" / STORAGE).exists()
    expected = "fused" if form == "all" else "mixed"
    assert there["expert_storage"] == back["expert_storage"] == expected
    plain = write_checkpoint(distributed, tmp_path / "separate", to="hf", expert_storage="separate")
    assert_equal(on_disk(tmp_path / "separate"), tensors)
    assert plain["content"] == back["content"] == there["content"] and plain["expert_storage"] == "separate"
    one_by_one = HFCheckpoint.open(tmp_path / "separate")
    assert hf_to_torch_dist(tmp_path / "separate", tmp_path / "again")["content"] == there["content"]
    assert not (tmp_path / "again" / "hf" / STORAGE).exists() and not one_by_one.fused_blocks


def test_rows_and_columns_of_an_expert(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE)
    checkpoint = HFCheckpoint.open(write(tmp_path / "hf", fused(tensors, TRUNK)))
    rows, columns = np.array([7, 3, 4, 0, 23]), torch.tensor([13, 0, 5])
    for part in ("gate", "up", "down"):
        name = f"model.layers.2.mlp.experts.4.{part}_proj.weight"
        assert same_bytes(checkpoint.read_rows(name, rows, columns), tensors[name][rows][:, columns].contiguous())
        assert same_bytes(checkpoint.read_rows(name, rows), tensors[name][rows])


def test_types_of_their_own_in_fused_tensors(tmp_path: Path) -> None:
    tensors = {
        name: tensor.float() if "layers.0.mlp.experts" in name and "down" not in name else tensor
        for name, tensor in random_tensors(SHAPE).items()
    }
    source = HFCheckpoint.open(write(tmp_path / "hf", tensors))
    write_checkpoint(source, tmp_path / "fused", to="hf", expert_storage="fused")
    assert_equal(on_disk(tmp_path / "fused"), fused(tensors, expert_blocks(SHAPE)))
    cast = HFCheckpoint.open(tmp_path / "fused")
    write_checkpoint(cast, tmp_path / "cast", to="hf", dtype=torch.float16)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    assert_equal(on_disk(tmp_path / "cast"), fused(halves, expert_blocks(SHAPE)))


def test_a_fused_tensor_is_never_whole_in_memory_nor_bound_to_a_shard_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = tiny_shape(moe_ffn_hidden_size=64, num_moe_experts=8, vocab_size=16)
    tensors = random_tensors(shape)
    files = fused(tensors, expert_blocks(shape))
    source = HFCheckpoint.open(write(tmp_path / "hf", files, shape))
    largest = max(tensor.nbytes for tensor in files.values())
    moved: list[int] = []
    preadv, pwrite = os.preadv, os.pwrite

    def reading(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        moved.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset, *flags)

    def writing(descriptor: int, data: Any, offset: int) -> int:
        moved.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(os, "pwrite", writing)
    directory = tmp_path / "written"
    directory.mkdir()
    blocks = expert_blocks(shape)
    stored = start_hf_checkpoint(directory, specs_of(shape, source.dtypes, blocks), max_shard_bytes=largest // 2)
    writer = HFWriter(separated(stored, shape, {}, directory)[0])
    for unit in units(shape, source.dtypes):
        content = unit.read(source)
        writer.write(unit, content)
        assert unit.digest(writer.read(unit)) == unit.digest(content)
    writer.finish()
    finish_hf_checkpoint(directory, source.config)
    assert_equal(on_disk(directory), files)
    assert HFCheckpoint.open(directory).fused_blocks == blocks and (directory / INDEX).is_file()
    assert max(moved) == max(tensor.nbytes for tensor in tensors.values()) < largest // 4


def test_the_option_and_what_a_torch_dist_remembers(tmp_path: Path, tool: Callable[..., Any]) -> None:
    tensors = random_tensors(SHAPE)
    source = write(tmp_path / "hf", tensors)
    files = fused(tensors, expert_blocks(SHAPE))
    same = tool(TOOL, "--load", source, "--save", tmp_path / "same", "--to", "hf", "--expert-storage", "fused")
    assert same.code == 0 and "as hf (experts fused), read back and verified" in same.stderr
    assert_equal(on_disk(tmp_path / "same"), files)
    there = tool(TOOL, "--load", source, "--save", tmp_path / "dist", "--expert-storage", "fused", "--json")
    assert there.json["expert_storage"] == "fused"
    assert tool(TOOL, "--load", tmp_path / "dist", "--save", tmp_path / "back").code == 0
    assert_equal(on_disk(tmp_path / "back"), files)
    record = tmp_path / "dist" / "hf" / STORAGE
    for content in ("[]", '{"fused_experts": 1}', '{"fused_experts": [1]}', "{"):
        record.write_text(content)
        assert str(record) in tool(TOOL, "--load", tmp_path / "dist", "--save", tmp_path / "x").error
    record.write_text('{"fused_experts": ["mtp.layers.0", "model.layers.99"]}')  # not in the model any more
    assert tool(TOOL, "--load", tmp_path / "dist", "--save", tmp_path / "some").code == 0
    assert_equal(on_disk(tmp_path / "some"), fused(tensors, MTP))


GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{part}_proj" for part in ("gate_up", "down"))


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def _both(tensors: Tensors) -> Tensors:
    one = {name: t for name, t in random_tensors(SHAPE).items() if name.startswith("model.layers.1.mlp.experts.3.")}
    return tensors | one


def _one_projection(tensors: Tensors) -> Tensors:
    down = {name: t for name, t in random_tensors(SHAPE).items() if "layers.1.mlp" in name and "down_proj" in name}
    return _without(DOWN)(tensors) | down


def _transposed(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name].transpose(1, 2).contiguous() for name in names}


ERRORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "both": (_both, r"experts both fused and one by one in model\.layers\.1;"),
    "one projection fused": (_one_projection, r"experts both fused and one by one in model\.layers\.1;"),
    "no down": (_without(DOWN), rf"half of the fused experts is missing: {DOWN}"),
    "no gate and up": (_without(GATE_UP), rf"half of the fused experts is missing: {GATE_UP}"),
    "none": (_without(GATE_UP, DOWN), r"15 missing tensors: model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight"),
    "transposed": (
        _transposed(*(f"{block}.mlp.experts.{part}_proj" for block in TRUNK | MTP for part in ("gate_up", "down"))),
        r"fused experts that are stored transposed: .*\[5, 64, 48\], config.json says \[5, 48, 64\].*as transformers 5",
    ),
    "an expert less": (
        lambda tensors: tensors | {GATE_UP: tensors[GATE_UP][:4].contiguous()},
        rf"1 wrong shapes of fused experts: {GATE_UP} \[4, 48, 64\], config.json says \[5, 48, 64\]",
    ),
    "two dimensions": (lambda tensors: tensors | {DOWN: tensors[DOWN][0].contiguous()}, rf"{DOWN} \[64, 24\], config"),
    "mixed types": (lambda tensors: tensors | {DOWN: tensors[DOWN].to(torch.float64)}, rf"unsupported types: {DOWN}"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_block(tmp_path: Path, case: str) -> None:
    change, message = ERRORS[case]
    path = write(tmp_path / "hf", change(fused(random_tensors(SHAPE), TRUNK | MTP)))
    with pytest.raises(CheckpointError, match=message) as caught:
        HFCheckpoint.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_square_that_is_transposed_is_known_by_the_other(tmp_path: Path) -> None:
    shape = tiny_shape()  # gate and up together are as wide as the model
    tensors = fused(random_tensors(shape), expert_blocks(shape))
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()}
    with pytest.raises(CheckpointError, match="stored transposed"):
        HFCheckpoint.open(write(tmp_path / "hf", turned, shape))


def test_fp8_experts_fused(tmp_path: Path) -> None:
    """As transformers 5 has them in memory: the scales of all experts in one tensor next to the weights."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    generator, block = torch.Generator().manual_seed(0), [8, 40]
    tensors: Tensors = {}
    for name, tensor in random_tensors(SHAPE).items():
        tensors[name] = tensor
        if ".experts." in name:
            scales = [-(-extent // step) for extent, step in zip(tensor.shape, block, strict=True)]
            tensors[name] = torch.randn(tensor.shape, generator=generator).mul(60).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(scales, generator=generator)
    together = fused({n: t for n, t in tensors.items() if "_scale_inv" not in n}, TRUNK)
    scales = {n.removesuffix("_scale_inv"): t for n, t in tensors.items() if "_scale_inv" in n}
    together |= {f"{n}_scale_inv": t for n, t in fused(scales, TRUNK).items()}
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    separate = HFCheckpoint.open(
        write(tmp_path / "separate", tensors, quantization_config=quantization), dequantize_fp8=True
    )
    path = write(tmp_path / "fused", together, quantization_config=quantization)
    checkpoint = HFCheckpoint.open(path, dequantize_fp8=True)
    assert checkpoint.fused_blocks == TRUNK
    assert all(same_bytes(checkpoint.read(name), separate.read(name)) for name in separate.names)
    theirs = _dequantize_fp8_weight(together[GATE_UP], together[f"{GATE_UP}_scale_inv"], block, torch.float32)
    for expert, rows, part in ((4, slice(0, 24), "gate"), (2, slice(24, 48), "up")):
        name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        assert same_bytes(checkpoint.read(name), theirs[expert, rows].bfloat16())
    for config, message in (
        ({"weight_block_size": [16, 40]}, r"gate_up_proj_scale_inv \[5, 6, 2\]: not the scales of \[5, 48, 64\]"),
        ({"weight_block_size": [7, 40]}, "not the scales of"),
    ):
        (path / CONFIG).write_text(json.dumps(tiny_hf_config(SHAPE) | {"quantization_config": quantization | config}))
        with pytest.raises(CheckpointError, match=message):
            HFCheckpoint.open(path, dequantize_fp8=True)
    shared = {n: t[:, :3].contiguous() if n.endswith("gate_up_proj_scale_inv") else t for n, t in together.items()}
    both = write(tmp_path / "shared", shared, quantization_config=quantization | {"weight_block_size": [16, 40]})
    with pytest.raises(CheckpointError, match="gate and up share blocks of 16 rows of FP8 scales"):
        HFCheckpoint.open(both, dequantize_fp8=True)
