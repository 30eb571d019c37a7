"""The pass of one shard: what the heads are given is written as it comes."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.architecture.table import OUTPUT
from megatron_slim.checkpoint.raw_files import OutputFile, as_bytes
from megatron_slim.errors import CheckpointError
from megatron_slim.files import fsync_path, remove, to_json, write_atomic
from megatron_slim.products import linear
from megatron_slim.streaming.forward import FINAL_NORM, MTP_NORM, StreamingForward
from megatron_slim.teacher_cache.cache import shard_files
from megatron_slim.teacher_cache.guessing import judge_teacher
from megatron_slim.teacher_cache.stored_states import decode, encode

ROWS_AT_ONCE = 64  # whose logits are in memory in fp64
MEASURED_ROWS = 512  # of a shard, in which the error of rounding is measured


@dataclass(frozen=True)
class Recorded:
    """Samples to record.

    Attributes:
        tokens: ids [samples, S + 1].
        loss_mask: [samples, S], 1 where the prediction of the next token counts.
        position_ids: [samples, S].
        documents: whether documents of a sample do not see each other.
        about: where they come from.
    """

    tokens: npt.NDArray[Any]
    loss_mask: npt.NDArray[Any]
    position_ids: npt.NDArray[Any]
    documents: bool
    about: Mapping[str, Any]

    @staticmethod
    def whole(tokens: npt.NDArray[Any], about: Mapping[str, Any]) -> Recorded:
        """Samples of one document each, in which every prediction counts."""
        shape = len(tokens), tokens.shape[1] - 1
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        return Recorded(tokens, np.broadcast_to(np.uint8(1), shape), positions, False, about)


class RecordingPass(StreamingForward):
    """Writes what the heads are given, as it comes."""

    whole_mtp = True  # as in training, where hidden states of all heads have the same length

    def prepare(self, path: Path, number: int, kind: str, samples: Recorded, rows: range) -> None:
        """Say where the states of which samples go, and in which type."""
        self._file, self._described = shard_files(path, number)
        self._kind, self._rows = kind, rows
        self._labels = torch.from_numpy(np.array(samples.tokens[rows.start : rows.stop, 1:], dtype=np.int64))
        mask = torch.from_numpy(np.array(samples.loss_mask[rows.start : rows.stop], dtype=np.bool_)).flatten()
        self._chosen = (mask if mask.any() else ~mask).nonzero()[:MEASURED_ROWS, 0]
        self._partial = self._file.with_name(f".{self._file.name}.partial")
        self._checksums: list[list[int]] = []
        self._measured: list[Tensor] = []
        remove(self._partial)  # of a process that was killed
        self._output = OutputFile(self._partial)

    def leave(self, module: str) -> None:
        """Write what a head is given."""
        if module not in (FINAL_NORM, MTP_NORM):
            return
        checksums: list[int] = []
        for states in self.batches():
            if not bool(torch.isfinite(states).all()):
                where = f"{self.checkpoint.path}"
                raise CheckpointError("its hidden states are not finite", where=where, fix="its weights are broken")
            content = encode(states, self._kind)
            if module == FINAL_NORM:
                self._measure(states, content, len(checksums))
            for sample in content.cpu():
                view = as_bytes(sample.contiguous())
                self._output.append([view])
                checksums.append(zlib.crc32(view))
        self._checksums.append(checksums)

    def finish(self, *, check_teacher: bool) -> None:
        """Make it a shard.

        Raises:
            CheckpointError: the teacher predicts no better than guessing, and that is checked.
        """
        self._output.close()
        loss, divergence = torch.cat(self._measured, dim=1)
        if check_teacher:
            judge_teacher(float(loss.mean()), self.shape.vocab_size, self.checkpoint.path)
        os.replace(self._partial, self._file)
        fsync_path(self._file.parent)
        measured = {
            "loss": float(loss.mean()),
            "kl": float(divergence.mean()),
            "largest_kl": float(divergence.max()),
            "tokens": len(loss),
        }
        description = {"first": self._rows.start, "samples": len(self._rows), "crc32": self._checksums}
        write_atomic(self._described, to_json({**description, "measured": measured}))

    def _measure(self, states: Tensor, content: Tensor, first: int) -> None:
        """Of the rows chosen that are here: the teacher's cross entropy, and KL(its states || the stored), in nats."""
        length = self._labels.shape[1]
        rows = self._chosen[self._chosen >= first * length] - first * length
        rows = rows[rows < len(states) * length]
        if not len(rows):
            return
        stored = decode(content, self._kind, self.shape.hidden_size)
        exact, rounded = (each.flatten(0, 1)[rows].to(states.device).float() for each in (states, stored))
        labels = self._labels[first : first + len(states)].flatten()[rows].to(states.device)
        weight = self.weight(OUTPUT).float()
        for part in torch.arange(len(rows), device=states.device).split(ROWS_AT_ONCE):
            logits = linear(exact[part], weight).double()
            # The difference by itself: that of two logits in fp32 has their rounding, which is more than bf16's.
            change = linear(rounded[part] - exact[part], weight).double()
            log_p, log_q = logits.log_softmax(-1), (logits + change).log_softmax(-1)
            divergence = (log_p - log_q).mul_(log_p.exp()).sum(-1)
            self._measured.append(torch.stack([F.nll_loss(log_p, labels[part], reduction="none"), divergence]))
