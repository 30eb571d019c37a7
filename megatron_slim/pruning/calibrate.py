"""Calibration: what pruning decides by, measured as samples stream through the model; fp32 on a CPU, bf16 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_slim import __version__
from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.cli import say
from megatron_slim.device import default_dtype, init_single_process
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.pruning.fingerprint import fingerprint
from megatron_slim.pruning.importance import ExpertStatistics, HiddenImportance, LayerSimilarity
from megatron_slim.pruning.samples import check_samples
from megatron_slim.pruning.statistics import FORMAT, Array, Statistics, hidden_key, importance_key
from megatron_slim.pruning.streaming import FINAL_NORM, StreamingForward
from megatron_slim.pruning.work_dir import WorkDir

# On a CPU, tokens in one forward pass so that an expert multiplies more than a few at a time: 5x faster than 256.
FORWARD_TOKENS = 4096


def calibrate(
    checkpoint: Checkpoint,
    samples: npt.NDArray[np.int64],
    *,
    micro_batch_size: int | None = None,
    work: WorkDir | None = None,
) -> Statistics:
    """Measure the statistics of a checkpoint.

    Args:
        checkpoint: the model.
        samples: token ids [samples, sequence], all below the vocabulary's size.
        micro_batch_size: samples in one forward pass, None for about `FORWARD_TOKENS`; changes speed, memory and
            rounding, not the definition of any number.
        work: where hidden states and progress are kept, see `work_dir.open_work_dir`; None keeps them in memory.

    Raises:
        DataError: the samples do not suit the model.
        CheckpointError: an activation is not finite; names its block.
        SlimError: what is in the work directory does not suit these inputs, or there is too little room.
    """
    check_samples(samples, checkpoint.shape)
    init_single_process()
    if micro_batch_size is None:
        micro_batch_size = max(1, FORWARD_TOKENS // samples.shape[1])
    with torch.no_grad():
        run = _Calibration(checkpoint, samples, micro_batch_size=micro_batch_size, dtype=default_dtype(), work=work)
        return run.result()


class _Calibration(StreamingForward):
    """A pass that measures every block and every norm of the trunk."""

    def __init__(self, checkpoint: Checkpoint, samples: npt.NDArray[np.int64], **kwargs: Any) -> None:
        super().__init__(checkpoint, samples, **kwargs)
        self.importance = HiddenImportance(self.shape.hidden_size, self.shape.num_layers, self.device)
        self.tensors: dict[str, Array] = {}

    def result(self) -> Statistics:
        """Pass everything through and collect what was measured."""
        self.run("calibrating")
        if found := self._unrouted():
            say(f"experts that no token visited, whose importances are 0: {summarise(found)}")
        return Statistics({**self.tensors, hidden_key("norm_activation"): self.importance.result()}, self._metadata())

    def enter(self, block: str, layer: TransformerLayer) -> None:
        """Listen to the block."""
        self._layer = layer
        self._recorder = _Recorder(layer, self.config, self.device)
        self._similarity = LayerSimilarity(self.shape.hidden_size, self.device)

    def observe(self, module: str, inputs: Tensor, output: Tensor) -> None:
        """Refuse what is not finite, and measure the trunk's norms and layers."""
        if not torch.isfinite(output).all():
            raise CheckpointError(
                f"output of {module} is not finite",
                where=str(self.checkpoint.path),
                fix="the checkpoint's weights are broken there or before",
            )
        tokens = self.samples.numel()
        if module == FINAL_NORM:
            self.importance.add(output, tokens)
        elif module.startswith("model.layers."):
            self._similarity.add(inputs, output)
            for normed in self._recorder.take_normed(inputs):
                self.importance.add(normed, tokens)

    def leave(self, module: str) -> None:
        """Collect what a block's experts and its similarity are."""
        if ".layers." not in module:
            return
        if module.startswith("model."):
            self.tensors.update(self._similarity.results(int(module.split(".")[-1])))
        experts = self._recorder.experts
        self.tensors.update(experts.results(module, self._layer.mlp.router.weight))

    def state(self) -> Mapping[str, Tensor]:
        """All tensors so far, and the sums that go on over the blocks."""
        tensors = {f"tensors.{name}": torch.from_numpy(value) for name, value in self.tensors.items()}
        return tensors | {"importance": self.importance.sum_H}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        prefix = "tensors."
        self.tensors = {k.removeprefix(prefix): v.numpy() for k, v in state.items() if k.startswith(prefix)}
        self.importance.sum_H.copy_(state["importance"])

    def _unrouted(self) -> list[str]:
        """Number of experts without a token, for every block that has some."""
        counts = {
            block: int((self.tensors[importance_key(block, "frequency")] == 0).sum()) for block in self.shape.blocks
        }
        return [f"{count} of {block}" for block, count in counts.items() if count]

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "source_sha256": fingerprint(self.checkpoint),
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
        self._epsilon, self._zero_centered = config.layernorm_epsilon, config.layernorm_zero_centered_gamma
        self._post_attention: Tensor | None = None
        self._gates: Tensor | None = None
        self._tokens_per_expert: Tensor | None = None
        layer.pre_mlp_layernorm.register_forward_hook(self._on_norm)
        layer.mlp.router.register_forward_hook(self._on_router)
        layer.mlp.experts.register_forward_pre_hook(self._before_experts)
        layer.mlp.experts.register_forward_hook(self._after_experts)

    def take_normed(self, hidden: Tensor) -> Iterator[Tensor]:
        """Outputs of the layer's two norms for the last batch, of which ``hidden`` was the layer's input."""
        yield rms_norm(hidden, self._input_weight, self._epsilon, zero_centered=self._zero_centered)
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
