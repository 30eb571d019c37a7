"""Record what a teacher ends with: a streaming pass for every shard, one block of weights in memory at a time."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from megatron_slim import __version__
from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.table import OUTPUT, names_of
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.dtype_names import dtype_name
from megatron_slim.compat import runtime
from megatron_slim.files import check_space, file_sha256, fsync_path, read_json, to_json
from megatron_slim.sample_set import write_samples
from megatron_slim.streaming.fingerprint import fingerprint
from megatron_slim.teacher_cache.cache import FORMAT, WEIGHT, TeacherCache, open_cache, shard_files
from megatron_slim.teacher_cache.names import CONFIG, HEAD
from megatron_slim.teacher_cache.recording import (
    Recording,
    begin,
    bytes_to_write,
    check_place,
    declare,
    samples_at_once,
    wait_for_start,
)
from megatron_slim.teacher_cache.recording_pass import Recorded, RecordingPass
from megatron_slim.teacher_cache.stored_states import row_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordOptions:
    """How a teacher is recorded.

    Attributes:
        kind: type of the states, a key of `stored_states.TYPES`.
        dtype: of weights and activations; None, see `runtime.default_dtype`.
        micro_batch_size: samples in one forward pass; None, about 4096 tokens.
        round_tokens: of a shard; None, see `recording.samples_at_once`.
        check_teacher: refuse a teacher that predicts no better than guessing.
        rank: which of the processes that record this is.
        world: how many there are.
        announce: is called before the first pass with the tokens, bytes and shards that are to be recorded.
    """

    kind: str = "bf16"
    dtype: torch.dtype | None = None
    micro_batch_size: int | None = None
    round_tokens: int | None = None
    check_teacher: bool = True
    rank: int = 0
    world: int = 1
    announce: Callable[[int, int, int], None] = lambda tokens, nbytes, shards: None


@torch.no_grad()
def record(checkpoint: Checkpoint, samples: Recorded, save: Path, options: RecordOptions) -> TeacherCache | None:
    """Record a teacher on samples.

    Every process of several calls it; each records its own shards, and the first one makes the cache of them. Called
    again after a kill, it continues after the last finished shard.

    Args:
        checkpoint: the teacher.
        samples: what it reads.
        save: directory of the cache.
        options: how.

    Returns:
        The cache; None on processes other than the first.

    Raises:
        SlimError: there is one already, it was begun with other inputs, there is too little space, or the teacher's
            states are not finite.
    """
    if options.rank == 0:
        check_place(save)  # now, not after the teacher's fingerprint is read
    _choose_device()
    runtime.init_single_process()
    dtype = options.dtype or runtime.default_dtype()
    inputs = _inputs(checkpoint, samples, options, dtype)
    if options.rank > 0:
        recording = wait_for_start(save, inputs, options.round_tokens)
        if recording is not None:
            _record_shards(checkpoint, samples, recording, options, dtype)
        return None
    sizes = checkpoint.shape
    number_bytes = sizes.hidden_size * dtype.itemsize
    local = int(os.environ.get("LOCAL_WORLD_SIZE", options.world))
    most = samples_at_once(samples.loss_mask.shape[1], number_bytes, local, options.round_tokens)
    with begin(save, inputs, most, options.world, options.round_tokens) as (recording, is_new):
        sample_bytes = inputs["heads"] * samples.loss_mask.shape[1] * row_bytes(options.kind, sizes.hidden_size)
        states = bytes_to_write(recording, sample_bytes)
        check_space(recording.path, states)
        if is_new:
            _write_head(checkpoint, recording.path / HEAD)
            config = shape_to_hf_config(checkpoint.shape, checkpoint.config)
            (recording.path / CONFIG).write_text(to_json(config))
            arrays = samples.tokens, samples.loss_mask, samples.position_ids
            write_samples(recording.path, *arrays, documents=samples.documents, about=samples.about)
            fsync_path(recording.path)
            declare(recording, inputs, options.round_tokens)
        tokens = states // sample_bytes * samples.loss_mask.shape[1]
        options.announce(tokens, states, len(recording.missing()))
        _record_shards(checkpoint, samples, recording, options, dtype)
        recording.wait()
        recording.finish(_description(recording, inputs))
        return open_cache(recording.path)


def _choose_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def _inputs(checkpoint: Checkpoint, samples: Recorded, options: RecordOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides what is recorded."""
    checksum = 0
    for array in (samples.tokens, samples.loss_mask, samples.position_ids):
        checksum = zlib.crc32(np.ascontiguousarray(array, dtype=np.int32), checksum)
    return {
        "teacher": fingerprint(checkpoint),
        "hidden_size": checkpoint.shape.hidden_size,
        "vocab_size": checkpoint.shape.vocab_size,
        "heads": 1 + checkpoint.shape.mtp_num_layers,
        "samples": len(samples.tokens),
        "seq_length": samples.loss_mask.shape[1],
        "documents": samples.documents,
        "samples_crc32": checksum,
        "kind": options.kind,
        "micro_batch_size": options.micro_batch_size,
        "dtype": dtype_name(dtype),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "megatron_slim": __version__,
        "torch": torch.__version__,
    }


def _write_head(checkpoint: Checkpoint, file: Path) -> None:
    # Not save_file, which makes files that no one else may read.
    file.write_bytes(save({WEIGHT: checkpoint.read(names_of(checkpoint.shape)[OUTPUT]).contiguous()}))
    fsync_path(file)


def _record_shards(
    checkpoint: Checkpoint, samples: Recorded, recording: Recording, options: RecordOptions, dtype: torch.dtype
) -> None:
    """Record the shards of this process that are not there yet."""
    missing = recording.missing(options.rank, options.world)
    for done, number in enumerate(missing):
        rows = recording.rounds[number]
        tokens = np.array(samples.tokens[rows.start : rows.stop, :-1], dtype=np.int64)
        micro_batch = options.micro_batch_size or max(1, 4096 // tokens.shape[1])
        positions = samples.position_ids[rows.start : rows.stop] if samples.documents else None
        forward = RecordingPass(checkpoint, tokens, micro_batch_size=micro_batch, dtype=dtype, position_ids=positions)
        forward.prepare(recording.path, number, options.kind, samples, rows)
        forward.run(f"recording shard {done + 1} of {len(missing)}")
        forward.finish(check_teacher=options.check_teacher and done == 0)


def _description(recording: Recording, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `cache.open_cache` reads."""
    shards = range(len(recording.rounds))
    measured = [read_json(shard_files(recording.path, number)[1])["measured"] for number in shards]
    tokens = sum(each["tokens"] for each in measured)
    loss, kl = (math.fsum(each[name] * each["tokens"] for each in measured) / tokens for name in ("loss", "kl"))
    figures = {
        "measured_tokens": tokens,
        "teacher_loss": loss,
        "kl_of_rounding": kl,
        "largest_kl_of_rounding": max(each["largest_kl"] for each in measured),
    }
    kept = ("teacher", "hidden_size", "vocab_size", "heads", "kind", "dtype", "micro_batch_size")
    return {
        "format": FORMAT,
        "shards": len(recording.rounds),
        "head_sha256": file_sha256(recording.path / HEAD),
        "figures": figures,
        **{name: inputs[name] for name in kept},
    }
