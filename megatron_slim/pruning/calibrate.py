"""Calibration: one pass of the samples through the model, one block in memory at a time.

The hidden states of all samples wait in memory; a block is loaded, every sample goes through it, the block is dropped.
The blocks are Megatron-Core's own layers, in fp32 on the CPU and in bf16 on a GPU. The MTP block goes last: its input
is made of the trunk's final hidden state and the embedding of the next token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim import __version__
from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.cli import progress, say
from megatron_slim.device import init_single_process
from megatron_slim.errors import CheckpointError
from megatron_slim.pruning.block import block_config, build_block, rotary_embedding
from megatron_slim.pruning.importance import ExpertStatistics, HiddenImportance, LayerSimilarity
from megatron_slim.pruning.samples import check_samples
from megatron_slim.pruning.source import Source, fingerprint
from megatron_slim.pruning.statistics import FORMAT, HIDDEN, Array, Statistics

# On a CPU, tokens in one forward pass so that an expert multiplies more than a few at a time: 5x faster than 256.
FORWARD_TOKENS = 4096


def calibrate(source: Source, samples: npt.NDArray[np.int64], *, micro_batch_size: int | None = None) -> Statistics:
    """Measure the statistics of a checkpoint.

    Args:
        source: the checkpoint.
        samples: token ids [samples, sequence], all below the vocabulary's size.
        micro_batch_size: samples in one forward pass, None for about `FORWARD_TOKENS`; changes speed, memory and
            rounding, not the definition of any number.

    Raises:
        DataError: the samples do not suit the model.
        CheckpointError: an activation is not finite; names its block.
    """
    check_samples(samples, source.shape)
    init_single_process()
    if micro_batch_size is None:
        micro_batch_size = max(1, FORWARD_TOKENS // samples.shape[1])
    with torch.no_grad():
        return _Calibration(source, samples, micro_batch_size).run()


class _Calibration:
    """The state of one calibration run.

    Attributes:
        hidden: hidden states of all samples, [samples, sequence, hidden], input of the next block.
    """

    def __init__(self, source: Source, samples: npt.NDArray[np.int64], micro_batch_size: int) -> None:
        self.source, self.shape, self.samples = source, source.shape, samples
        self.micro_batch_size = micro_batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.config = block_config(self.shape, self.dtype)
        self.importance = HiddenImportance(self.shape.hidden_size, self.shape.num_layers, self.device)
        self.unrouted = 0
        embedding = source.read("model.embed_tokens.weight")
        self.hidden = embedding[torch.from_numpy(samples)].to(self.dtype)
        self._refuse_non_finite(self.hidden, "output of model.embed_tokens")

    def run(self) -> Statistics:
        """All blocks, the MTP block last."""
        tensors: dict[str, Array] = {}
        for block in progress(list(self.shape.blocks), "calibrating", self.shape.num_layers):
            if block == "mtp.layers.0":
                self._prepare_mtp()
            tensors.update(self._run_block(block))
            if block == f"model.layers.{self.shape.num_layers - 1}":
                self._final_norm()
        tensors[HIDDEN] = self.importance.result()
        if self.unrouted:
            say(f"{self.unrouted} experts were visited by no token; their importances are 0")
        return Statistics(tensors, self._metadata())

    def _batches(self) -> Iterator[Tensor]:
        """Views of the hidden states, a micro-batch each."""
        yield from self.hidden.split(self.micro_batch_size)

    def _run_block(self, block: str) -> Iterator[tuple[str, Array]]:
        """Pass all samples through one block; the hidden states become its output."""
        layer = build_block(self.source, block, self.config)
        recorder = _Recorder(layer, self.config, self.device)
        trunk = block.startswith("model.")
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        similarity = LayerSimilarity(self.shape.hidden_size, self.device)
        rotary = rotary_embedding(self.shape, self.hidden.shape[1])
        for batch in self._batches():
            hidden = batch.to(self.device).transpose(0, 1).contiguous()
            output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            self._refuse_non_finite(output, f"output of {block}")
            if trunk:
                similarity.add(hidden, output)
                for normed in recorder.take_normed(hidden):
                    self.importance.add(normed, tokens)
            batch.copy_(output.transpose(0, 1))
        self.unrouted += recorder.experts.num_unrouted
        if trunk:
            yield from similarity.results(int(block.split(".")[-1]))
        yield from recorder.experts.results(block, layer.mlp.router.weight)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        weight = self.source.read(name).to(self.device)
        return rms_norm(hidden, weight, self.shape.layernorm_epsilon, zero_centered=True)

    def _final_norm(self) -> None:
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        for batch in self._batches():
            normed = self._norm(batch.to(self.device), "model.norm.weight")
            self._refuse_non_finite(normed, "output of model.norm")
            self.importance.add(normed, tokens)
            batch.copy_(normed)

    def _prepare_mtp(self) -> None:
        """Position i of the MTP block's input joins the trunk's h_i and the embedding of token i + 1."""
        projection = self.source.read("mtp.fc.weight").to(self.device, self.dtype)
        embedding = self.source.read("model.embed_tokens.weight")
        following = torch.from_numpy(self.samples[:, 1:]).split(self.micro_batch_size)
        self.hidden = self.hidden[:, :-1].contiguous()
        for batch, tokens in zip(self._batches(), following, strict=True):
            embedded = embedding[tokens].to(self.device, self.dtype)
            parts = (
                self._norm(embedded, "mtp.pre_fc_norm_embedding.weight"),
                self._norm(batch.to(self.device), "mtp.pre_fc_norm_hidden.weight"),
            )
            joined = torch.cat(parts, dim=-1) @ projection.T
            self._refuse_non_finite(joined, "output of mtp.fc")
            batch.copy_(joined)

    def _refuse_non_finite(self, values: Tensor, what: str) -> None:
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{what} is not finite",
                where=str(self.source.path),
                fix="the checkpoint's weights are broken there or before",
            )

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "source_sha256": fingerprint(self.source),
            "num_samples": str(self.samples.shape[0]),
            "seq_length": str(self.samples.shape[1]),
            "dtype": str(self.dtype).removeprefix("torch."),
            "megatron_slim": __version__,
            "torch": torch.__version__,
        }


class _Recorder:
    """Listens to one layer: its norms and its experts."""

    def __init__(self, layer: TransformerLayer, config: TransformerConfig, device: torch.device) -> None:
        self.experts = ExpertStatistics(config.num_moe_experts or 0, config.hidden_size, device)
        self._input_weight = next(
            parameter for name, parameter in layer.named_parameters() if name.endswith("layer_norm_weight")
        )
        self._epsilon = config.layernorm_epsilon
        self._post_attention: Tensor | None = None
        self._gates: Tensor | None = None
        self._tokens_per_expert: Tensor | None = None
        layer.pre_mlp_layernorm.register_forward_hook(self._on_norm)
        layer.mlp.router.register_forward_hook(self._on_router)
        layer.mlp.experts.register_forward_pre_hook(self._before_experts)
        layer.mlp.experts.register_forward_hook(self._after_experts)

    def take_normed(self, hidden: Tensor) -> Iterator[Tensor]:
        """Outputs of the layer's two norms for the last batch, of which ``hidden`` was the layer's input."""
        yield rms_norm(hidden, self._input_weight, self._epsilon, zero_centered=True)
        assert self._post_attention is not None
        yield self._post_attention

    def _on_norm(self, module: Any, args: Any, output: Tensor) -> None:
        self._post_attention = output

    def _on_router(self, module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        logits = args[0].flatten(0, -2).float() @ module.weight.float().T
        self.experts.add_routing(logits, *output)

    def _before_experts(self, module: Any, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Megatron applies the gate inside an expert, before its last projection; here it is applied after it."""
        hidden, self._tokens_per_expert, self._gates = args
        return hidden, self._tokens_per_expert, torch.ones_like(self._gates)

    def _after_experts(self, module: Any, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        assert self._gates is not None and self._tokens_per_expert is not None
        self.experts.add_outputs(output[0], self._gates, self._tokens_per_expert)
        return (output[0] * self._gates[:, None]).to(output[0].dtype), output[1]
