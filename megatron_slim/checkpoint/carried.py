"""Tensors outside a language model that travel with it, such as a vision tower's (`architecture.wrapper`).

Nothing here knows what they mean. They are copied one by one, bit for bit; of some, only rows survive a pruning. In a
torch_dist checkpoint they are in one file next to config.json, in the format of safetensors and under another name:
what looks like weights would be loaded as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from megatron_slim.aliases import HFConfig, JsonObject
from megatron_slim.architecture.hf_config import language_config, wrapper_of
from megatron_slim.architecture.wrapper import Wrapper
from megatron_slim.checkpoint.finite import refuse_nonfinite
from megatron_slim.checkpoint.huggingface_files import find_file
from megatron_slim.checkpoint.raw_files import OpenFiles, OutputFile, as_bytes
from megatron_slim.checkpoint.records import CARRIED_CONTENT, CARRIED_TENSORS
from megatron_slim.checkpoint.safetensors_reader import TensorEntry, read_header
from megatron_slim.checkpoint.safetensors_writer import TensorSpec, start_shard
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.files import read_json, to_json

# Keys that a larger model has outside the part for its language model and that hold for that alone, too.
_OF_ALL = ("torch_dtype", "dtype", "tie_word_embeddings", "transformers_version", "quantization_config")
_CONTENT = "content"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CarriedTensors:
    """Some tensors, read when asked for.

    Attributes:
        entries: where each is.
        rows: of some, the rows that are left.
        content: digest of what the entries have, where it was recorded.
        allow_nonfinite: whether NaN and infinity may be among them.
    """

    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    content: str = ""
    allow_nonfinite: bool = False

    def __len__(self) -> int:
        return len(self.entries)

    def spec(self, name: str) -> TensorSpec:
        """Shape and type of one."""
        entry, rows = self.entries[name], self.rows.get(name)
        shape = entry.shape if rows is None else (rows.size, *entry.shape[1:])
        return TensorSpec(name, shape, entry.dtype)

    @property
    def specs(self) -> list[TensorSpec]:
        """Shapes and types of all."""
        return [self.spec(name) for name in self.entries]

    @property
    def by_name(self) -> dict[str, TensorSpec]:
        """The same by name."""
        return {spec.name: spec for spec in self.specs}

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(spec.nbytes for spec in self.specs)

    def with_rows(self, wrapper: Wrapper | None, kept: Rows) -> CarriedTensors:
        """The same, of those whose rows are hidden dimensions only ``kept``."""
        names = [] if wrapper is None else [name for name in wrapper.hidden_rows if name in self.entries]
        before = {name: self.rows.get(name, np.arange(self.entries[name].shape[0])) for name in names}
        return replace(self, rows={**self.rows, **{name: rows[kept] for name, rows in before.items()}})

    def write(self, entries: Mapping[str, TensorEntry], *, verify: bool, where: str) -> str:
        """Write all of them to places that are there, and read each back.

        Args:
            entries: the place of each.
            verify: compare what is read back.
            where: name of the target, for errors.

        Returns:
            The digest of all content: names, types, shapes and bytes; "" of none.

        Raises:
            CheckpointError: one is not finite or differs when read back, or they are not those that were recorded.
        """
        if not self.entries:
            return ""
        digest, source = hashlib.sha256(), hashlib.sha256()
        outputs, files = dict[Path, OutputFile](), OpenFiles()
        for name in sorted(self.entries):
            entry, rows = entries[name], self.rows.get(name)
            tensor = self.entries[name].read(files)
            source.update(_line(name, tensor))
            if not self.allow_nonfinite:
                refuse_nonfinite(tensor, name, str(self.entries[name].file))
            tensor = tensor if rows is None else tensor[torch.from_numpy(rows)]
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), name
            if entry.file not in outputs:
                outputs[entry.file] = OutputFile(entry.file, create=False)
            outputs[entry.file].write_at(entry.offset, as_bytes(tensor.contiguous()))
            line = _line(name, tensor)
            if verify and _line(name, entry.read(files)) != line:
                what = f"{name}: not what was written when read back"
                raise CheckpointError(what, where=where, fix="check disk and memory")
            digest.update(line)
        while outputs:
            outputs.popitem()[1].close()
        if self.content not in ("", source.hexdigest()):
            changed = next(iter(self.entries.values())).file
            raise CheckpointError("is not what was written", where=str(changed), fix="get the checkpoint again")
        return digest.hexdigest()

    def save(self, directory: Path, *, verify: bool) -> str:
        """Write them into their file next to a config.json, if there are any; gives the digest, "" of none."""
        if not self.entries:
            return ""
        places = start_shard(directory / CARRIED_TENSORS, self.specs)
        content = self.write(places, verify=verify, where=str(directory))
        (directory / CARRIED_CONTENT).write_text(to_json({_CONTENT: content}), encoding="utf-8")
        return content


def _line(name: str, tensor: Tensor) -> bytes:
    content = xxhash.xxh3_128_hexdigest(as_bytes(tensor.contiguous()))
    return f"{name} {list(tensor.shape)} {tensor.dtype} {content}\n".encode()


def content_of_all(content: str, carried: str) -> str:
    """One digest of a language model's and of what is carried with it; "" is of nothing."""
    return hashlib.sha256(f"{content} {carried}".encode()).hexdigest() if carried else content


