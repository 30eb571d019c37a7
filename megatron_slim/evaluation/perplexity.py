"""Token-weighted loss and perplexity of a checkpoint, one block in memory at a time.

The hidden states of all samples wait in memory while a block is loaded, every sample goes through it, and the block is
dropped: a model far larger than the machine can be evaluated. The blocks are Megatron-Core's own layers.

Within a sample of S tokens position i predicts token i + 1, so S - 1 tokens count; MTP depth k predicts token
i + 1 + k, so S - 1 - k tokens count there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim import device
from megatron_slim.architecture.qwen3_next import Weight
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.distributed import DistCheckpoint, is_torch_dist
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.layout import from_megatron
from megatron_slim.cli import progress
from megatron_slim.data import Tokens, read_samples
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.pruning.source import Source

HEAD_ROWS = 512  # positions whose logits are in memory at once: 0.3 GB of fp32 at a vocabulary of 151936
MTP_INPUT = ("mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")


@dataclass(frozen=True)
class Evaluation:
    """Losses of a checkpoint on some samples.

    Attributes:
        loss: mean cross entropy in nats over all predicted tokens.
        tokens: number of tokens predicted by the main head.
        mtp_loss: the same mean for each MTP depth, depth 1 first.
    """

    loss: float
    tokens: int
    mtp_loss: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


class DistSource:
    """A torch_dist checkpoint read under Hugging Face names; keeps the last parameter read.

    A Megatron parameter holds up to three Hugging Face tensors, which are asked for one after the other.
    """

    def __init__(self, checkpoint: DistCheckpoint) -> None:
        self.path, self.config, self.shape = checkpoint.path, checkpoint.config, checkpoint.shape
        self.dtypes = checkpoint.dtypes
        self._checkpoint = checkpoint
        self._holder: dict[str, tuple[Weight, int | None]] = {
            tensor.name: (weight, expert)
            for weight in checkpoint.weights
            for tensor, expert in weight.hf_tensors(checkpoint.shape)
        }
        self._last: tuple[tuple[str, int | None], dict[str, Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """One whole Hugging Face tensor."""
        weight, expert = self._holder[name]
        at = (weight.key, expert)
        if self._last is None or self._last[0] != at:
            parameter = self._checkpoint.read_weight(weight, expert=expert)
            self._last = (at, from_megatron(weight, self.shape, parameter, expert=expert))
        return self._last[1][name]

    def read_rows(
        self,
        name: str,
        dim0_index: npt.NDArray[np.int64] | None = None,
        dim1_index: npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        """The given rows and columns of one tensor."""
        tensor = self.read(name)
        for dim, index in enumerate((dim0_index, dim1_index)):
            tensor = tensor if index is None else tensor.index_select(dim, torch.as_tensor(index))
        return tensor


def open_source(path: Path, hf_config: Path | None = None) -> Source:
    """Open a checkpoint of either format.

    Raises:
        CheckpointError: it is incomplete, inconsistent or of another kind.
    """
    if is_torch_dist(path):
        return DistSource(DistCheckpoint.open(path, hf_config))
    return HFCheckpoint.open(path)


def read_evaluation_data(
    path: Path, shape: ModelShape, *, seq_length: int | None, num_samples: int | None, seed: int = 0
) -> Tokens:
    """Samples that this model can be evaluated on; see `data.read_samples`."""
    samples = read_samples(path, seq_length=seq_length, num_samples=num_samples, vocab_size=shape.vocab_size, seed=seed)
    needed, length = 2 + shape.mtp_num_layers, samples.shape[1]
    if length < needed:
        raise DataError(f"samples of {length} tokens leave nothing to predict", where=str(path), fix=f"use >= {needed}")
    if length > shape.max_position_embeddings:
        raise DataError(
            f"samples of {length} tokens, the model's max_position_embeddings is {shape.max_position_embeddings}",
            where=str(path),
            fix="use a shorter --seq-length",
        )
    return samples


def default_dtype() -> torch.dtype:
    """bf16 on a GPU, where the large models are; fp32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@torch.no_grad()
def evaluate(
    source: Source, samples: Tokens, *, micro_batch_size: int = 1, dtype: torch.dtype | None = None
) -> Evaluation:
    """Loss of a checkpoint on samples.

    Args:
        source: the checkpoint.
        samples: token ids [samples, sequence], from `read_evaluation_data`.
        micro_batch_size: samples in one forward pass.
        dtype: of weights and activations, see `default_dtype`; the cross entropy is always fp32, its sum fp64.

    Raises:
        CheckpointError: a loss is not a finite number.
    """
    device.init_single_process()
    run = _Forward(source, samples, micro_batch_size, dtype or default_dtype())
    shape = source.shape
    blocks = progress(list(shape.blocks), "evaluating", shape.num_layers + shape.mtp_num_layers)
    losses: list[float] = []
    for block in blocks:
        if block.startswith("mtp."):
            run.prepare_mtp()
        run.block(block)
        if block == f"model.layers.{shape.num_layers - 1}":
            run.norm("model.norm.weight")
            losses.append(run.loss(ahead=1))
        elif block.startswith("mtp."):
            run.norm("mtp.norm.weight")
            losses.append(run.loss(ahead=2))
    return Evaluation(losses[0], samples.shape[0] * (samples.shape[1] - 1), tuple(losses[1:]))


