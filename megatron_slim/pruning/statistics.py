"""What calibration measured: a file of statistics, read, checked against a model's shape, and written.

In a pruned checkpoint it is ``calibration.stats``. Its format is that of safetensors, its name must not be: vLLM and
SGLang load every ``*.safetensors`` of a directory without an index as weights, some of them at any depth.

Tensors, all float32 (L layers, H hidden, E experts, F neurons of one; a block is ``model.layers.{i}`` or
``mtp.layers.{i}``); `importance` has the definitions:

    hidden.{norm_activation|norm_activation_l2}         [H]     of the residual stream
    {block}.cosine                                      []      cos of mean-pooled layer input and output
    {block}.block_influence                             []      1 - mean cos of layer input and output
    {block}.mlp.experts.{name of an importance}               [E]        `expert_metrics` has them
    {block}.mlp.experts.similarity.{name of a similarity}     [E, E]     cosines
    {block}.mlp.experts.ffn                             [E, F]  neurons of every routed expert
    {block}.mlp.shared_expert.ffn                       [S]     neurons of the shared expert, where there is one
    {block}.mlp.ffn                                     [S]     neurons of a dense block
    {block}.self_attn.heads                             [query heads]   of full attention
    {block}.linear_attn.value_heads                     [value heads]   of Gated DeltaNet

The file's metadata says which checkpoint and how much data it came from. A file may lack metrics of experts that are
newer than it, or have some that this program does not know: what is there is checked, and a plan needs only what its
recipe names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_slim.aliases import JsonObject
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.prunable import PrunableAxis
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.records import FORMER_STATS, STATS
from megatron_slim.errors import CheckpointError
from megatron_slim.expert_metrics import EXPERT_IMPORTANCES, EXPERT_SIMILARITIES
from megatron_slim.files import sha256, write_atomic
from megatron_slim.recipe_sections import CHOICES

FORMAT = "megatron_slim statistics 2"
LAYER_KINDS = ("cosine", "block_influence")
Array = npt.NDArray[np.float32]


def hidden_key(kind: str) -> str:
    """Name of the importances of the hidden dimensions."""
    return f"hidden.{kind}"


def importance_key(block: str, kind: str) -> str:
    """Name of a block's expert importances."""
    return f"{block}.mlp.experts.{kind}"


def similarity_key(block: str, kind: str) -> str:
    """Name of a block's expert similarities."""
    return f"{block}.mlp.experts.similarity.{kind}"


def layer_key(block: str, kind: str) -> str:
    """Name of what a layer does to its input."""
    return f"{block}.{kind}"


def axis_key(block: str, axis: PrunableAxis) -> str:
    """Name of a block's importances of an axis that declares them: of neurons, or heads."""
    assert axis.statistic, "a recipe chooses it"
    return f"{block}.{axis.statistic}"


def expected_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a model's statistics have, and its shape."""
    for kind in CHOICES["width.importance"]:
        yield hidden_key(kind), (shape.hidden_size,)
    for block in shape.blocks:
        yield from ((layer_key(block, kind), ()) for kind in LAYER_KINDS)
        heads, network = KINDS[shape.layer_type(block)].heads, FEED_FORWARD[shape.ffn_kind(block)]
        yield axis_key(block, heads), (getattr(shape, heads.field),)
        if neurons := getattr(shape, network.neurons.field):
            yield axis_key(block, network.neurons), (neurons,)
        if not network.is_routed:
            continue
        experts = shape.in_block(block).num_moe_experts
        yield axis_key(block, EXPERT_NEURONS), (experts, getattr(shape, EXPERT_NEURONS.field))
        for kind in EXPERT_IMPORTANCES:
            yield importance_key(block, kind), (experts,)
        for kind in EXPERT_SIMILARITIES:
            yield similarity_key(block, kind), (experts, experts)


class _Tensors(dict[str, Array]):
    """Tensors by name; one that is not there is an error that says what to do."""

    def __missing__(self, name: str) -> Array:
        raise CheckpointError(
            f"the statistics have no {name}, which this recipe needs",
            fix="calibrate again: megatron-slim calibrate measures it, or name another metric in the recipe",
        )


def _is_expert_metric(name: str) -> bool:
    """Whether a tensor is a metric of experts, which a file may have or not."""
    return ".mlp.experts." in name and not name.endswith(".ffn")


def _refuse_other_format(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"not a file of calibration statistics (metadata 'format' is not {FORMAT!r})",
            where=str(path),
            fix="make it with megatron-slim calibrate",
        )


@dataclass(frozen=True)
class Statistics:
    """A complete set of calibration statistics.

    Attributes:
        tensors: see the module's docstring; one that is not there is a `CheckpointError`.
        metadata: ``source_sha256``, ``num_samples``, ``seq_length``, versions.
    """

    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", _Tensors(self.tensors))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a statistics file.

        Args:
            path: the file, or the directory of a pruned checkpoint that keeps it under its present or former name.

        Raises:
            CheckpointError: the file is missing, is not a safetensors file or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if path.is_dir():
            path = next(filter(Path.is_file, (path / STATS, path / FORMER_STATS)), path / STATS)
        if not path.is_file():
            raise CheckpointError("no such file", where=str(path), fix="make it with megatron-slim calibrate")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                _refuse_other_format(metadata, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(f"not readable as safetensors ({error})", where=str(path)) from None
        return cls(tensors, metadata)

    def save(self, path: Path | str) -> None:
        """Write the statistics; equal statistics give equal bytes."""
        write_atomic(Path(path), self._serialized)

    @property
    def sha256(self) -> str:
        """Hash of the statistics and their metadata."""
        return sha256(self._serialized)

    @property
    def source(self) -> str | None:
        """Fingerprint of the checkpoint that they were measured on."""
        return self.metadata.get("source_sha256")

    @functools.cached_property
    def _serialized(self) -> bytes:
        # Not safetensors' own writer: it puts metadata in random order, so that equal statistics differ in bytes.
        header: JsonObject = {"__metadata__": dict(sorted(self.metadata.items()))}
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
            CheckpointError: another source, a missing tensor that is not a metric of experts, a wrong shape or type, a
                value that is not finite; lists the first few violations.
        """
        measured = self.source
        if measured != source_sha256:
            raise CheckpointError(
                f"measured on another checkpoint (source_sha256 {measured}, this one has {source_sha256})",
                where=where,
                fix="calibrate on this one",
            )
        expected = dict(expected_shapes(shape))
        known = {name for name in expected if not _is_expert_metric(name)}
        found = [f"missing tensor {name}" for name in expected if name in known and name not in self.tensors]
        found += [f"extra tensor {n}" for n in self.tensors if n not in expected and not _is_expert_metric(n)]
        for name, extents in expected.items():
            value = self.tensors.get(name)
            if value is not None and (value.shape != extents or value.dtype != np.float32):
                found.append(f"{name} is {value.dtype} {list(value.shape)}, not float32 {list(extents)}")
            elif value is not None and not np.isfinite(value).all():
                found.append(f"{name} has values that are not finite")
        if found:
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise CheckpointError("; ".join(found[:5]) + more, where=where, fix="calibrate again")
