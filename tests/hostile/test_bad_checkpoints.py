"""Hugging Face directories made to mislead the reader: each is refused with one line that names the file.

What happens to checkpoints by accident is in tests/checkpoint/test_huggingface.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_slim.checkpoint.convert import same_bytes
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE, HFCheckpoint
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.testing import random_tensors, tiny_shape, write_tiny_checkpoint

Damage = Callable[[Path], Any]
Limits = Callable[[], AbstractContextManager[Any]]
SHAPE = tiny_shape(num_layers=1, layer_types=("full_attention",), mtp_num_layers=0, num_moe_experts=2)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
RED = "\x1b[31mred\n\u202e"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("good") / "hf", SHAPE)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "hf")


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = HFCheckpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def shard_with(path: Path, name: str = NORM) -> Path:
    return path / json.loads((path / INDEX).read_text())["weight_map"][name]


def content(name: str, data: bytes | str) -> Damage:
    return lambda path: (path / name).write_bytes(data.encode() if isinstance(data, str) else data)


def sparse(name: str, size: int, start: bytes = b"") -> Damage:
    """A file of a size that takes no space on the disk."""

    def damage(path: Path) -> None:
        (path / name).write_bytes(start)
        os.truncate(path / name, size)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the parsed header of the shard with the last norm; the tensors stay where they are."""

    def damage(path: Path) -> None:
        shard = shard_with(path)
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        parsed = json.loads(data[8 : 8 + length])
        change(parsed)
        payload = json.dumps(parsed).encode()
        shard.write_bytes(struct.pack("<Q", len(payload)) + payload + data[8 + length :])

    return damage


def norm(**changes: Any) -> Damage:
    """Change the header entry of the last norm."""
    return header(lambda parsed: parsed[NORM].update(changes))


def raw(payload: bytes, length: int | None = None, rest: bytes = b"") -> Damage:
    """A shard with this header."""
    return content(FIRST, struct.pack("<Q", len(payload) if length is None else length) + payload + rest)


def index(**changes: Any) -> Damage:
    return edit(INDEX, lambda parsed: parsed["weight_map"].update(changes))


def config(**changes: Any) -> Damage:
    return edit(CONFIG, lambda parsed: parsed.update(changes))


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(path: Path) -> None:
        parsed = json.loads((path / name).read_text())
        change(parsed)
        (path / name).write_text(json.dumps(parsed))

    return damage


def twice(name: str, text: str) -> Damage:
    """The first key of a JSON file again, as the last one."""
    return lambda path: (path / name).write_text((path / name).read_text().rstrip().removesuffix("}") + text)


