"""A forward pass that holds one block of weights at a time: what calibration and evaluation run.

The hidden states of all samples wait in memory; a block is loaded, every sample goes through it, the block is dropped:
a model far larger than the machine can be run. The blocks are Megatron-Core's own layers. The MTP block goes last: its
input is made of the trunk's final hidden state and the embedding of the next token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.cli import progress
from megatron_slim.pruning.block import block_config, build_block, rotary_embedding

EMBEDDING, FINAL_NORM, MTP_NORM = "model.embed_tokens", "model.norm", "mtp.norm"
MTP_INPUT, MTP_INPUT_NORMS = "mtp.fc", ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")


class StreamingForward:
    """All samples on their way through a model.

    A subclass overrides what it wants to look at: `enter`, `observe` and `leave`, which do nothing here. Modules go by
    their Hugging Face names.

    Attributes:
        checkpoint: the model.
        samples: token ids [samples, sequence].
        hidden: [samples, positions, hidden], the input of the next module.
        config: Megatron's configuration of the blocks.
    """

    def __init__(
        self, checkpoint: Checkpoint, samples: npt.NDArray[np.int64], *, micro_batch_size: int, dtype: torch.dtype
    ) -> None:
        """Embed the samples.

        Args:
            checkpoint: the model.
            samples: token ids [samples, sequence], all below the vocabulary's size.
            micro_batch_size: samples in one forward pass.
            dtype: of weights and activations.
        """
        self.checkpoint, self.shape, self.dtype = checkpoint, checkpoint.shape, dtype
        self.samples = torch.from_numpy(samples)
        self.micro_batch_size = micro_batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = block_config(self.shape, dtype)
        self.hidden = checkpoint.read(f"{EMBEDDING}.weight")[self.samples].to(dtype)

    def enter(self, block: str, layer: TransformerLayer) -> None:
        """A block has been loaded; nothing has gone through it."""

    def observe(self, module: str, inputs: Tensor, output: Tensor) -> None:
        """A micro-batch has gone through a module; [positions, samples, hidden] of a block, else the other way."""

    def leave(self, module: str) -> None:
        """Everything has gone through a module; `hidden` is its output."""

    def run(self, description: str) -> None:
        """Pass everything through every module, the MTP block's last; ``description`` is the progress bar's."""
        self.observe(EMBEDDING, self.samples, self.hidden)
        self.leave(EMBEDDING)
        for block in progress(list(self.shape.blocks), description):
            if block.startswith("mtp."):
                self._join_next_tokens()
            self._pass_block(block)
            if block == f"model.layers.{self.shape.num_layers - 1}":
                self._pass_norm(FINAL_NORM)
            elif block.startswith("mtp."):
                self._pass_norm(MTP_NORM)

    def weight(self, module: str) -> Tensor:
        """The weight of a module, on the device."""
        return self.checkpoint.read(f"{module}.weight").to(self.device, self.dtype)

    def _pass_block(self, block: str) -> None:
        layer = build_block(self.checkpoint, block, self.config)
        self.enter(block, layer)
        rotary = rotary_embedding(self.shape, self.hidden.shape[1])
        for batch in self.hidden.split(self.micro_batch_size):
            hidden = batch.to(self.device).transpose(0, 1).contiguous()
            output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            self.observe(block, hidden, output)
            batch.copy_(output.transpose(0, 1))
        self.leave(block)

    def _pass_norm(self, module: str) -> None:
        weight = self.weight(module)
        for batch in self.hidden.split(self.micro_batch_size):
            hidden = batch.to(self.device)
            output = self._normed(hidden, weight)
            self.observe(module, hidden, output)
            batch.copy_(output)
        self.leave(module)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        centered = self.shape.family.zero_centered_norms
        return rms_norm(hidden, weight, self.shape.layernorm_epsilon, zero_centered=centered)

    def _join_next_tokens(self) -> None:
        """Join the trunk's output at position i with the embedding of token i + 1; the last position has none."""
        projection, (enorm, hnorm) = self.weight(MTP_INPUT), map(self.weight, MTP_INPUT_NORMS)
        embedding = self.checkpoint.read(f"{EMBEDDING}.weight")
        self.hidden = self.hidden[:, :-1].contiguous()
        following = self.samples[:, 1:].split(self.micro_batch_size)
        for batch, tokens in zip(self.hidden.split(self.micro_batch_size), following, strict=True):
            embedded, hidden = embedding[tokens].to(self.device, self.dtype), batch.to(self.device)
            pair = torch.cat((self._normed(embedded, enorm), self._normed(hidden, hnorm)), dim=-1)
            output = pair @ projection.T
            self.observe(MTP_INPUT, pair, output)
            batch.copy_(output)
        self.leave(MTP_INPUT)