def set_apart(
    headers: Mapping[str, TensorEntry], config: HFConfig, path: Path
) -> tuple[dict[str, TensorEntry], CarriedTensors]:
    """The tensors of a language model in the files of a checkpoint, under their names there, and all others.

    Raises:
        CheckpointError: these are not the tensors of the larger model that config.json describes.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return dict(headers), CarriedTensors()
    others = {name: entry for name, entry in headers.items() if wrapper.is_other(name)}
    hidden = language_config(config).get("hidden_size")
    if others and hidden is not None and (found := wrapper.violations(config, others, hidden)):
        raise CheckpointError("; ".join(found), where=str(path), fix="the vision tower is not one that is known")
    wrong = [name for name in wrapper.hidden_rows if name in others and others[name].shape[:1] != (hidden,)]
    if wrong and hidden is not None:
        raise CheckpointError(
            f"rows that are not the {hidden} hidden dimensions of the language model: {summarise(wrong)}",
            where=str(path),
            fix="the checkpoint and its config.json do not belong together",
        )
    return {name: entry for name, entry in headers.items() if name not in others}, CarriedTensors(others)


def without_the_rest(config: HFConfig, carried: CarriedTensors) -> tuple[str, ...]:
    """What a person should know where a larger model's config.json comes without any of its other tensors."""
    wrapper = wrapper_of(config)
    if wrapper is None or carried.entries:
        return ()
    return (f"no tensor of {wrapper.model_type} but its language model is there: that is written alone",)


def language_model_alone(config: HFConfig, carried: CarriedTensors) -> JsonObject:
    """The config.json of a checkpoint: that of its language model, where there are no tensors of the larger model."""
    wrapper = wrapper_of(config)
    if wrapper is None or carried.entries:
        return dict(config)
    text = dict(language_config(config))
    return {**{key: config[key] for key in _OF_ALL if key in config}, **text}


def read_carried(directory: Path) -> CarriedTensors:
    """What `CarriedTensors.save` wrote next to a config.json; none where there is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    file, record = find_file(directory, CARRIED_TENSORS), find_file(directory, CARRIED_CONTENT)
    if file is None:
        if record is not None:
            raise CheckpointError(f"there is no {CARRIED_TENSORS}", where=str(directory), fix="get it again")
        return CarriedTensors()
    content = read_json(record).get(_CONTENT, "") if record is not None else ""
    return CarriedTensors(dict(read_header(file)), content=content)