class _Forward:
    """All samples on their way through a model.

    Attributes:
        hidden: [samples, positions, hidden], the input of the next block.
    """

    def __init__(self, source: Source, samples: Tokens, micro_batch_size: int, dtype: torch.dtype) -> None:
        from megatron_slim.pruning.block import block_config

        self.source, self.shape, self.dtype = source, source.shape, dtype
        self.samples = torch.from_numpy(samples)
        self.micro_batch_size = micro_batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = block_config(self.shape, dtype)
        self.hidden = source.read("model.embed_tokens.weight")[self.samples].to(dtype)

    def block(self, block: str) -> None:
        """Pass everything through one transformer block."""
        from megatron_slim.pruning.block import build_block, rotary_embedding

        layer = build_block(self.source, block, self.config)
        rotary = rotary_embedding(self.shape, self.hidden.shape[1])
        for batch in self.hidden.split(self.micro_batch_size):
            hidden = batch.to(self.device).transpose(0, 1).contiguous()
            output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            batch.copy_(output.transpose(0, 1))

    def norm(self, name: str) -> None:
        """Apply a norm in place."""
        weight = self._weight(name)
        for batch in self.hidden.split(self.micro_batch_size):
            batch.copy_(self._normed(batch, weight))

    def _weight(self, name: str) -> Tensor:
        return self.source.read(name).to(self.device, self.dtype)

    def _normed(self, batch: Tensor, weight: Tensor) -> Tensor:
        from megatron_slim.architecture.local_modules import rms_norm

        return rms_norm(batch.to(self.device, self.dtype), weight, self.shape.layernorm_epsilon, zero_centered=True)

    def prepare_mtp(self) -> None:
        """Join the trunk's output at position i with the embedding of token i + 1; the last position has none."""
        projection, enorm, hnorm = map(self._weight, MTP_INPUT)
        embedding = self.source.read("model.embed_tokens.weight")
        self.hidden = self.hidden[:, :-1].contiguous()
        following = self.samples[:, 1:].split(self.micro_batch_size)
        for batch, tokens in zip(self.hidden.split(self.micro_batch_size), following, strict=True):
            parts = (self._normed(embedding[tokens], enorm), self._normed(batch, hnorm))
            batch.copy_(torch.cat(parts, dim=-1) @ projection.T)

    def loss(self, *, ahead: int) -> float:
        """Mean cross entropy of the tokens ``ahead`` positions on; of padded vocabularies only the real rows count."""
        weight = self._weight("lm_head.weight")
        targets = self.samples[:, ahead:]
        rows = self.hidden[:, : targets.shape[1]].reshape(-1, self.shape.hidden_size).split(HEAD_ROWS)
        total = 0.0
        for chunk, wanted in zip(rows, targets.reshape(-1).split(HEAD_ROWS), strict=True):
            logits = (chunk.to(self.device) @ weight.T).float()
            total += F.cross_entropy(logits, wanted.to(self.device), reduction="none").double().sum().item()
        if not math.isfinite(total):
            raise CheckpointError("its loss is not finite", where=str(self.source.path), fix="its weights are broken")
        return total / targets.numel()


def evaluate_checkpoint(
    load: Path,
    data: Path,
    *,
    seq_length: int | None = None,
    num_samples: int | None = None,
    micro_batch_size: int = 1,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a Hugging Face or torch_dist directory; what tools/evaluate.py runs.

    Returns:
        ``loss``, ``perplexity``, ``tokens``, ``mtp_loss`` (a list, depth 1 first), ``samples``, ``seq_length``,
        ``dtype`` and ``load``.
    """
    if micro_batch_size < 1:
        raise DataError(f"--micro-batch-size {micro_batch_size} is not a positive number")
    source = open_source(load, hf_config)
    samples = read_evaluation_data(data, source.shape, seq_length=seq_length, num_samples=num_samples, seed=seed)
    dtype = dtype or default_dtype()
    result = evaluate(source, samples, micro_batch_size=micro_batch_size, dtype=dtype)
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "mtp_loss": list(result.mtp_loss),
        "samples": samples.shape[0],
        "seq_length": samples.shape[1],
        "dtype": str(dtype).removeprefix("torch."),
        "load": str(load),
    }
