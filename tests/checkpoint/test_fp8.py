"""Block-scaled FP8 against E4M3 decoded by hand, against transformers, and with every error it can have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.convert import open_checkpoint, same_bytes
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.checkpoint.fp8 import BlockScaled
from megatron_slim.checkpoint.huggingface import CONFIG, SINGLE, HFCheckpoint
from megatron_slim.checkpoint.layout import to_megatron
from megatron_slim.checkpoint.raw_files import OpenFiles
from megatron_slim.checkpoint.safetensors_reader import TensorEntry
from megatron_slim.errors import CheckpointError
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape

SHAPE = tiny_shape()
BLOCK = (24, 40)  # divides no dimension of the model
UP = "model.layers.0.mlp.experts.0.up_proj.weight"
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": list(BLOCK),
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}
CONVERT = "tools/convert_checkpoint.py"
Tensors = dict[str, Tensor]
FP8 = torch.float8_e4m3fn


def is_quantized(name: str) -> bool:
    """The linear layers that the published checkpoints hold in FP8."""
    return name.endswith(("_proj.weight", "in_proj_qkvz.weight"))


def grid(tensor: Tensor, block: tuple[int, int] = BLOCK) -> list[int]:
    return [-(-extent // step) for extent, step in zip(tensor.shape, block, strict=True)]


def quantized(tensors: Tensors, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """The linear layers as random FP8 numbers, which use all exponents, under random scales."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in tensors.items():
        if is_quantized(name):
            found[name] = (60 * torch.randn(tensor.shape, generator=generator)).clamp(-448, 448).to(FP8)
            scale = torch.rand(grid(tensor), generator=generator) / 1000
            found[f"{name}_scale_inv"] = scale.to(scale_dtype)
        else:
            found[name] = tensor
    return found


