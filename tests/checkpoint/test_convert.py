"""Round trips through the tool, and everything that can be wrong with a torch_dist checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.convert import (
    hf_to_torch_dist,
    open_checkpoint,
    same_bytes,
    torch_dist_to_hf,
    write_checkpoint,
)
from megatron_slim.checkpoint.distributed import DistCheckpoint
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.metadata_pickle import dumps
from megatron_slim.checkpoint.reference import Reference
from megatron_slim.checkpoint.torch_dist_files import read_metadata
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

TOOL = "tools/convert_checkpoint.py"
SHAPES = {
    "default": tiny_shape(),
    "without MTP": tiny_shape(mtp_num_layers=0),
    "odd layers": tiny_shape(layer_types=(FULL_ATTENTION, LINEAR_ATTENTION, LINEAR_ATTENTION)),
    "grouped heads": tiny_shape(num_query_groups=1, linear_num_value_heads=2, num_moe_experts=5, vocab_size=99),
    "one key head": tiny_shape(num_query_groups=4, linear_num_key_heads=1, linear_value_head_dim=32),
}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = HFCheckpoint.open(a, allow_nonfinite=True), HFCheckpoint.open(b, allow_nonfinite=True)
    assert first.names == second.names
    assert all(same_bytes(first.read(name), second.read(name)) for name in first.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_byte_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", SHAPES[name], dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    hf_to_torch_dist(source, tmp_path / "torch_dist")
    results = torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    assert (source / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert results["verified"]
    assert results["tensors"] == len(HFCheckpoint.open(source).names)


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    """NaN payloads, infinities, subnormals and both zeros are bytes like any other."""
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(), shards=1)
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).numpy().tobytes()
    body = len(content) - start
    content[start:] = (patterns * (body // len(patterns) + 1))[:body]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"values are NaN or infinite.*--allow-nonfinite"):
        hf_to_torch_dist(source, tmp_path / "torch_dist")
    for old, new, to in (("hf", "torch_dist", "torch_dist"), ("torch_dist", "back", "hf")):
        write_checkpoint(open_checkpoint(tmp_path / old, allow_nonfinite=True), tmp_path / new, to=to)
    assert_same_tensors(source, tmp_path / "back")


def test_types_of_their_own_survive_and_a_cast_is_a_cast(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(), dtype=torch.float32)
    hf_to_torch_dist(source, tmp_path / "torch_dist", dtype=torch.bfloat16)
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    wide, narrow = HFCheckpoint.open(source), HFCheckpoint.open(tmp_path / "back")
    assert all(same_bytes(wide.read(name).bfloat16(), narrow.read(name)) for name in wide.names)
    assert narrow.config["torch_dtype"] == "bfloat16"
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "wide", dtype=torch.float32)
    again = HFCheckpoint.open(tmp_path / "wide")
    assert all(same_bytes(again.read(name), narrow.read(name).float()) for name in wide.names)


def test_both_formats_read_alike(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    hf_to_torch_dist(source, tmp_path / "torch_dist", verify=False)
    hf, distributed = open_checkpoint(source), open_checkpoint(tmp_path / "torch_dist")
    assert isinstance(distributed, DistCheckpoint)
    assert (hf.names, hf.shape, hf.dtypes) == (distributed.names, distributed.shape, distributed.dtypes)
    for name in hf.names:
        assert same_bytes(hf.read(name), distributed.read(name))
    rows, columns = torch.tensor([3, 1]), torch.tensor([0, 9, 2])
    for name in ("model.layers.0.linear_attn.in_proj_qkvz.weight", "mtp.fc.weight"):
        assert same_bytes(hf.read_rows(name, rows, columns), distributed.read_rows(name, rows, columns))
    distributed.read("model.norm.weight").zero_()
    assert same_bytes(hf.read("model.norm.weight"), distributed.read("model.norm.weight"))


def test_the_config_stays_readable_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(mtp_num_layers=0), dtype=torch.float32)
    hf_to_torch_dist(source, tmp_path / "torch_dist")
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    model, report = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32


def test_the_tool_there_and_back(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    there = tool(TOOL, "--load", source, "--save", tmp_path / "torch_dist", "--json")
    assert there.code == 0, there.stderr
    assert (there.json["format"], there.json["verified"], there.json["tensors"]) == ("torch_dist", True, 195)
    back = tool(TOOL, "--load", tmp_path / "torch_dist", "--save", tmp_path / "back", "--to", "hf", "--no-verify")
    assert back.code == 0, back.stderr
    assert "NOT verified" in back.stderr
    assert_same_tensors(source, tmp_path / "back")


def test_types_processes_and_provenance_through_the_tool(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    made = tool(TOOL, "--load", source, "--save", tmp_path / "out", "--dtype", "float32", "--processes", 2, "--json")
    assert made.code == 0, made.stderr
    wide, narrow = open_checkpoint(tmp_path / "out"), HFCheckpoint.open(source)
    assert all(same_bytes(wide.read(name), narrow.read(name).float()) for name in narrow.names)
    provenance = json.loads((tmp_path / "out" / "slim_provenance.json").read_text())
    assert provenance["arguments"]["dtype"] == "float32" and provenance["arguments"]["load"] == str(source)
    assert provenance["output"]["content"] == made.json["content"]
    refused = tool(TOOL, "--load", tmp_path / "out", "--save", tmp_path / "x", "--dequantize-fp8")
    assert "leave --dequantize-fp8 out" in refused.error


def test_the_same_format_again_where_something_is_to_change(tmp_path: Path, tool: Callable[..., Any]) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    hf_to_torch_dist(source, tmp_path / "dist")
    for name, to in (("hf", "hf"), ("dist", "torch_dist")):
        wide = tmp_path / f"wide-{to}"
        made = tool(TOOL, "--load", tmp_path / name, "--save", wide, "--to", to, "--dtype", "float32", "--json")
        assert (made.code, made.json["format"], made.json["verified"]) == (0, to, True), made.stderr
        found, narrow = open_checkpoint(wide), HFCheckpoint.open(source)
        assert all(same_bytes(found.read(name), narrow.read(name).float()) for name in narrow.names)
        refused = tool(TOOL, "--load", tmp_path / name, "--save", tmp_path / "x", "--to", to).error
        assert f"is a {to} checkpoint already; leave --to out, or say what is to change: --deq" in refused
    refused = tool(TOOL, "--load", source, "--save", tmp_path / "x", "--to", "hf", "--dequantize-fp8").error
    assert "is not FP8" in refused and not (tmp_path / "x").exists()


def _exists(path: Path) -> list[object]:
    (path / "out").mkdir()
    return ["--load", path / "hf", "--save", path / "out"]


def _drop_expert(path: Path) -> list[object]:
    index = path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop("model.layers.0.mlp.experts.3.up_proj.weight")
    index.write_text(json.dumps(content))
    return ["--load", path / "hf", "--save", path / "out"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_exists, "output already exists"),
        (_drop_expert, "experts.3.up_proj.weight"),
        (lambda path: ["--load", path / "nowhere", "--save", path / "out"], "no such directory"),
        (lambda path: ["--load", path / "hf", "--save", path / "out", "--to", "hf"], "is a hf checkpoint already"),
        (lambda path: ["--load", path / "hf", "--save", path / "no" / "out"], "parent directory"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    tmp_path: Path, tool: Callable[..., Any], prepare: Callable[[Path], list[object]], message: str
) -> None:
    write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    arguments = prepare(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert message in tool(TOOL, *arguments).error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("which", [50, 51, 52])
@pytest.mark.parametrize("to", ["torch_dist", "hf"])
def test_what_is_written_wrongly_does_not_appear(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, to: str, which: int
) -> None:
    """One bit of one write, of data or of what is around them."""
    pwrite, written = os.pwrite, []

    def flaky(descriptor: int, data: Any, offset: int) -> int:
        written.append(len(data))
        if len(written) == which:
            data = bytes(data[:-1]) + bytes([data[-1] ^ 1])
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", flaky)
    with pytest.raises(CheckpointError, match="not what was written when read back"):
        source = good if to == "hf" else good.parent / "hf"
        write_checkpoint(open_checkpoint(source), tmp_path / "out", to=to)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    hf_to_torch_dist(write_tiny_checkpoint(path / "hf", tiny_shape()), path / "torch_dist")
    return path / "torch_dist"


def _edit_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(path / "release")
    change(metadata)
    (path / "release" / ".metadata").write_bytes(dumps(metadata))


NORM = "decoder.final_layernorm.weight"


def _rename(metadata: Any) -> None:
    metadata.state_dict_metadata["decoder.extra.weight"] = metadata.state_dict_metadata.pop(NORM)


def _escape(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../release/{info.relative_path}"


def _truncate(path: Path) -> None:
    file = path / "release" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "renamed": (
        lambda path: _edit_metadata(path, _rename),
        f"1 missing weights: {NORM}; 1 unknown weights: decoder.extra.weight",
    ),
    "leaves the directory": (lambda path: _edit_metadata(path, _escape), "is in no file of this directory"),
    "half of a tensor": (
        lambda path: _edit_metadata(path, lambda m: m.state_dict_metadata[NORM].chunks.pop()),
        "do not make up the whole",
    ),
    "truncated": (_truncate, "is truncated"),
    "missing file": (lambda path: (path / "release" / "__0_0.distcp").unlink(), "is missing"),
    "no metadata": (lambda path: (path / "release" / ".metadata").unlink(), "not a torch_dist checkpoint"),
    "pickle bomb": (
        lambda path: (path / "release" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR."),
        "os.system does not belong",
    ),
    "not a pickle": (lambda path: (path / "release" / ".metadata").write_bytes(b"hello"), "not readable"),
    "another pickle": (
        lambda path: (path / "release" / ".metadata").write_bytes(pickle.dumps([1])),
        "not hold checkpoint metadata",
    ),
    "torn tracker": (lambda path: (path / "latest_checkpointed_iteration.txt").write_text(""), "neither 'release'"),
    "tracker to nowhere": (
        lambda path: (path / "latest_checkpointed_iteration.txt").write_text("12"),
        "names iter_0000012, which does not exist",
    ),
    "no config": (lambda path: shutil.rmtree(path / "hf"), "--hf-config"),
    "config of another model": (
        lambda path: (path / "hf" / "config.json").write_text(
            (path / "hf" / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 80')
        ),
        "wrong shapes",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_torch_dist_checkpoints_are_refused(good: Path, tmp_path: Path, case: str) -> None:
    path = shutil.copytree(good, tmp_path / "torch_dist")
    damage, message = ERRORS[case]
    damage(path)
    with pytest.raises(SlimError, match=message) as caught:
        torch_dist_to_hf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_not_a_tensor_are_found_when_read(good: Path, tmp_path: Path) -> None:
    path = shutil.copytree(good, tmp_path / "torch_dist")
    file = path / "release" / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="is not the tensor that"):
        torch_dist_to_hf(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["torch_dist"]


def test_an_iteration_and_its_config_may_be_named(good: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(good / "release", tmp_path / "iter_0000003")
    assert DistCheckpoint.open(directory, good / "hf").shape == tiny_shape()
    assert DistCheckpoint.open(good / "release").shape == tiny_shape()


@pytest.mark.parametrize("name", SHAPES)
def test_pieces_are_those_that_megatron_reads(tmp_path: Path, name: str) -> None:
    """Gate and up of every expert are pieces of their own: a rank reads no expert that is not its own."""
    shape: ModelShape = SHAPES[name]
    hf_to_torch_dist(write_tiny_checkpoint(tmp_path / "hf", shape), tmp_path / "torch_dist", verify=False)
    metadata = read_metadata(tmp_path / "torch_dist" / "release")
    for weight in weights(shape):
        if weight.stacked:
            chunks = metadata.state_dict_metadata[weight.key].chunks  # type: ignore[union-attr]
            pieces = 2 if "linear_fc1" in weight.key else 1
            assert len(chunks) == pieces * shape.num_moe_experts


def test_a_full_disk_is_noticed_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    free = types.SimpleNamespace(f_bavail=10, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    with pytest.raises(SlimError, match="needs"):
        hf_to_torch_dist(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["hf"]


def test_a_weight_that_another_type_does_not_hold_is_named(tmp_path: Path, tool: Callable[..., Any]) -> None:
    """Infinite weights would be verified, and refused by whoever reads them next."""
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(), shards=1)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name][0, 0] = -7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    to = ("--load", source, "--to", "hf", "--save", tmp_path / "other")
    error = tool(TOOL, *to, "--dtype", "float16").error
    assert f"{name}: its largest value, 70144, is infinite in float16; take another --dtype" in error
    assert not (tmp_path / "other").exists() and tool(TOOL, *to, "--dtype", "float32").code == 0


def test_what_lies_above_a_model_is_not_of_it(tmp_path: Path, tool: Callable[..., Any]) -> None:
    """A student within the directory of its teacher does not have the teacher's losses, nor its provenance."""
    shape = tiny_shape()
    teacher = write_tiny_checkpoint(tmp_path / "teacher", shape)
    Reference(((1, 2, 3),), ((0.5, 0.5),), "float32").save(teacher)
    (teacher / "slim_provenance.json").write_text("{}")
    write_tiny_checkpoint(teacher / "student", shape, seed=1)
    assert tool(TOOL, "--load", teacher / "student", "--save", tmp_path / "dist").code == 0
    assert not (tmp_path / "dist" / "slim_reference.json").exists()
    made_from = json.loads((tmp_path / "dist" / "slim_provenance.json").read_text())["source"]
    assert "provenance" not in made_from
    # It does belong to the weights below its own directory.
    Reference(((1, 2, 3),), ((0.5, 0.5),), "float32").save(tmp_path / "dist")
    assert tool(TOOL, "--load", tmp_path / "dist" / "release", "--save", tmp_path / "hf").code == 0
    assert (tmp_path / "hf" / "slim_reference.json").exists()
