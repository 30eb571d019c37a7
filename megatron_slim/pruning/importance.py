"""What calibration measures, as sums in float64 that take one batch after the other.

Shape suffixes: T tokens, P routed (token, expert) pairs, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_slim.pruning.statistics import Array, importance_key, layer_key, similarity_key


def to_array(values: Tensor) -> Array:
    """A float32 array of a float64 tensor."""
    array: Array = values.to(device="cpu", dtype=torch.float32).numpy()
    return array


def cosine_matrix(rows: Tensor) -> Tensor:
    """Cosine of every pair of rows; of a zero row with anything, 0.

    >>> cosine_matrix(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))[1].tolist()
    [0.8, 1.0, 0.0]
    """
    return cosine_from_gram(rows @ rows.T)


def cosine_from_gram(gram: Tensor) -> Tensor:
    """Cosines of vectors from their inner products; of a zero vector with anything, 0."""
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return gram * scale[:, None] * scale[None, :]


class HiddenImportance:
    """Importance of every hidden dimension (SlimQwen 3.2).

    (1/L) * sum over all RMSNorm sites of the trunk of mean over batch and sequence of |RMSNorm(X)|, where RMSNorm(X)
    is what leaves the norm, its weight applied. The sites are the two norms of every layer and the final norm. The MTP
    block's norms are no part of it: L counts the trunk's layers, and the MTP block reads the trunk's stream.
    """

    def __init__(self, hidden_size: int, num_layers: int, device: torch.device) -> None:
        self.sum_H = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._num_layers = num_layers

    def add(self, normed: Tensor, total_tokens: int) -> None:
        """Add the output of one norm for one batch, [..., H]; ``total_tokens`` is that of all batches together."""
        magnitude = normed.detach().abs().flatten(0, -2)
        self.sum_H += magnitude.sum(0, dtype=torch.float64) / (total_tokens * self._num_layers)

    def result(self) -> Array:
        """The importances, [H]."""
        return to_array(self.sum_H)


class LayerSimilarity:
    """Cosine of a layer's mean-pooled input and output, the mean over all calibration tokens (SlimQwen A.4)."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self._input_H = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self._output_H = torch.zeros_like(self._input_H)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add the input and the output of the layer for one batch, each [..., H]."""
        self._input_H += before.flatten(0, -2).sum(0, dtype=torch.float64)
        self._output_H += after.flatten(0, -2).sum(0, dtype=torch.float64)

    def results(self, layer: int) -> Iterator[tuple[str, Array]]:
        """The cosine under its name in the statistics file."""
        yield (
            layer_key(f"model.layers.{layer}", "cosine"),
            to_array(cosine_matrix(torch.stack((self._input_H, self._output_H)))[0, 1]),
        )


class ExpertStatistics:
    """Importances and similarities of the experts of one MoE block (SlimQwen 3.2; REAP: arXiv 2510.13999).

    With A(x) the top-k experts of token x, p the router's softmax, g the gate by which the network multiplies an
    expert's output (p, renormalised over A(x) where ``norm_topk_prob``), and X_i the tokens routed to expert i:

        frequency_i   = mean over all tokens of 1[i in A(x)]
        soft_logits_i = mean over all tokens of 1[i in A(x)] p_i(x) / sum_{j in A(x)} p_j(x)
        reap_i        = mean over X_i of g_i(x) ||E_i(x)||_2, and 0 where X_i is empty

    Similarities are cosines of the router's rows, of its logits as vectors over all tokens, and of the experts' mean
    outputs over X_i (0 where one of the two is empty).
    """

    def __init__(self, num_experts: int, hidden_size: int, device: torch.device) -> None:
        def zeros(*extents: int) -> Tensor:
            return torch.zeros(extents, dtype=torch.float64, device=device)

        self._tokens = 0
        self._count_E, self._soft_E, self._saliency_E = zeros(num_experts), zeros(num_experts), zeros(num_experts)
        self._output_EH = zeros(num_experts, hidden_size)
        self._logits_EE = zeros(num_experts, num_experts)

    def add_routing(self, logits_TE: Tensor, gates_TE: Tensor, routed_TE: Tensor) -> None:
        """Add the routing of one batch: logits, gates (0 where not routed) and the mask of routed pairs."""
        gates = gates_TE.double() * routed_TE
        self._tokens += len(gates)
        self._count_E += routed_TE.sum(0)
        self._soft_E += (gates / gates.sum(1, keepdim=True)).sum(0)
        logits = logits_TE.double()
        self._logits_EE += logits.T @ logits

    def add_outputs(self, outputs_PH: Tensor, gates_P: Tensor, tokens_per_expert_E: Tensor) -> None:
        """Add expert outputs of one batch, before the gate is applied; pairs are sorted by expert."""
        counts = tokens_per_expert_E.to(outputs_PH.device)
        expert_P = torch.repeat_interleave(torch.arange(len(counts), device=outputs_PH.device), counts)
        wide = outputs_PH.double()
        self._saliency_E.index_add_(0, expert_P, gates_P.double() * wide.norm(dim=1))
        self._output_EH.index_add_(0, expert_P, wide)

    def results(self, block: str, router_EH: Tensor) -> Iterator[tuple[str, Array]]:
        """Everything under its name in the statistics file; ``router_EH`` is the router's weight."""
        visits = self._count_E.clamp(min=1)
        importances = {
            "frequency": self._count_E / self._tokens,
            "soft_logits": self._soft_E / self._tokens,
            "reap": self._saliency_E / visits,
        }
        similarities = {
            "router_weights": cosine_matrix(router_EH.double()),
            "router_logits": cosine_from_gram(self._logits_EE),
            "expert_vectors": cosine_matrix(self._output_EH / visits[:, None]),
        }
        yield from ((importance_key(block, kind), to_array(values)) for kind, values in importances.items())
        yield from ((similarity_key(block, kind), to_array(values)) for kind, values in similarities.items())