def replaced(name: str, make: Callable[[Path], Any]) -> Damage:
    def damage(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return damage


def linked(name: str, target: Path | str) -> Damage:
    return replaced(name, lambda file: file.symlink_to(target))


def moved_out(name: str) -> Damage:
    """The file is outside, and a link to it inside."""

    def damage(path: Path) -> None:
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(Path("..") / name)

    return damage


def only(*names: str) -> Damage:
    """A directory with these files, all empty."""

    def damage(path: Path) -> None:
        shutil.rmtree(path)
        path.mkdir()
        for name in names:
            (path / name).touch()

    return damage


def overflow(parsed: dict[str, Any]) -> None:
    """2**62 x 4 elements of 2 bytes are 0 bytes to 64 bits."""
    begin, _ = parsed[NORM]["data_offsets"]
    parsed["x"] = {"dtype": "BF16", "shape": [2**62, 4], "data_offsets": [begin, begin]}


HEADERS: dict[str, tuple[Damage, str]] = {
    "length 2**63": (raw(b"{}", 2**63), "truncated or not a safetensors file"),
    "length -1": (raw(b"{}", 2**64 - 1), "truncated or not a safetensors file"),
    "length 0": (raw(b"", 0), "header is not JSON"),
    "length one more": (raw(b"{}", 3), "truncated or not a safetensors file"),
    "length above the format's": (sparse(FIRST, 10**12, struct.pack("<Q", 10**11)), "not a safetensors file"),
    "zeros": (sparse(FIRST, 10**12), "header is not JSON"),
    "spaces": (raw(b"  {}"), "header is not JSON"),
    "list": (raw(b"[]"), "header is not JSON"),
    "null": (raw(b"null"), "header is not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "header is not JSON"),
    "NaN": (raw(b'{"x": NaN}'), "NaN is not a finite number"),
    "1e999": (raw(b'{"x": 1e999}'), "1e999 is not a finite number"),
    "integer of 400 digits": (raw(b'{"x": %s}' % (b"9" * 400)), "is not a finite number"),
    "nested": (raw(b'{"x": ' + b"[" * 99 + b"]" * 99 + b"}"), "nested too deeply"),
    "millions of lists": (raw(b'{"x": [' + b"[]," * 3_000_000 + b"[]]}"), "more than 4,000,000 items"),
    "name twice": (raw(b'{"x": 1, "x": 2}'), "key 'x' is there twice"),
    "field twice": (raw(b'{"x": {"dtype": "BF16", "dtype": "F32"}}'), "key 'dtype' is there twice"),
    "metadata a list": (header(lambda parsed: parsed.update(__metadata__=[])), "__metadata__ of its header"),
    "metadata of numbers": (header(lambda parsed: parsed.update(__metadata__={"a": 1})), "__metadata__ of its header"),
    "entry a list": (header(lambda parsed: parsed.update({NORM: []})), f"malformed header entry of {NORM}"),
    "no dtype": (header(lambda parsed: parsed[NORM].pop("dtype")), f"malformed header entry of {NORM}"),
    "another field": (norm(strides=[1]), f"malformed header entry of {NORM}"),
    "dtype a list": (norm(dtype=["BF16"]), f"malformed header entry of {NORM}"),
    "dtype null": (norm(dtype=None), f"malformed header entry of {NORM}"),
    "dtype FP8": (norm(dtype="F8_E4M3"), rf"unsupported types: {NORM} \(F8_E4M3\)"),
    "shape a number": (norm(shape=64), f"malformed header entry of {NORM}"),
    "shape a string": (norm(shape="64"), f"malformed header entry of {NORM}"),
    "shape of booleans": (norm(shape=[64, True]), f"malformed header entry of {NORM}"),
    "shape of floats": (norm(shape=[64.0]), f"malformed header entry of {NORM}"),
    "negative shape": (norm(shape=[-64]), f"malformed header entry of {NORM}"),
    "shape of two negatives": (norm(shape=[-8, -8]), f"malformed header entry of {NORM}"),
    "shape beyond 64 bits": (norm(shape=[0, 2**63]), f"malformed header entry of {NORM}"),
    "shape that wraps": (header(overflow), r"x: 0 bytes for shape \[4611686018427387904, 4\]"),
    "shape of many sizes": (norm(shape=[2**62] * 300_000), f"malformed header entry of {NORM}"),
    "scalar": (norm(shape=[]), f"{NORM}: 128 bytes for shape"),
    "one offset": (norm(data_offsets=[0]), f"malformed header entry of {NORM}"),
    "three offsets": (norm(data_offsets=[0, 1, 2]), f"malformed header entry of {NORM}"),
    "offsets a string": (norm(data_offsets="01"), f"malformed header entry of {NORM}"),
    "offsets reversed": (norm(data_offsets=[128, 0]), f"malformed header entry of {NORM}"),
    "offsets negative": (norm(data_offsets=[-128, 0]), f"malformed header entry of {NORM}"),
    "offsets of floats": (norm(data_offsets=[0.0, 128.0]), f"malformed header entry of {NORM}"),
    "offsets of booleans": (norm(data_offsets=[False, 128]), f"malformed header entry of {NORM}"),
    "offsets beyond 64 bits": (norm(data_offsets=[2**70, 2**70 + 128]), f"malformed header entry of {NORM}"),
    "offsets beyond the file": (norm(data_offsets=[2**40, 2**40 + 128]), "damaged: .* follows 128 bytes of no tensor"),
    "offsets of another": (norm(data_offsets=[0, 128]), "damaged: .* overlaps the tensor before it"),
    "empty tensor": (
        header(lambda parsed: parsed.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
        "x is in .* but not there in the index",
    ),
    "long name": (header(lambda parsed: parsed.update({"x" * 501: parsed[NORM]})), "malformed header entry of x{500}"),
    "MTP block of 5000 digits": (
        header(lambda parsed: parsed.update({"mtp.layers." + "9" * 5000: parsed[NORM]})),
        "malformed header entry of mtp",
    ),
    "control characters": (
        header(lambda parsed: parsed.update({RED: parsed.pop(NORM)})),
        r"\\x1b\[31mred \\u202e is in .* but not there in the index",
    ),
    "surrogate": (header(lambda parsed: parsed.update({"\ud800": None})), r"malformed header entry of \\ud800"),
}
INDICES: dict[str, tuple[Damage, str]] = {
    "twice the same name": (twice(INDEX, ', "weight_map": {}}'), "key 'weight_map' is there twice"),
    "huge": (sparse(INDEX, 10**12), "larger than 200,000,000 bytes"),
    "list": (content(INDEX, "[1]"), "has no weight_map"),
    "weight_map a list": (content(INDEX, '{"weight_map": ["x"]}'), "has no weight_map"),
    "null byte": (index(x="a\0.safetensors"), r"x -> 'a\\x00\.safetensors'"),
    "surrogate": (index(x="\udc80.safetensors"), "not safetensors files of this directory"),
    "newline": (index(x="a\n.safetensors"), "not safetensors files of this directory"),
    "dots": (index(x=".."), "not safetensors files of this directory"),
    "directory below": (index(x="a/b.safetensors"), "not safetensors files of this directory"),
    "another kind": (index(x=CONFIG), "not safetensors files of this directory"),
    "long file name": (index(x="x" * 300 + ".safetensors"), r"not readable \(File name too long\)"),
    "name of control characters": (index(**{RED: "y"}), r"directory: \\x1b\[31mred \\u202e -> 'y'"),
    "is a directory": (replaced(INDEX, Path.mkdir), "is a directory, not a file"),
    "is a pipe": (replaced(INDEX, os.mkfifo), "is a pipe, socket or device"),
    "shard of before": (content("model-00003-of-00003.safetensors", ""), "checkpoint does not name: model-00003"),
    "single file too": (content(SINGLE, ""), "shards that the checkpoint does not name: model.safetensors"),
}
FILES: dict[str, tuple[Damage, str]] = {
    "shard is a directory": (replaced(FIRST, Path.mkdir), f"{FIRST}: is a directory, not a file"),
    "shard is a pipe": (replaced(FIRST, os.mkfifo), f"{FIRST}: is a pipe, socket or device"),
    "shard is a device": (linked(FIRST, "/dev/zero"), f"{FIRST}: is a pipe, socket or device"),
    "shard is a loop": (linked(FIRST, FIRST), r"not readable \(Too many levels of symbolic links\)"),
    "shard links away": (moved_out(FIRST), rf"{FIRST}: links to /.*/{FIRST}, outside the checkpoint; copy it there"),
    "index links away": (moved_out(INDEX), "outside the checkpoint; copy it there"),
    "config links away": (moved_out(CONFIG), "outside the checkpoint; copy it there"),
    "config links to a secret": (linked(CONFIG, "/etc/passwd"), "links to /etc/passwd, outside the checkpoint"),
    "dead link": (linked(FIRST, "nowhere"), f"missing shards: {FIRST}"),
    "config is a directory": (replaced(CONFIG, Path.mkdir), f"{CONFIG}: is a directory, not a file"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), f"{CONFIG}: is a pipe, socket or device"),
    "config is huge": (sparse(CONFIG, 10**12), "larger than 10,000,000 bytes"),
    "config is empty": (content(CONFIG, ""), "not readable as JSON"),
    "config has a key twice": (twice(CONFIG, ', "hidden_size": 64}'), "key 'hidden_size' is there twice"),
    "config of 9 MB in a value": (config(model_type="x" * 9_000_000), "and [0-9]{7} more characters"),
    "config of red letters": (config(model_type=RED), r"model_type '\\x1b\[31mred\\n\\u202e' is not supported"),
    "config with code": (config(auto_map={"AutoModel": "modeling_x.X"}), r"modeling_x.X'\} names code of the checkp"),
    "GPTQ": (config(quantization_config={"quant_method": "gptq"}), "weights quantized with 'gptq' are not supported"),
    "AWQ": (config(quantization_config={"quant_method": "awq"}), "weights quantized with 'awq' are not supported"),
    "no method": (
        config(quantization_config={"load_in_4bit": True}),
        r"quantization_config: weights quantized with a method that it does not name \(load_in_4bit True\) are not",
    ),
    "quantization a list": (config(quantization_config=["fp8"]), r"quantized with \['fp8'\] are not supported"),
    "empty directory": (only(), "is empty; give a Hugging Face checkpoint"),
    "other files": (only("README.md"), "no config.json in this directory"),
    "adapter": (only("adapter_config.json", "adapter_model.safetensors"), r"only an adapter \(LoRA\); merge it into"),
    "GGUF": (only("model-Q4_K_M.gguf"), "holds only GGUF files; get the safetensors checkpoint"),
    "archive": (only("model.tar.gz"), "holds only an archive; unpack it"),
    "hub cache": (only("blobs", "refs", "snapshots"), "cache of the Hugging Face hub; give the directory in snapshots"),
}
ERRORS = {
    **{f"header: {name}": case for name, case in HEADERS.items()},
    **{f"index: {name}": case for name, case in INDICES.items()},
    **{f"file: {name}": case for name, case in FILES.items()},
}


@pytest.mark.parametrize("case", ERRORS)
def test_refused_in_one_line(copy: Path, limits: Limits, case: str) -> None:
    damage, message = ERRORS[case]
    damage(copy)
    with limits(), pytest.raises(SlimError, match=message) as caught:
        HFCheckpoint.open(copy)
    assert str(caught.value).isprintable() and str(copy) in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_the_undamaged_checkpoint_is_read(good: Path, limits: Limits) -> None:
    """What makes the test above mean something."""
    with limits():
        tensors = read_all(good)
    assert all(same_bytes(tensors[name], tensor) for name, tensor in random_tensors(SHAPE).items())
    assert (good / FIRST).is_file() and (good / SECOND).is_file()


def test_experts_by_the_billion(tmp_path: Path, limits: Limits) -> None:
    """What the header of a fused tensor and config.json agree on, with no space on the disk taken."""
    experts = "model.layers.0.mlp.experts"
    count = 10**9
    sizes = {"moe_intermediate_size": 1, "hidden_size": 1, "num_experts": count}
    path = write_tiny_checkpoint(tmp_path / "hf", SHAPE, shards=1)
    config(**sizes)(path)
    tensors, end = {}, 0
    for name, shape in ((f"{experts}.gate_up_proj", [count, 2, 1]), (f"{experts}.down_proj", [count, 1, 1])):
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end = tensors[name]["data_offsets"][1]
    payload = json.dumps(tensors).encode()
    sparse(SINGLE, 8 + len(payload) + end, struct.pack("<Q", len(payload)) + payload)(path)
    with limits(), pytest.raises(CheckpointError, match=f"missing tensors: 2 found; .* need more than {count}"):
        HFCheckpoint.open(path)


@pytest.mark.parametrize("name", ["model.zip", "model.gguf", "model.safetensors"])
def test_a_file_for_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: is a file, not a checkpoint directory; give the directory"):
        HFCheckpoint.open(tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.Q8_0.gguf", "pytorch_model.bin", "model.tgz"])
def test_other_weights_next_to_a_config(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(good / CONFIG, tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}: holds only .*; "):
        HFCheckpoint.open(tmp_path)


def test_weights_that_are_not_shards_may_be_there_too(copy: Path) -> None:
    (copy / "consolidated.safetensors").touch()
    (copy / "model.safetensors.old").touch()
    assert read_all(copy).keys() == random_tensors(SHAPE).keys()


@pytest.mark.parametrize("metadata", [None, {"total_size": 1}, {"total_size": "x"}])
def test_the_index_s_metadata_is_not_looked_at(copy: Path, metadata: Any) -> None:
    """Published checkpoints have it wrong."""
    edit(INDEX, lambda parsed: parsed.update(metadata=metadata))(copy)
    assert read_all(copy).keys() == random_tensors(SHAPE).keys()


def in_hub_cache(source: Path, hub: Path) -> Path:
    """A checkpoint as the Hugging Face hub's library keeps it."""
    snapshot, blobs = hub / "snapshots" / "0123abcd", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_links_of_the_hub_s_cache_are_followed(good: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(good, tmp_path / "models--a--b")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert all(same_bytes(tensor, random_tensors(SHAPE)[name]) for name, tensor in read_all(path).items())


def test_links_into_another_cache_are_not(good: Path, tmp_path: Path) -> None:
    other = in_hub_cache(good, tmp_path / "models--a--b")
    snapshot = in_hub_cache(good, tmp_path / "models--a--c")
    linked(FIRST, other / FIRST)(snapshot)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        HFCheckpoint.open(snapshot)


def test_blobs_are_those_of_a_cache(good: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(good, tmp_path / "hub")
    other = snapshot.parent.rename(tmp_path / "hub" / "models") / snapshot.name
    with pytest.raises(CheckpointError, match=r"config.json: links to .*/blobs/\d, outside the checkpoint"):
        HFCheckpoint.open(other)


def test_links_within_the_directory_are_followed(copy: Path) -> None:
    (copy / "files").mkdir()
    (copy / FIRST).rename(copy / "files" / "shard")
    (copy / FIRST).symlink_to(Path("files", "shard"))
    assert read_all(copy).keys() == random_tensors(SHAPE).keys()


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(("name", "mode"), [(CONFIG, 0), (INDEX, 0), (FIRST, 0), (".", 0), (".", 0o111)])
def test_no_permission(good: Path, name: str, mode: int) -> None:
    with tempfile.TemporaryDirectory() as outside:  # the directories of pytest are closed to others
        os.chmod(outside, 0o755)
        copy = Path(shutil.copytree(good, Path(outside) / "hf"))
        (copy / name).chmod(mode)
        with unprivileged(), pytest.raises(SlimError, match=r"not readable \(Permission denied\)") as caught:
            HFCheckpoint.open(copy)
        (copy / name).chmod(0o755)
    assert str(copy / name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: os.truncate(shard, 1000), "the file ends inside a tensor"),
        (os.unlink, r"is not readable \(No such file or directory\)"),
    ],
)
def test_a_file_that_changes_after_it_was_checked(copy: Path, change: Damage, message: str) -> None:
    checkpoint = HFCheckpoint.open(copy)
    change(shard_with(copy))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(NORM)


def test_values_that_are_not_finite(copy: Path) -> None:
    name = "model.embed_tokens.weight"
    shard = shard_with(copy, name)
    tensors = load_file(shard)
    tensors[name][5, 3], tensors[name][7, 0], tensors[name][7, 1] = math.nan, math.inf, -math.inf
    save_file(tensors, shard)
    checkpoint = HFCheckpoint.open(copy)
    message = rf"hf: {name}: 3 of 8192 values are NaN or infinite; repair .* --allow-nonfinite"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(name)
    with pytest.raises(CheckpointError, match=rf"{name}: 2 of 128 values are NaN or infinite"):
        checkpoint.read_rows(name, np.array([7, 6]))
    assert same_bytes(checkpoint.read_rows(name, np.array([6, 8])), tensors[name][[6, 8]])
    trusting = HFCheckpoint.open(copy, allow_nonfinite=True)
    assert same_bytes(trusting.read(name), tensors[name])
    assert same_bytes(trusting.read_rows(name, np.array([7])), tensors[name][[7]])


def test_values_whose_sum_overflows_are_finite(copy: Path) -> None:
    shard = shard_with(copy)
    tensors = load_file(shard)
    tensors[NORM].fill_(torch.finfo(torch.bfloat16).max)
    save_file(tensors, shard)
    assert same_bytes(HFCheckpoint.open(copy).read(NORM), tensors[NORM])


def test_a_tool_reports_it_in_one_line(copy: Path, tool: Callable[..., Any]) -> None:
    header(lambda parsed: parsed.update({RED: parsed.pop(NORM)}))(copy)
    outcome = tool("tools/convert_checkpoint.py", "--load", copy, "--save", copy.with_name("out"))
    assert r"\x1b[31mred \u202e is in" in outcome.error
    assert outcome.stdout == "" and not copy.with_name("out").exists()
