"""The files of a Hugging Face checkpoint directory: which there are, which are its own, and their headers.

Links. The files of a checkpoint may be links to other files in its directory. The cache of the Hugging Face hub keeps
``snapshots/REVISION/`` full of links into ``blobs/`` next to ``snapshots/``, so for a directory there, these are its
own too. A link to anywhere else is refused: a downloaded directory could have any file of this machine read as
weights, and copied next to them.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_slim.aliases import JsonObject
from megatron_slim.checkpoint.foreign import refuse_quantized
from megatron_slim.checkpoint.fp8 import QUANTIZATION, plain_config
from megatron_slim.checkpoint.safetensors_reader import TensorEntry, read_header
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import read_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_CONFIG_BYTES = 10_000_000
_SHARD = re.compile(r"model(\.safetensors)?(-\d+-of-\d+)?\.safetensors")
# What people give instead of a checkpoint: file names, what it is, what to do.
_INSTEAD = (
    (("snapshots",), "is a cache of the Hugging Face hub", "give the directory in snapshots/ that holds config.json"),
    (("adapter_config.json", "adapter_model.*"), "holds only an adapter (LoRA)", "merge it into its model first"),
    (("*.gguf",), "holds only GGUF files", "get the safetensors checkpoint that they were made of"),
    (
        ("pytorch_model*.bin", "*.pt", "*.pth"),
        "holds only pickled weights (pytorch_model*.bin), which are never loaded",
        "save the model as safetensors",
    ),
    (("weights*.npz",), "holds only weights of MLX (npz)", "get the checkpoint that they were made of"),
    (
        ("*.h5", "*.msgpack", "*.onnx", "*.tflite"),
        "holds only weights of another framework (TensorFlow, Flax, ONNX)",
        "save the model as safetensors, with PyTorch",
    ),
    (("*.zip", "*.tar", "*.tar.*", "*.tgz"), "holds only an archive", "unpack it"),
)


def find_file(directory: Path, name: str) -> Path | None:
    """A regular file of a checkpoint directory; None if there is no such file.

    Raises:
        CheckpointError: it is not a regular file, cannot be read, or is a link that leaves the checkpoint.
    """
    file = directory / name
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"not readable ({error.strerror})", where=str(file)) from None
    if not stat.S_ISREG(mode):
        kind = "is a directory" if stat.S_ISDIR(mode) else "is a pipe, socket or device"
        raise CheckpointError(f"{kind}, not a file", where=str(file))
    root, target = directory.resolve(), file.resolve()  # a directory on the way to it may be a link, too
    own = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(place) for place in own):
        raise CheckpointError(f"links to {target}, outside the checkpoint", where=str(file), fix="copy it there")
    return file


def read_config(path: Path, *, fp8: bool = False) -> JsonObject:
    """config.json of a checkpoint directory.

    Args:
        path: the directory.
        fp8: accept that it says that the weights are in FP8.

    Raises:
        CheckpointError: there is no such directory, no config.json in it, or one of a model that needs code of its
            own or holds quantized weights.
    """
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("no such directory", where=str(path), fix="give the one with config.json") from None
    except OSError as error:
        raise CheckpointError(f"not readable ({error.strerror})", where=str(path)) from None
    if not is_directory:
        fix = "give the directory that holds config.json"
        raise CheckpointError("is a file, not a checkpoint directory", where=str(path), fix=fix)
    file = find_file(path, CONFIG)
    if file is None:
        what, fix = f"no {CONFIG} in this directory", "give a Hugging Face checkpoint"
        if find_file(path, INDEX) is None and find_file(path, SINGLE) is None:
            what, fix = _what_is_there(path) or (what, fix)
        raise CheckpointError(what, where=str(path), fix=fix)
    config = read_json(file, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=str(file))
    if config.get("auto_map"):
        raise CheckpointError(
            f"auto_map {config['auto_map']!r} names code of the checkpoint's own, which is never run",
            where=str(file),
            fix="remove the key if the model needs no such code",
        )
    refuse_quantized(config, file, fp8)
    return config


def is_fp8(path: Path) -> bool:
    """Whether config.json says that the weights are in block-scaled FP8; raises as `read_config`."""
    return QUANTIZATION in read_config(path, fp8=True)


def read_plain_config(path: Path) -> JsonObject:
    """config.json of a directory that describes weights elsewhere: of FP8, that of the same weights in bf16.

    Raises:
        CheckpointError: as of `read_config`.
    """
    return plain_config(read_config(path, fp8=True))


def has_tensors(path: Path) -> bool:
    """Whether a directory has files of weights, or says so."""
    return any((path / name).exists() for name in (INDEX, SINGLE))


def read_headers(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, TensorEntry]:
    """Every tensor of every shard; the index and the shards must agree in both directions.

    Args:
        path: the directory.
        dtypes: the types to accept, by the names that the safetensors format has for them.
    """
    weight_map = _read_weight_map(path)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    files = {name: find_file(path, name) for name in names}
    if absent := [name for name, file in files.items() if file is None]:
        raise CheckpointError(f"missing shards: {summarise(absent)}", where=str(path), fix="download them again")
    _refuse_strays(path, names)
    entries: dict[str, TensorEntry] = {}
    found: list[str] = []
    for shard, file in files.items():
        assert file is not None
        for name, entry in read_header(file, dtypes).items():
            if weight_map is not None and weight_map.get(name) != shard:
                found.append(f"{name} is in {shard} but not there in the index")
            entries[name] = entry
    for name, shard in (weight_map or {}).items():
        if name not in entries:
            found.append(f"{name} is in the index but not in {shard}")
    if found:
        raise CheckpointError(summarise(found), where=str(path / INDEX), fix="the index and the shards must agree")
    return entries


def _refuse_strays(path: Path, used: list[str]) -> None:
    """Refuse shards of another state of the model; other names (consolidated.safetensors) are none of our business."""
    if strays := [name for name in _names_in(path) if _SHARD.fullmatch(name) and name not in used]:
        raise CheckpointError(
            f"shards that the checkpoint does not name: {summarise(strays)}",
            where=str(path),
            fix="remove them, or download the index again: there may be two models in this directory",
        )


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """The index, None for a checkpoint in a single file."""
    file = find_file(path, INDEX)
    if file is None:
        if find_file(path, SINGLE) is not None:
            return None
        what, fix = _what_is_there(path) or (f"neither {INDEX} nor {SINGLE} in this directory", "download them again")
        raise CheckpointError(what, where=str(path), fix=fix)
    index = read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=str(file))
    if unsafe := [f"{name} -> {shard!r}" for name, shard in weight_map.items() if not _is_shard_name(shard)]:
        raise CheckpointError(
            f"weight_map entries that are not safetensors files of this directory: {summarise(unsafe)}", where=str(file)
        )
    return weight_map


def _is_shard_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name == os.path.basename(name)
        and name.endswith(".safetensors")
        and name.isprintable()
    )


def _what_is_there(path: Path) -> tuple[str, str] | None:
    """What a directory without a checkpoint holds, and what to do about it; None if it is nothing that we know."""
    names = _names_in(path)
    if not names:
        return "is empty", "give a Hugging Face checkpoint"
    for patterns, what, fix in _INSTEAD:
        if any(fnmatch.filter(names, pattern) for pattern in patterns):
            return what, fix
    return None


def _names_in(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"not readable ({error.strerror})", where=str(path)) from None