def decode_e4m3(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """By the definition: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, fraction = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    value = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    return sign * np.where((codes & 0x7F) == 0x7F, np.nan, value)


def dequantized_by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Block by block in fp64."""
    values = decode_e4m3(weight.view(torch.uint8).numpy())
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            rows = slice(row * block[0], (row + 1) * block[0])
            values[rows, column * block[1] : (column + 1) * block[1]] *= float(scale[row, column])
    return values


def to_bf16(values: npt.NDArray[np.float64]) -> Tensor:
    """Rounded to the nearest, half to even, of fp32 as hardware does it."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


def write(directory: Path, tensors: Tensors, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SINGLE)
    config = {**tiny_hf_config(SHAPE), "quantization_config": {**QUANTIZATION, **changes}}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["F32 scales", "BF16 scales"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    tensors = quantized(random_tensors(SHAPE), request.param)
    return write(tmp_path_factory.mktemp("fp8") / "hf", tensors), tensors


def test_every_code_is_what_the_definition_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = codes.view(FP8).double().numpy()
    np.testing.assert_array_equal(ours, decode_e4m3(codes.numpy()))


def test_reads_as_the_bf16_checkpoint_that_it_stands_for(source: tuple[Path, Tensors]) -> None:
    path, tensors = source
    checkpoint = HFCheckpoint.open(path, dequantize_fp8=True)
    assert checkpoint.shape == SHAPE
    assert set(checkpoint.names) == random_tensors(SHAPE).keys()
    assert set(checkpoint.dtypes.values()) == {torch.bfloat16}
    assert checkpoint.config == tiny_hf_config(SHAPE)
    for name in checkpoint.names:
        tensor = checkpoint.read(name)
        if not is_quantized(name):
            assert same_bytes(tensor, tensors[name])
            continue
        exact = dequantized_by_hand(tensors[name], tensors[f"{name}_scale_inv"], BLOCK)
        assert same_bytes(tensor, to_bf16(exact)), name
        # Half of a bf16's last place, and as much as a product of fp32 may be off before it is rounded again.
        assert (np.abs(tensor.double().numpy() - exact) <= np.abs(exact) * 2**-8 * (1 + 2**-14)).all()


def test_from_hugging_face_to_hugging_face_is_one_conversion(
    source: tuple[Path, Tensors], tmp_path: Path, tool: Callable[..., Any]
) -> None:
    made = tool(CONVERT, "--load", source[0], "--save", tmp_path / "out", "--to", "hf", "--dequantize-fp8", "--json")
    assert (made.code, made.json["format"]) == (0, "hf"), made.stderr
    there = tool(CONVERT, "--load", source[0], "--save", tmp_path / "dist", "--dequantize-fp8", "--json")
    assert there.json["content"] == made.json["content"]
    expected, found = HFCheckpoint.open(source[0], dequantize_fp8=True), HFCheckpoint.open(tmp_path / "out")
    assert found.config == expected.config and "quantization_config" not in found.config
    assert all(same_bytes(found.read(name), expected.read(name)) for name in expected.names)


def test_a_directory_in_fp8_describes_the_model_that_it_stands_for(
    source: tuple[Path, Tensors], tmp_path: Path, tool: Callable[..., Any]
) -> None:
    """With its weights or without: sizes, and the config.json of what is exported by it."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source[0] / CONFIG, alone)
    made = tool(CONVERT, "--load", source[0], "--save", tmp_path / "dist", "--dequantize-fp8", "--json")
    (tmp_path / "dist" / "hf").rename(tmp_path / "its own")
    for directory in (source[0], alone):
        assert read_shape(directory).replace(mtp_num_layers=0) == SHAPE.replace(mtp_num_layers=0)
        save = tmp_path / f"from {directory.name}"
        back = tool(CONVERT, "--load", tmp_path / "dist", "--hf-config", directory, "--save", save, "--json")
        assert back.code == 0, back.stderr
        assert back.json["content"] == made.json["content"]
        assert HFCheckpoint.open(save).config == tiny_hf_config(SHAPE)
    assert read_shape(source[0]) == SHAPE


def test_a_student_and_a_teacher_of_which_one_is_in_fp8(
    source: tuple[Path, Tensors], tmp_path: Path, tool: Callable[..., Any]
) -> None:
    """The flag is for the one that is; the other is read as it is."""
    plain = tmp_path / "plain"
    assert tool(CONVERT, "--load", source[0], "--save", plain, "--to", "hf", "--dequantize-fp8").code == 0
    np.save(tmp_path / "x.npy", np.arange(24).reshape(2, 12))
    data = ("--data", tmp_path / "x.npy", "--json")
    for student, teacher in ((plain, source[0]), (source[0], plain), (source[0], source[0])):
        words = ("tools/evaluate.py", "--load", student, "--teacher", teacher, *data)
        assert "give --dequantize-fp8" in tool(*words).error
        found = tool(*words, "--dequantize-fp8")
        assert found.code == 0 and found.json["kl"] == 0, found.stderr
    words = ("tools/evaluate.py", "--load", plain, "--teacher", plain, *data, "--dequantize-fp8")
    assert "is not FP8" in tool(*words).error


def test_agrees_with_transformers(source: tuple[Path, Tensors]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

    path, tensors = source
    checkpoint = HFCheckpoint.open(path, dequantize_fp8=True)
    for name in filter(is_quantized, checkpoint.names):
        weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
        theirs = _dequantize_fp8_weight(weight, scale, list(BLOCK), torch.float32)
        assert same_bytes(checkpoint.read(name), theirs.bfloat16())
    # What it loads checkpoints with takes the size of a block from the grid, which must divide the weight.
    weight, scale = tensors[UP][:32, :64].contiguous(), torch.rand(2, 4)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert same_bytes(theirs, to_bf16(dequantized_by_hand(weight, scale, (16, 16))))


def block_scaled(directory: Path, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> BlockScaled:
    """A weight in a file of its own."""
    file = directory / "weight"
    file.write_bytes(weight.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes())
    return BlockScaled(
        "x",
        TensorEntry(file, 0, FP8, tuple(weight.shape)),
        TensorEntry(file, weight.nbytes, torch.float32, tuple(scale.shape)),
        block,
    )


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(data=st.data())
def test_any_shape_any_block_any_rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    weight = torch.randint(0, 255, (rows, columns), dtype=torch.uint8, generator=generator)
    weight = weight.masked_fill((weight & 0x7F) == 0x7F, 0).view(FP8)
    scale = torch.rand(grid(weight, block), generator=generator)
    entry = block_scaled(tmp_path_factory.getbasetemp(), weight, scale, block)
    expected = to_bf16(dequantized_by_hand(weight, scale, block))
    assert same_bytes(entry.read(OpenFiles()), expected)
    wanted = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=50)))
    assert same_bytes(entry.read(OpenFiles(), wanted), expected[wanted])


