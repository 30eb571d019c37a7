"""Block-scaled FP8, written: against the definition in fp64, against transformers, and as clients look for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_slim.architecture.published import QWEN3_NEXT_80A3B
from megatron_slim.architecture.shape import FAMILIES, ModelShape, unused_fields
from megatron_slim.architecture.table import hf_tensors
from megatron_slim.checkpoint import units
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, same_bytes, write_checkpoint
from megatron_slim.checkpoint.fp8_writer import BLOCK, quantization_config, quantize
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE, HFCheckpoint
from megatron_slim.checkpoint.records import QUANTIZATION_REPORT, REFERENCE
from megatron_slim.checkpoint.reference import Reference
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint

FP8 = torch.float8_e4m3fn
CONVERT = "tools/convert_checkpoint.py"
WHOLE = {"hidden_size": 256, "moe_ffn_hidden_size": 128, "num_attention_heads": 4, "kv_channels": 64}
WHOLE_NEXT = {"moe_shared_expert_intermediate_size": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
WHOLE_NEXT |= {"ffn_hidden_size": 256}


def whole_blocks(family: str) -> ModelShape:
    """Sizes of which every matrix is made of whole blocks; those that the family has."""
    absent = unused_fields(FAMILIES[family])
    return tiny_shape(family, **{name: size for name, size in (WHOLE | WHOLE_NEXT).items() if name not in absent})


SHAPES = {family: tiny_shape(family, hidden_size=192, moe_ffn_hidden_size=144) for family in FAMILIES}
SHAPES |= {f"{family}, whole blocks": whole_blocks(family) for family in FAMILIES}
SHAPE = SHAPES["qwen3_next"]


def e4m3() -> npt.NDArray[np.float64]:
    """All finite numbers that are not negative, by the definition, in the order of their codes."""
    codes = np.arange(0x7F)
    exponent, fraction = codes >> 3, (codes & 7) / 8
    return np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))


def nearest(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Codes of the nearest numbers, of two as near the one with the even code."""
    table, size = e4m3(), np.abs(values)
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    down, up = size - table[above - 1], table[above] - size
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return (code | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def quantized_by_hand(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Block by block: codes and scales."""
    values = weight.double().numpy()
    rows, columns = (-(-extent // step) for extent, step in zip(values.shape, block, strict=True))
    codes, scales = np.zeros(values.shape, np.uint8), np.ones((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1]))
            if amax := np.abs(values[part]).max():
                scales[row, column] = np.float32(amax) / np.float32(448)
            quotient = values[part].astype(np.float32) / scales[row, column]
            codes[part] = nearest(quotient.astype(np.float64))
    return codes, scales


def assert_quantized(weight: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> None:
    expected = quantized_by_hand(weight, block)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(data=st.data())
def test_any_shape_any_block_any_size_of_numbers(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** data.draw(st.integers(-30, 30))
    weight = weight.to(data.draw(st.sampled_from([torch.bfloat16, torch.float32])))
    codes, scale = quantize(weight, block)
    assert (codes.dtype, scale.dtype) == (FP8, torch.float32)
    assert_quantized(weight, codes, scale, block)


def test_blocks_of_zeros_and_of_the_smallest_numbers() -> None:
    weight = torch.zeros(300, 200)
    weight[:128, :128] = -0.0
    weight[128:256] = 1e-44  # whose scale would be zero
    weight[256:, 150] = 8.8e-43  # whose scale is subnormal, and so far below amax / 448 that the quotient is 628
    codes, scale = quantize(weight)
    assert scale[:2].tolist() == [[1.0, 1.0], [1.0, 1.0]] and scale[2, 0] == 1
    assert not codes[:256].float().any() and torch.isfinite(codes.float()).all()
    assert codes[256:, 150].float().max() == 448


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_agrees_with_transformers(scale: float) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config(weight_block_size=BLOCK)

    weight = (torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * scale).bfloat16()
    weight[128:, :128] = 0
    codes, scales = quantize(weight)
    theirs = Fp8Quantize(Quantizer())._quantize_one("x.weight", weight)
    # They round 448 / amax and then its inverse: two more roundings of fp32. A weight at a tie, as many in bf16 are,
    # may have another number for it, which is as near.
    torch.testing.assert_close(scales, theirs["x.weight_scale_inv"], rtol=2**-22, atol=0)
    assert (codes.view(torch.int8).int() - theirs["x.weight"].view(torch.int8).int()).abs().max() <= 1
    wide, exact = scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1), weight.double()
    ours, others = ((found.double() * wide - exact).abs() for found in (codes, theirs["x.weight"]))
    assert ((ours - others).abs() <= exact.abs() * 2**-21).all()
    back = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    # Half of the last place of E4M3, then half of that of bf16; of numbers below its normal ones, half of the smallest.
    bound = torch.maximum(exact.abs() * 2**-4, wide * 2**-10) * (1 + 2**-6)
    assert ((back.double() - exact).abs() <= bound).all()


@pytest.fixture(scope="module", params=SHAPES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelShape, Path, Path, dict[str, Any]]:
    """A shape, its checkpoint in bf16, the one in FP8, and what the conversion said."""
    shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("fp8")
    source = write_tiny_checkpoint(folder / "hf", shape)
    result = write_checkpoint(HFCheckpoint.open(source), folder / "fp8", to="hf", quantize="fp8")
    return shape, source, folder / "fp8", result


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / SINGLE)


def is_quantized(name: str) -> bool:
    """By what a person knows about the published names; the table is not asked."""
    if name.endswith("eh_proj.weight"):  # GLM's, of the MTP block
        return False
    return name.endswith(("_proj.weight", ".in_proj_qkvz.weight", ".in_proj_qkv.weight", ".in_proj_z.weight"))


def test_every_byte(written: tuple[ModelShape, Path, Path, dict[str, Any]]) -> None:
    shape, source, path, result = written
    before, after = HFCheckpoint.open(source), tensors_of(path)
    for name in before.names:
        weight, found = before.read(name), after.pop(name)
        if is_quantized(name):
            assert_quantized(weight, found, after.pop(f"{name}_scale_inv"))
        else:
            assert same_bytes(found, weight), name
    assert not after
    assert result["bytes"] == sum(tensor.nbytes for tensor in tensors_of(path).values())
    assert result["expert_storage"] == "separate" and result["verified"]
    config = json.loads((path / CONFIG).read_text())
    assert config.pop("quantization_config") == quantization_config(shape)
    assert config == HFCheckpoint.open(source).config


def test_reads_back_as_scale_times_number(written: tuple[ModelShape, Path, Path, dict[str, Any]]) -> None:
    shape, _, path, _ = written
    found, raw = HFCheckpoint.open(path, dequantize_fp8=True), tensors_of(path)
    others = [name for name, dtype in found.dtypes.items() if dtype != torch.bfloat16]
    assert found.shape == shape and all(name.endswith("e_score_correction_bias") for name in others)
    for name in filter(is_quantized, found.names):
        scale = raw[f"{name}_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        rows, columns = raw[name].shape
        # The product of 4 and 24 bits is exact in fp64; rounded to fp32, then to bf16, as the format says.
        exact = raw[name].double() * scale[:rows, :columns]
        assert same_bytes(found.read(name), exact.float().bfloat16()), name


def test_errors_are_those_of_what_reads_back(written: tuple[ModelShape, Path, Path, dict[str, Any]]) -> None:
    _, source, path, result = written
    before, after = HFCheckpoint.open(source), HFCheckpoint.open(path, dequantize_fp8=True)
    errors = {}
    for name in filter(is_quantized, before.names):
        exact, found = before.read(name).double(), after.read(name).double()
        errors[name] = float((found - exact).norm() / exact.norm()), float((found - exact).abs().max())
    quantization = result["quantization"]
    worst = max(errors, key=lambda name: errors[name][0])
    assert quantization["worst"]["tensor"] == worst and quantization["tensors"] == len(errors)
    reported = quantization["worst"]["relative_rms"], quantization["worst"]["max"]
    assert reported == pytest.approx(errors[worst], rel=1e-3)  # it is given with 4 digits
    ups = [rms for name, (rms, _) in errors.items() if ".experts." in name and name.endswith("up_proj.weight")]
    assert quantization["relative_rms"]["mlp.experts.*.up_proj"] == pytest.approx(np.mean(ups), rel=1e-3)
    lines = [line.strip("| ").split(" | ") for line in (path / QUANTIZATION_REPORT).read_text().splitlines()]
    rows = {line[0]: [float(number) for number in line[1:]] for line in lines if len(line) == 5 and line[1].isdigit()}
    query = next(name for name in errors if name.endswith("q_proj.weight"))
    rms, largest = errors[query]
    assert rows[query.removesuffix(".weight")] == pytest.approx([1, rms, rms, largest], rel=1e-3)
    layer = [errors[name] for name in errors if name.startswith("model.layers.1.mlp.experts.") and "down" in name]
    figures = np.array(layer)
    expected = [8, figures[:, 0].mean(), *figures.max(axis=0)]
    assert rows["model.layers.1.mlp.experts.*.down_proj"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.one_case
def test_both_formats_and_any_division_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[ModelShape, Path, Path, dict[str, Any]]
) -> None:
    _, source, path, result = written
    hf_to_torch_dist(source, tmp_path / "dist")
    monkeypatch.setattr(units, "UNIT_BYTES", 10_000)  # large weights in parts
    options: dict[str, dict[str, Any]] = {"hf": {"processes": 1}, "dist": {"processes": 3, "verify": False}}
    for name, directory in (("hf", source), ("dist", tmp_path / "dist")):
        checkpoint = open_checkpoint(directory)
        again = write_checkpoint(checkpoint, tmp_path / f"from {name}", to="hf", quantize="fp8", **options[name])
        for file in (SINGLE, CONFIG, QUANTIZATION_REPORT):
            assert (tmp_path / f"from {name}" / file).read_bytes() == (path / file).read_bytes(), (name, file)
        assert again["quantization"] == result["quantization"]


def test_rows_of_a_large_weight_end_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a weight that ended within a block would have a scale of its own."""
    monkeypatch.setattr(units, "UNIT_BYTES", 10_000)
    shape = tiny_shape(hidden_size=320)
    todo = units.units(shape, dict.fromkeys(hf_tensors(shape), torch.bfloat16), row_multiple=128)
    divided = [unit for unit in todo if unit.rows is not None]
    assert any("o_proj" in name for unit in divided for name, _ in unit.tensors)
    assert all(unit.rows is not None and unit.rows.start % 128 == 0 for unit in divided)


def test_fused_experts_are_written_one_by_one(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    write_checkpoint(HFCheckpoint.open(plain), tmp_path / "fused", to="hf", expert_storage="fused")
    for name in ("hf", "fused"):
        source = HFCheckpoint.open(tmp_path / name)
        made = write_checkpoint(source, tmp_path / f"{name} fp8", to="hf", quantize="fp8")
        assert made["expert_storage"] == "separate"
    assert (tmp_path / "fused fp8" / SINGLE).read_bytes() == (tmp_path / "hf fp8" / SINGLE).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_become_bf16_and_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", SHAPE, dtype=dtype))
    write_checkpoint(source, tmp_path / "fp8", to="hf", quantize="fp8")
    found = HFCheckpoint.open(tmp_path / "fp8", dequantize_fp8=True)
    assert set(found.dtypes.values()) == {torch.bfloat16} and found.config["torch_dtype"] == "bfloat16"
    raw = tensors_of(tmp_path / "fp8")
    for name in source.names:
        if is_quantized(name):  # of the source's own numbers, not of those rounded to bf16
            assert_quantized(source.read(name), raw[name], raw[f"{name}_scale_inv"])
        else:
            assert same_bytes(raw[name], source.read(name).bfloat16())


def test_what_stays_in_fp32_stays(tmp_path: Path) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", SHAPE, float32=(".A_log", "layernorm.weight")))
    write_checkpoint(source, tmp_path / "fp8", to="hf", quantize="fp8")
    types = HFCheckpoint.open(tmp_path / "fp8", dequantize_fp8=True).dtypes
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {n for n in types if "A_log" in n}


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", SHAPE))
    from megatron_slim.checkpoint import huggingface_writer

    monkeypatch.setattr(huggingface_writer.start_hf_checkpoint, "__kwdefaults__", {"max_shard_bytes": 300_000})
    write_checkpoint(source, tmp_path / "fp8", to="hf", quantize="fp8")
    index = json.loads((tmp_path / "fp8" / INDEX).read_text())
    shards = {name: load_file(tmp_path / "fp8" / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 5
    assert {name: shard for shard, found in shards.items() for name in found} == index["weight_map"]
    nbytes = [tensor.nbytes for found in shards.values() for tensor in found.values()]
    assert index["metadata"]["total_size"] == sum(nbytes)
    assert "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv" in index["weight_map"]


def test_a_model_in_fp8_does_not_keep_the_losses_of_its_source(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    Reference.of([[1, 2, 3]], [[0.5, 0.5]], "bfloat16").save(source)
    assert tool(CONVERT, "--load", source, "--save", tmp_path / "dist").code == 0
    made = tool(CONVERT, "--load", source, "--save", tmp_path / "fp8", "--quantize", "fp8", "--json")
    assert made.code == 0 and made.json["format"] == "hf"
    assert (tmp_path / "dist" / REFERENCE).exists() and not (tmp_path / "fp8" / REFERENCE).exists()


def test_the_tool_says_what_was_lost_and_what_clients_may_refuse(tmp_path: Path, tool: Callable[..., Any]) -> None:
    for name, partial in (("qwen3_next", True), ("qwen3_next, whole blocks", False)):
        source = write_tiny_checkpoint(tmp_path / name, SHAPES[name])
        made = tool(CONVERT, "--load", source, "--save", tmp_path / f"{name} fp8", "--quantize", "fp8")
        assert "tensors in FP8, relative RMS error 2." in made.stderr
        assert ("not made of whole blocks" in made.stderr) == partial


def test_the_tool_names_what_it_rounds(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE, float32=("A_log", "model.norm.weight"))
    made = tool(CONVERT, "--load", source, "--save", tmp_path / "fp8", "--quantize", "fp8")
    total = len(hf_tensors(SHAPE))
    assert f"conversion: rounds to bfloat16 1 of {total} tensors from float32 (model.norm.weight), of" in made.stderr


# --- what clients look for ---


def published_modules() -> Iterator[str]:
    """``modules_to_not_convert`` of Qwen3-Next-80B-A3B-Instruct-FP8, layer by layer as published."""
    yield "lm_head"
    linear = [f"linear_attn.{name}" for name in ("A_log", "conv1d", "dt_bias", "in_proj_ba", "norm")]
    gates, norms = ["mlp.gate", "mlp.shared_expert_gate"], ["self_attn.k_norm", "self_attn.q_norm"]
    for layer in range(48):
        full = layer % 4 == 3
        names = ["input_layernorm", *([] if full else linear), *gates, "post_attention_layernorm"]
        yield from (f"model.layers.{layer}.{name}" for name in [*names, *(norms if full else [])])
    yield "mtp.fc"
    yield from (f"mtp.layers.0.{name}" for name in ["input_layernorm", *gates, "post_attention_layernorm", *norms])
    yield from ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")


def test_config_is_the_published_one() -> None:
    assert quantization_config(QWEN3_NEXT_80A3B.shape) == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": list(published_modules()),
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_looks_for_the_same_layers_in_fp8(name: str) -> None:
    """By its own rule for names, over its own model: linear layers, and fused experts as a whole."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.quantizers_utils import should_convert_module

    shape = SHAPES[name]
    config = AutoConfig.for_model(**tiny_hf_config(shape))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = quantization_config(shape)["modules_to_not_convert"]
    theirs = {
        module
        for module, found in model.named_modules()
        if (type(found) is torch.nn.Linear or module.endswith(".experts")) and should_convert_module(module, kept)
    }
    ours = {tensor.removesuffix(".weight") for tensor in hf_tensors(shape) if is_quantized(tensor)}
    ours = {module.split(".experts.")[0] + ".experts" if ".experts." in module else module for module in ours}
    assert theirs == {module for module in ours if shape.family.mtp_depth(f"{module}.", shape.num_layers) is None}


_JOINED = ("_qkvz", "_ba", "_qkv", "_z", "_b", "_a")


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_looks_for_the_same_layers_in_fp8(name: str) -> None:
    """A layer that joins several is skipped where all of them are listed, word for word; some of them are an error."""
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    joined |= {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}
    kept = set(quantization_config(SHAPES[name])["modules_to_not_convert"])
    modules = {tensor.removesuffix(".weight") for tensor in hf_tensors(SHAPES[name])}
    linear = {module for module in modules if module.endswith(("_proj", *_JOINED, "gate", "mtp.fc", "lm_head"))}
    for parts in joined.values():
        for module in [module for module in linear if module.endswith(f".{parts[0]}")]:
            others = [module.removesuffix(parts[0]) + part for part in parts]
            assert len({other in kept for other in others if other in modules}) == 1
    assert {module for module in linear if module not in kept} == {m for m in linear if is_quantized(f"{m}.weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_weight(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it dequantizes; all blocks must be whole, because it takes their size from the number of scales."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)  # only GPUs need it
    shape = SHAPES[f"{family}, whole blocks"]
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", shape))
    made = write_checkpoint(source, tmp_path / "fp8", to="hf", quantize="fp8")
    assert made["quantization"]["partial_blocks"] == 0
    write_checkpoint(HFCheckpoint.open(tmp_path / "fp8", dequantize_fp8=True), tmp_path / "bf16", to="hf")
    found, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, output_loading_info=True
    )
    unexpected = loading.pop("unexpected_keys")
    assert not any(loading.values())
    assert all(shape.family.mtp_depth(name, shape.num_layers) == 0 for name in unexpected)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16).state_dict()
    weights = found.state_dict()
    assert weights.keys() == expected.keys()
    assert all(same_bytes(weights[name], expected[name]) for name in expected)


# --- what is refused ---

REFUSED: dict[str, tuple[list[str], str]] = {
    "torch_dist": (["--to", "torch_dist"], "a torch_dist checkpoint holds no block-scaled FP8; give --to hf"),
    "dtype": (["--dtype", "float16"], "--dtype and --quantize exclude one another"),
    "fused": (["--expert-storage", "fused"], "fused experts and --quantize exclude one another"),
    "nonfinite": (["--allow-nonfinite"], "--allow-nonfinite and --quantize exclude one another"),
    "dequantize": (["--dequantize-fp8"], "is in FP8 already; use it as it is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together(case: str, tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    flags, message = REFUSED[case]
    refused = tool(CONVERT, "--load", source, "--save", tmp_path / "out", "--quantize", "fp8", *flags)
    assert refused.code == 2 and message in refused.error and "\n" not in refused.error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_fp8_is_not_quantized_again(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    assert tool(CONVERT, "--load", source, "--save", tmp_path / "fp8", "--quantize", "fp8").code == 0
    for flags in ([], ["--dequantize-fp8"]):
        again = tool(CONVERT, "--load", tmp_path / "fp8", "--save", tmp_path / "out", "--quantize", "fp8", *flags)
        assert again.error == f"{tmp_path / 'fp8'}: is in FP8 already; use it as it is, or its source in bf16"


def test_an_unknown_method(tmp_path: Path) -> None:
    source = HFCheckpoint.open(write_tiny_checkpoint(tmp_path / "hf", SHAPE))
    with pytest.raises(CheckpointError, match="quantization 'int4' is unknown; give fp8"):
        write_checkpoint(source, tmp_path / "out", to="hf", quantize="int4")


def test_what_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    checkpoint = HFCheckpoint.open(source)
    read = checkpoint.read_rows

    def failing(name: str, *args: Any) -> Tensor:
        if name == "mtp.layers.0.self_attn.o_proj.weight":
            raise KeyboardInterrupt
        return read(name, *args)

    checkpoint.read_rows = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(checkpoint, tmp_path / "out", to="hf", quantize="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPE, shards=1)
    checkpoint = HFCheckpoint.open(source)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    entry = checkpoint.entries[name]
    with (source / SINGLE).open("r+b") as file:
        file.seek(entry.offset)  # type: ignore[union-attr]
        file.write(b"\x80\x7f")  # infinity
    with pytest.raises(CheckpointError, match=f"{name}: 1 of .* values are NaN or infinite"):
        write_checkpoint(checkpoint, tmp_path / "out", to="hf", quantize="fp8")
    assert not (tmp_path / "out").exists()
