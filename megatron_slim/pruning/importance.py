"""What calibration measures: the definition of every statistic, computed from sums over tokens.

`recorder` adds the sums up in float64, by name; they are additive over tokens, samples and ranks. Here they become the
statistics of `pruning.statistics`. With X_l the input and Y_l the output of layer l, means over all calibration tokens:

Hidden dimensions, over the RMSNorm sites of the trunk (two in every layer, and the final norm; the MTP block reads the
trunk's stream and its norms do not count); RMSNorm(X) is what leaves the norm, its weight applied, L counts layers:

    norm_activation_k    = 1/L sum over sites of mean |RMSNorm(X)|_k                           (SlimQwen 3.2)
    norm_activation_l2_k = 1/L sum over sites of sqrt(sum over samples of (mean over the sample |RMSNorm(X)|_k)^2)

The second is that of ModelOpt's Minitron plugin (`modelopt.torch.prune.plugins.mcore_minitron`; arXiv 2407.14679) but
for two things: it leaves the final norm out, and does not divide by L, which changes no order.

Layers, the MTP block too, whose input is what leaves ``mtp.fc``:

    cosine          = cos(mean X_l, mean Y_l)                              (SlimQwen A.4)
    block_influence = 1 - mean cos(X_l, Y_l)                               (ShortGPT, arXiv 2403.03853)

Experts of a block: `expert_metrics` has importances and similarities with their definitions.

Neurons and heads, by the activations that the last projection reads (a = silu(gate) * up, before any router's gate):

    experts.ffn_{i,f}      = mean over X_i of |a_f|, and 0 where X_i is empty    (as Minitron, arXiv 2407.14679)
    shared_expert.ffn_f, ffn_f = mean |a_f|
    heads_h, value_heads_h = mean ||slice of head h of the input of o_proj or out_proj||_2

Query heads are in Hugging Face's order, KV group after KV group; value heads key head after key head. Attention's
output gate and Gated DeltaNet's gated norm have been applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_slim import expert_metrics
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.pruning.statistics import (
    Array,
    axis_key,
    hidden_key,
    importance_key,
    layer_key,
    similarity_key,
)
from megatron_slim.recipe_sections import NORM_ACTIVATION, NORM_ACTIVATION_L2

Sums = dict[str, Tensor]
"""Float64 sums by name, of one module; see `recorder` for the names."""


def to_array(values: Tensor) -> Array:
    """A float32 array of a float64 tensor."""
    array: Array = values.to(device="cpu", dtype=torch.float32).numpy()
    return array


class HiddenImportance:
    """Importances of the hidden dimensions, collected norm site by norm site.

    Attributes:
        sums: what has been collected, by kind, float64.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._num_layers = shape.num_layers
        zeros = torch.zeros(shape.hidden_size, dtype=torch.float64)
        self.sums = {kind: zeros.clone() for kind in (NORM_ACTIVATION, NORM_ACTIVATION_L2)}

    def add(self, sums: Mapping[str, Tensor], total_tokens: int) -> None:
        """Add the norm sites among the sums of a module, [H] each; ``total_tokens`` is how many tokens they saw."""
        for name, values in sums.items():
            if name.endswith("_norm.abs"):
                self.sums[NORM_ACTIVATION] += values.cpu() / (total_tokens * self._num_layers)
            elif name.endswith("_norm.squares"):
                self.sums[NORM_ACTIVATION_L2] += values.cpu().sqrt() / self._num_layers

    def results(self) -> Iterator[tuple[str, Array]]:
        """The importances, [H] each, under their names in the statistics file."""
        yield from ((hidden_key(kind), to_array(values)) for kind, values in self.sums.items())


def block_statistics(
    block: str, shape: ModelShape, sums: Sums, router_EH: Tensor | None
) -> Iterator[tuple[str, Array]]:
    """Everything of one block under its name in the statistics file.

    Args:
        block: ``model.layers.{i}`` or ``mtp.layers.{i}``.
        shape: sizes of the model.
        sums: of the block, over all tokens; on any device.
        router_EH: the router's weight; None of a dense block.
    """
    sums = {name: values.cpu() for name, values in sums.items()}
    tokens = sums["tokens"]
    ends = torch.stack((sums["input"], sums["output"]))
    yield layer_key(block, "cosine"), to_array(expert_metrics.cosine_matrix(ends)[0, 1])
    yield layer_key(block, "block_influence"), to_array(1 - sums["cosine"] / tokens)
    yield axis_key(block, KINDS[shape.layer_type(block)].heads), to_array(sums["heads"] / tokens)
    if "neurons" in sums:
        yield axis_key(block, FEED_FORWARD[shape.ffn_kind(block)].neurons), to_array(sums["neurons"] / tokens)
    if router_EH is not None:
        yield from _expert_statistics(block, sums, router_EH.cpu())


def _expert_statistics(block: str, sums: Sums, router_EH: Tensor) -> Iterator[tuple[str, Array]]:
    visits = expert_metrics.visits(sums)
    yield axis_key(block, EXPERT_NEURONS), to_array(sums["experts.ffn"] / visits[:, None])
    known = {**sums, "router": router_EH}
    for kind, metric in expert_metrics.EXPERT_IMPORTANCES.items():
        yield importance_key(block, kind), to_array(metric.of(known))
    for kind, metric in expert_metrics.EXPERT_SIMILARITIES.items():
        yield similarity_key(block, kind), to_array(metric.of(known))
