"""What calibration measured: ``stats.safetensors``, read, checked against a model's shape, and written.

Tensors, all float32 (L layers, H hidden, E experts; a block is ``model.layers.{i}`` or ``mtp.layers.{i}``):

    hidden.importance                                  [H]     see `importance.HiddenImportance`
    model.layers.{i}.cosine                            []      cos of mean-pooled layer input and output
    {block}.mlp.experts.{frequency|soft_logits|reap}   [E]     see `importance.ExpertStatistics`
    {block}.mlp.experts.similarity.{router_weights|router_logits|expert_vectors}   [E, E]   cosines

The file's metadata says which checkpoint and how much data it came from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.errors import CheckpointError
from megatron_slim.files import sha256, write_atomic
from megatron_slim.recipe import CHOICES

FORMAT = "megatron_slim statistics 1"
HIDDEN = "hidden.importance"
IMPORTANCES, SIMILARITIES = CHOICES["experts.importance"], CHOICES["experts.similarity"]
Array = npt.NDArray[np.float32]


def importance_key(block: str, kind: str) -> str:
    """Name of a block's expert importances."""
    return f"{block}.mlp.experts.{kind}"


def similarity_key(block: str, kind: str) -> str:
    """Name of a block's expert similarities."""
    return f"{block}.mlp.experts.similarity.{kind}"


def cosine_key(layer: int) -> str:
    """Name of a layer's activation similarity."""
    return f"model.layers.{layer}.cosine"


def expected_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a model's statistics have, and its shape."""
    experts = shape.num_moe_experts
    yield HIDDEN, (shape.hidden_size,)
    for layer in range(shape.num_layers):
        yield cosine_key(layer), ()
    for block in shape.blocks:
        for kind in IMPORTANCES:
            yield importance_key(block, kind), (experts,)
        for kind in SIMILARITIES:
            yield similarity_key(block, kind), (experts, experts)


def _refuse_other_format(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"not a file of calibration statistics (metadata 'format' is not {FORMAT!r})",
            where=str(path),
            fix="make it with tools/calibrate.py",
        )


@dataclass(frozen=True)
class Statistics:
    """A complete set of calibration statistics.

    Attributes:
        tensors: see the module's docstring.
        metadata: ``source_sha256``, ``num_samples``, ``seq_length``, versions.
    """

    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a statistics file.

        Raises:
            CheckpointError: the file is missing, is no safetensors file or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise CheckpointError("no such file", where=str(path), fix="make it with tools/calibrate.py")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                _refuse_other_format(metadata, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(f"not readable as safetensors ({error})", where=str(path)) from None
        return cls(tensors, metadata)

    def save(self, path: Path) -> None:
        """Write the statistics; equal statistics give equal bytes."""
        write_atomic(path, self._serialized)

    @property
    def sha256(self) -> str:
        """Hash of the statistics and their metadata."""
        return sha256(self._serialized)

    @functools.cached_property
    def _serialized(self) -> bytes:
        # Not safetensors' own writer: it puts metadata in random order, so that equal statistics differ in bytes.
        header: dict[str, Any] = {"__metadata__": dict(sorted(self.metadata.items()))}
        payload = bytearray()
        for name, value in sorted(self.tensors.items()):
            data = np.ascontiguousarray(value, dtype="<f4").tobytes()
            offsets = [len(payload), len(payload) + len(data)]
            header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
            payload += data
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head + bytes(payload)

    def check(self, shape: ModelShape, source_sha256: str, *, where: str = "statistics") -> None:
        """Refuse statistics of another model.

        Raises:
            CheckpointError: another source, a missing or extra tensor, a wrong shape or type, a value that is not
                finite; lists the first few violations.
        """
        measured = self.metadata.get("source_sha256")
        if measured != source_sha256:
            raise CheckpointError(
                f"measured on another checkpoint (source_sha256 {measured}, this one has {source_sha256})",
                where=where,
                fix="calibrate on this one",
            )
        expected = dict(expected_shapes(shape))
        found = [f"missing tensor {name}" for name in expected if name not in self.tensors]
        found += [f"extra tensor {name}" for name in self.tensors if name not in expected]
        for name, extents in expected.items():
            value = self.tensors.get(name)
            if value is not None and (value.shape != extents or value.dtype != np.float32):
                found.append(f"{name} is {value.dtype} {list(value.shape)}, not float32 {list(extents)}")
            elif value is not None and not np.isfinite(value).all():
                found.append(f"{name} has values that are not finite")
        if found:
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError("; ".join(found[:5]) + more, where=where, fix="calibrate again")
