"""The reader on good checkpoints and on every kind of bad one; the writer against the safetensors library."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_slim.checkpoint import raw_files
from megatron_slim.checkpoint.convert import same_bytes
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE, HFCheckpoint
from megatron_slim.checkpoint.huggingface_writer import specs_of, total_bytes, write_hf_checkpoint
from megatron_slim.errors import CheckpointError, ShapeError, SlimError
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape, write_tiny_checkpoint

SHAPE = tiny_shape()
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("good") / "hf", SHAPE)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "hf")


def test_reads_what_the_safetensors_library_reads(good: Path) -> None:
    checkpoint = HFCheckpoint.open(good)
    theirs = {k: v for file in good.glob("*.safetensors") for k, v in load_file(file).items()}
    assert checkpoint.shape == SHAPE
    assert set(checkpoint.names) == theirs.keys()
    assert all(same_bytes(checkpoint.read(name), theirs[name]) for name in theirs)
    assert total_bytes(checkpoint.shape, checkpoint.dtypes) == sum(tensor.nbytes for tensor in theirs.values())


def test_reads_rows_and_columns_in_the_order_wanted(good: Path) -> None:
    checkpoint = HFCheckpoint.open(good)
    name = "model.layers.3.self_attn.q_proj.weight"
    whole = checkpoint.read(name)
    rows, columns = np.array([7, 3, 4, 5, 127, 0]), torch.tensor([63, 0, 5])
    assert torch.equal(checkpoint.read_rows(name, rows, columns), whole[rows][:, columns])
    assert torch.equal(checkpoint.read_rows(name, rows), whole[rows])
    assert torch.equal(checkpoint.read_rows(name, None, columns), whole[:, columns])
    vector = "model.norm.weight"
    assert torch.equal(checkpoint.read_rows(vector, np.array([2, 1])), checkpoint.read(vector)[[2, 1]])


@pytest.fixture
def preads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read from a file by position."""
    counts: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        counts.append(preadv(descriptor, buffers, offset, *flags))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def test_rows_that_are_not_far_apart_are_read_in_one_go(
    good: Path, preads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_files, "MOST_BETWEEN", 32 * 64 * 2)
    checkpoint = HFCheckpoint.open(good)
    name, row_bytes = "model.embed_tokens.weight", 64 * 2
    whole = checkpoint.read(name)
    assert preads == [whole.nbytes]
    rows = np.array([1, 2, 5, 36, 70, 102, 3, 3, 127])
    for wanted, spans in (
        (np.arange(0, 128, 2), [127]),
        (np.array([4, 37]), [1, 1]),  # 32 rows between them: too many
        (np.array([4, 36]), [33]),
        (rows, [36, 33, 1, 1, 1]),
    ):
        preads.clear()
        assert torch.equal(checkpoint.read_rows(name, wanted), whole[wanted])
        assert preads == [span * row_bytes for span in spans]


def test_what_is_read_is_the_readers_own(good: Path) -> None:
    checkpoint = HFCheckpoint.open(good)
    before = checkpoint.read("model.norm.weight")
    checkpoint.read("model.norm.weight").zero_()
    assert torch.equal(checkpoint.read("model.norm.weight"), before)


def test_a_single_file_and_files_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE, dtype=torch.float32)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / CONFIG).write_text(json.dumps(tiny_hf_config(SHAPE)))
    checkpoint = HFCheckpoint.open(tmp_path)
    assert all(same_bytes(checkpoint.read(name), tensors[name]) for name in tensors)


def test_no_mtp_tensors_no_mtp(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(mtp_num_layers=0))
    assert HFCheckpoint.open(directory).shape.mtp_num_layers == 0


def test_writer_output_is_what_the_format_and_transformers_want(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    carried = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
    for name in (*carried, "generation_config.json", "special_tokens_map.json", "README.md", "modeling_x.py"):
        (source / name).write_text(name)
    tensors = random_tensors(SHAPE)
    mixed = {k: v.float() if k.endswith("norm.weight") else v for k, v in tensors.items()}
    specs = specs_of(SHAPE, {name: tensor.dtype for name, tensor in mixed.items()})
    target = tmp_path / "target"
    target.mkdir()
    shuffled = reversed(list(mixed.items()))
    limit = 200_000
    write_hf_checkpoint(target, {"a": 1}, specs, shuffled, max_shard_bytes=limit, copy_files_from=source)
    files = sorted(target.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in mixed.values())
    for file in files:
        assert file.stat().st_size < limit + 50_000
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
                assert same_bytes(opened.get_tensor(name), mixed.pop(name))
    assert not mixed
    assert not (target / "README.md").exists()
    assert not (target / "modeling_x.py").exists()
    assert all((target / name).read_text() == name for name in (*carried, "generation_config.json"))


def test_writer_refuses_to_leave_a_tensor_out(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPE)
    tensors.pop("lm_head.weight")
    with pytest.raises(AssertionError, match=r"never produced: lm_head\.weight"):
        write_hf_checkpoint(tmp_path, {}, specs_of(SHAPE, torch.bfloat16), tensors.items())


def _edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _resave(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _drop_from_both(path: Path) -> None:
    name = "model.norm.weight"
    index = json.loads((path / INDEX).read_text())
    _resave(path / index["weight_map"].pop(name), lambda tensors: tensors.pop(name))
    (path / INDEX).write_text(json.dumps(index))


def _add_to_both(path: Path) -> None:
    _resave(path / FIRST, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    _edit_json(path / INDEX, lambda index: index["weight_map"].update({"model.extra": FIRST}))


def _reshape(path: Path) -> None:
    _resave(path / FIRST, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(64, 64).bfloat16()}))


def _map(name: str, file: Any) -> Callable[[Path], None]:
    return lambda path: _edit_json(path / INDEX, lambda index: index["weight_map"].update({name: file}))


def _truncate(path: Path, size: int = -1000) -> None:
    content = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(content[:size])


def _only_pickle(path: Path) -> None:
    for file in (INDEX, FIRST, SECOND):
        (path / file).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _to_float64(path: Path) -> None:
    _resave(path / FIRST, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(128, 64).double()}))


