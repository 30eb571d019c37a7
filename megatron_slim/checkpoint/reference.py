"""``slim_reference.json``: some tokens and the loss that a model has on each of them, next to its checkpoint.

Written where the model was evaluated in the streaming pass, which builds no pipeline and shards nothing. A training run
whose teacher, as loaded and sharded there, gives other losses on the same tokens has another teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_slim.aliases import Document
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.checkpoint.elastic_record import carry_elastic
from megatron_slim.checkpoint.iterations import roots
from megatron_slim.checkpoint.records import REFERENCE
from megatron_slim.checkpoint.units import Checkpoint
from megatron_slim.errors import CheckpointError
from megatron_slim.files import read_json, to_json, write_atomic

SAMPLES, TOKENS = 4, 512  # kept of an evaluation: enough for a mean, and a file of some kilobytes
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Losses of a model's main head.

    Attributes:
        tokens: ids, [samples][length].
        losses: nats of every token but each sample's first, [samples][length - 1].
        dtype: coarsest type that weights and activations have been through.
    """

    tokens: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    dtype: str

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], dtype: str) -> Reference:
        """The part of an evaluation that is kept; causal, so that the beginning of a sample stands for itself."""
        return Reference(
            tuple(tuple(map(int, row[:TOKENS])) for row in tokens[:SAMPLES]),
            tuple(tuple(round(float(loss), 6) for loss in row[: TOKENS - 1]) for row in losses[:SAMPLES]),
            dtype,
        )

    def save(self, directory: Path) -> None:
        """Write it next to a checkpoint."""
        write_atomic(directory / REFERENCE, to_json(dataclasses.asdict(self)))


def read_reference(directory: Path, vocab_size: int) -> Reference | None:
    """What was recorded for a checkpoint, None where nothing was recorded.

    Raises:
        CheckpointError: it is malformed, or has token ids beyond the vocabulary.
    """
    file = directory / REFERENCE
    if not file.is_file():
        return None
    content = read_json(file, max_bytes=1_000_000)
    try:
        tokens, losses, dtype = (content[name] for name in ("tokens", "losses", "dtype"))
        whole = [0 < len(ids) - 1 == len(row) < TOKENS for ids, row in zip(tokens, losses, strict=True)]
        good = bool(whole) and all(whole) and dtype in _DTYPES
        good &= all(type(token) is int and 0 <= token < vocab_size for ids in tokens for token in ids)
        good &= all(isinstance(loss, (int, float)) and math.isfinite(loss) for row in losses for loss in row)
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        fix = "write it again with megatron-slim evaluate --record, or remove it"
        raise CheckpointError("is not a record of tokens and losses of this model", where=str(file), fix=fix)
    return Reference(tuple(map(tuple, tokens)), tuple(map(tuple, losses)), dtype)


def carry_records(source: Checkpoint, target: Path, *, dtype: torch.dtype | None, quantized: bool = False) -> Document:
    """Take along what is true of the same model in another format; one in FP8 has other losses than those on record."""
    losses = {} if quantized else carry_reference(source, target, dtype)
    return {**losses, **carry_elastic(source, target)}


def carry_reference(source: Checkpoint, target: Path, dtype: torch.dtype | None) -> Document:
    """Take it along to the same model in another format, whose losses are the same; ``dtype`` if that was cast."""
    for directory in roots(source.path):
        if (found := read_reference(directory, source.shape.vocab_size)) is not None:
            if dtype is not None and dtype != torch.float32:
                found = dataclasses.replace(found, dtype=dtype_name(dtype))
            found.save(target)
            return {"reference": REFERENCE}
    return {}