def test_rows_and_columns(source: tuple[Path, Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = HFCheckpoint.open(source[0], dequantize_fp8=True)
    name = "model.layers.3.self_attn.q_proj.weight"
    whole = checkpoint.read(name)
    rows, columns = np.array([127, 3, 25, 26, 3]), np.array([63, 0, 41])
    assert torch.equal(checkpoint.read_rows(name, rows, columns), whole[rows][:, columns])
    assert torch.equal(checkpoint.read_rows(name, None, columns), whole[:, columns])
    read: list[tuple[int, int]] = []
    gather = OpenFiles.gather

    def recording(self: OpenFiles, file: Path, offset: int, rows: Any, row_bytes: int) -> Tensor:
        read.append((row_bytes, len(rows)))
        return gather(self, file, offset, rows, row_bytes)

    monkeypatch.setattr(OpenFiles, "gather", recording)
    checkpoint.read_rows(name, rows)
    scale = source[1][f"{name}_scale_inv"]
    assert read == [(scale.shape[1] * scale.itemsize, 3), (whole.shape[1], 5)]  # rows of blocks 0, 1 and 5


def test_a_parameter_may_be_of_fp8_and_bf16(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    tensors = dict(source[1])
    tensors[UP] = torch.ones(tensors[UP].shape, dtype=torch.bfloat16)
    del tensors[f"{UP}_scale_inv"]
    checkpoint = HFCheckpoint.open(write(tmp_path / "hf", tensors), dequantize_fp8=True)
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    (weight,) = (weight for weight in weights(SHAPE) if weight.key == key)
    gate, up = to_megatron(weight, SHAPE, checkpoint.read, expert=0).chunk(2)
    assert torch.equal(up, tensors[UP])
    assert torch.equal(gate, checkpoint.read(UP.replace("up_proj", "gate_proj")))


def test_tools_take_it_with_the_flag(source: tuple[Path, Tensors], tmp_path: Path, tool: Callable[..., Any]) -> None:
    convert = ("tools/convert_checkpoint.py", "--load", source[0], "--save", tmp_path / "out")
    assert tool(*convert).error.endswith(
        "the weights are in FP8; give --dequantize-fp8, or convert first: megatron-slim convert --to hf "
        "--dequantize-fp8"
    )
    assert tool(*convert, "--dequantize-fp8").code == 0
    written, read = open_checkpoint(tmp_path / "out"), HFCheckpoint.open(source[0], dequantize_fp8=True)
    assert "quantization_config" not in written.config and written.config["torch_dtype"] == "bfloat16"
    assert written.dtypes == read.dtypes
    assert all(same_bytes(written.read(name), read.read(name)) for name in read.names)


def _codes(value: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[UP].view(torch.uint8)[3].fill_(value)


def _scale(value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[f"{UP}_scale_inv"][0].fill_(value)


def _to(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


ERRORS: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "no scale": (lambda t: t.pop(f"{UP}_scale_inv"), {}, rf"1 FP8 weights without scales: {UP};"),
    "no weight": (lambda t: t.pop(UP), {}, rf"1 scales without FP8 weights: {UP}_scale_inv;"),
    "scale of a bf16 weight": (_to(UP, Tensor.bfloat16), {}, rf"1 scales without FP8 weights: {UP}_scale_inv;"),
    "scale in F16": (_to(f"{UP}_scale_inv", Tensor.half), {}, rf"that are not F32 or BF16: {UP}_scale_inv;"),
    "scale in FP8": (_to(f"{UP}_scale_inv", lambda t: t.to(FP8)), {}, rf"not F32 or BF16: {UP}_scale_inv"),
    "scale of another shape": (
        _to(f"{UP}_scale_inv", lambda t: t.reshape(1, 4)),
        {},
        rf"1 scales of wrong shapes: {UP}_scale_inv \[1, 4\] for",
    ),
    "one scale": (
        _to(f"{UP}_scale_inv", lambda t: t[:1, :1]),
        {},
        rf"{UP}_scale_inv \[1, 1\] for \[32, 64\] in blocks of \[24, 40\];",
    ),
    "vector": (
        lambda t: t.update({"model.norm.weight": torch.ones(64).to(FP8), "model.norm.weight_scale_inv": torch.ones(3)}),
        {},
        r"1 FP8 tensors that are not matrices: model\.norm\.weight; ",
    ),
    "E5M2": (_to(UP, lambda t: t.float().to(torch.float8_e5m2)), {}, rf"unsupported types: {UP} \(F8_E5M2\)"),
    "format": (lambda t: None, {"fmt": "e5m2"}, r"quantization_config\.fmt 'e5m2' is not supported"),
    "blocks of another size": (lambda t: None, {"weight_block_size": [128, 128]}, "scales of wrong shapes: .* more"),
    "no blocks": (lambda t: None, {"weight_block_size": None}, "weight_block_size None is not two positive integers"),
    "one size": (lambda t: None, {"weight_block_size": [128]}, r"weight_block_size \[128\] is not two positive"),
    "size zero": (lambda t: None, {"weight_block_size": [0, 40]}, r"weight_block_size \[0, 40\] is not two positive"),
    "size true": (lambda t: None, {"weight_block_size": [24, True]}, "is not two positive integers"),
    "sizes in a string": (lambda t: None, {"weight_block_size": "24"}, "weight_block_size '24' is not two positive"),
}
VALUES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "NaN": (_codes(0x7F), f"{UP}: 64 of (64|2048) values are NaN or infinite"),
    "-NaN": (_codes(0xFF), f"{UP}: 64 of (64|2048) values are NaN or infinite"),
    "infinite product": (_scale(3e38), f"{UP}: [0-9]+ of (64|2048) values are NaN or infinite"),
    "scale NaN": (_scale(float("nan")), f"{UP}_scale_inv: scales that are NaN, infinite or negative"),
    "scale infinite": (_scale(float("inf")), f"{UP}_scale_inv: scales that are NaN, infinite or negative"),
    "scale negative": (_scale(-1.0), f"{UP}_scale_inv: scales that are NaN, infinite or negative"),
}


def changed(source: tuple[Path, Tensors], change: Callable[[Tensors], Any]) -> Tensors:
    tensors = {name: tensor.clone() for name, tensor in source[1].items()}
    change(tensors)
    return tensors


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_found_on_opening(source: tuple[Path, Tensors], tmp_path: Path, case: str) -> None:
    change, config, message = ERRORS[case]
    path = write(tmp_path / "hf", changed(source, change), **config)
    with pytest.raises(CheckpointError, match=message) as caught:
        HFCheckpoint.open(path, dequantize_fp8=True)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", VALUES)
def test_wrong_values_are_found_on_reading(source: tuple[Path, Tensors], tmp_path: Path, case: str) -> None:
    change, message = VALUES[case]
    path = write(tmp_path / "hf", changed(source, change))
    checkpoint = HFCheckpoint.open(path, dequantize_fp8=True)
    for rows in (None, np.array([3])):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_rows(UP, rows)
    trusting = HFCheckpoint.open(path, dequantize_fp8=True, allow_nonfinite=True)
    if "scale" in case:
        with pytest.raises(CheckpointError, match=message):
            trusting.read(UP)
    else:
        assert not torch.isfinite(trusting.read(UP)[3]).all()


def test_a_scale_of_zero_gives_zeros(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    checkpoint = HFCheckpoint.open(write(tmp_path / "hf", changed(source, _scale(0.0))), dequantize_fp8=True)
    assert not checkpoint.read(UP)[:24].any() and checkpoint.read(UP)[24:].any()


def test_what_is_not_fp8_is_not_taken_as_such(source: tuple[Path, Tensors], tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", random_tensors(SHAPE))
    with pytest.raises(CheckpointError, match=r"no tensor is of type F8_E4M3; leave --dequantize-fp8 out"):
        HFCheckpoint.open(plain, dequantize_fp8=True)
    silent = Path(shutil.copytree(source[0], tmp_path / "silent"))
    (silent / CONFIG).write_text(json.dumps(tiny_hf_config(SHAPE)))
    for flag, message in ((True, "no quantization_config, but tensors in FP8"), (False, r"unsupported.*\(F8_E4M3\)")):
        with pytest.raises(CheckpointError, match=message):
            HFCheckpoint.open(silent, dequantize_fp8=flag)