def _mixed(path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    _resave(path / FIRST, lambda tensors: tensors.update({name: tensors[name].float()}))


def _lie_about_shape(path: Path) -> None:
    content = (path / FIRST).read_bytes()
    (path / FIRST).write_bytes(content.replace(b'"shape":[128,64]', b'"shape":[128,63]', 1))


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (_drop_from_both, r"1 missing tensors: model\.norm\.weight"),
    "extra tensor": (_add_to_both, r"1 extra tensors: model\.extra"),
    "wrong shape": (_reshape, r"embed_tokens\.weight \[64, 64\], config\.json says \[128, 64\]"),
    "type": (_to_float64, r"unsupported types: model\.embed_tokens\.weight \(F64\)"),
    "mixed types": (_mixed, "1 mixed types in one parameter"),
    "in the index only": (_map("model.ghost", FIRST), r"model\.ghost is in the index but not in"),
    "in a shard only": (
        lambda path: _edit_json(path / INDEX, lambda index: index["weight_map"].pop("model.embed_tokens.weight")),
        "embed_tokens.weight is in .* but not there in the index",
    ),
    "parent directory": (_map("lm_head.weight", f"../{SECOND}"), r"not safetensors files of this directory"),
    "absolute path": (_map("lm_head.weight", "/etc/passwd.safetensors"), "not safetensors files of this directory"),
    "no path": (_map("lm_head.weight", 3), "not safetensors files of this directory"),
    "missing shard": (lambda path: (path / SECOND).unlink(), f"missing shards: {SECOND}"),
    "truncated data": (_truncate, "truncated: .* ends at byte"),
    "truncated header": (lambda path: _truncate(path, 100), "truncated or not a safetensors file"),
    "empty shard": (lambda path: _truncate(path, 0), "truncated or not a safetensors file"),
    "no header": (lambda path: (path / FIRST).write_bytes(b"\x08" + bytes(7) + b"not json"), "not JSON"),
    "shape that is not the bytes": (_lie_about_shape, "bytes for shape"),
    "pickle only": (_only_pickle, "only pickled weights"),
    "no weights": (
        lambda path: [(path / file).unlink() for file in (INDEX, FIRST, SECOND)],
        "neither model.safetensors.index.json nor model.safetensors",
    ),
    "empty index": (lambda path: (path / INDEX).write_text("{}"), "has no weight_map"),
    "index that is not JSON": (lambda path: (path / INDEX).write_text("{"), "not readable as JSON"),
    "no config": (lambda path: (path / CONFIG).unlink(), "no config.json"),
    "config that is a list": (lambda path: (path / CONFIG).write_text("[]"), "not a JSON object"),
    "unknown layer type": (
        lambda path: _edit_json(path / CONFIG, lambda config: config.update(layer_types=["mamba"] * 4)),
        "unknown layer type 'mamba'",
    ),
    "config of another model": (
        lambda path: _edit_json(path / CONFIG, lambda config: config.update(hidden_size=32, num_experts=9)),
        "wrong shapes: .* and [0-9]+ more",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_checkpoints_are_refused_before_any_tensor_is_read(copy: Path, case: str) -> None:
    damage, message = ERRORS[case]
    damage(copy)
    with pytest.raises(SlimError, match=message) as caught:
        HFCheckpoint.open(copy)
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)


def test_all_kinds_of_errors_in_one_message(copy: Path) -> None:
    _drop_from_both(copy)
    _add_to_both(copy)
    _reshape(copy)
    with pytest.raises(CheckpointError, match=r"missing.*extra.*wrong shapes"):
        HFCheckpoint.open(copy)


def test_not_a_directory(good: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        HFCheckpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        HFCheckpoint.open(good / CONFIG)


def test_a_model_that_cannot_be_built(copy: Path) -> None:
    _edit_json(copy / CONFIG, lambda config: config.update(num_key_value_heads=3, num_experts_per_tok=9))
    with pytest.raises(ShapeError, match=r"num_query_groups 3; moe_router_topk 9"):
        HFCheckpoint.open(copy)


def test_a_tokenizer_elsewhere_is_not_carried_over(tmp_path: Path, tool: Callable[..., Any]) -> None:
    hf = write_tiny_checkpoint(tmp_path / "hf", SHAPE)
    (tmp_path / "secret").write_text("s")
    (hf / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused = tool("tools/convert_checkpoint.py", "--load", hf, "--save", tmp_path / "out")
    assert "outside the checkpoint" in refused.error
    assert not (tmp_path / "out").exists()
