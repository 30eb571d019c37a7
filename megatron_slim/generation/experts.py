"""The experts of a block, or its dense network, as plain functions of hidden states and weights.

Shapes: N rows, one per token; H hidden; E experts, k of them per token, F neurons of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.generation.sublayers import Sizes, norm
from megatron_slim.generation.weights import DenseWeights, ExpertWeights
from megatron_slim.products import linear, linear_by_part

ROWS_APART = 3  # up to so many tokens are taken one by one: nothing is sorted, and no other expert is read
# So few tokens are multiplied by all experts where these are at most so many times what a token visits: two large
# products take less time than one or two small ones per expert.
DENSE_ROWS, DENSE_RATIO = 32, 4


def experts(rows: Tensor, weights: ExpertWeights, sizes: Sizes) -> Tensor:
    """Norm, routed experts and the shared one, of [N, H]."""
    rows = norm(rows, weights.norm, sizes.epsilon)
    gates, chosen = _routing(rows.float() @ weights.router.t(), weights.bias, sizes)
    gates = gates.to(rows.dtype)
    if len(rows) == 1:
        return _of_one_row(rows, gates, chosen[0].tolist(), weights)
    if len(rows) <= ROWS_APART:
        each = zip(rows.split(1), gates.split(1), chosen.tolist(), strict=True)
        return torch.cat([_of_one_row(row, gate, numbers, weights) for row, gate, numbers in each])
    if len(rows) <= DENSE_ROWS and len(weights.router) <= DENSE_RATIO * sizes.topk:
        return _by_all(rows, gates, chosen, weights)
    return _routed(rows, gates, chosen, weights)


def dense(rows: Tensor, weights: DenseWeights, sizes: Sizes) -> Tensor:
    """Norm and a dense network, of [N, H]."""
    return linear(_gated(linear(norm(rows, weights.norm, sizes.epsilon), weights.first)), weights.last)


def _routing(logits: Tensor, bias: Tensor | None, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Gates [N, k] and numbers [N, k] of the experts of every token, of logits [N, E]."""
    if not sizes.sigmoid:
        if not sizes.norm_topk:
            gates, chosen = logits.softmax(-1).topk(sizes.topk)
            return gates, chosen
        best, chosen = logits.topk(sizes.topk)
        return best.softmax(-1), chosen
    scores = logits.sigmoid()
    ranked = scores if bias is None else scores + bias
    if sizes.expert_groups > 1:
        by_group = ranked.unflatten(-1, (sizes.expert_groups, -1))
        best_groups = by_group.topk(2).values.sum(-1).topk(sizes.chosen_groups).indices
        others = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(-1, best_groups, False)
        ranked = by_group.masked_fill(others[..., None], -torch.inf).flatten(-2)
    chosen = ranked.topk(sizes.topk).indices
    gates = scores.gather(-1, chosen)
    return gates / gates.sum(-1, keepdim=True) * sizes.scaling, chosen


def _gated(both: Tensor) -> Tensor:
    """SwiGLU of [.., 2 F]: [.., F]."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _of_one_row(row: Tensor, gates: Tensor, numbers: list[int], weights: ExpertWeights) -> Tensor:
    """A single token: one product with each of its experts, and one with all of their last matrices."""
    both = torch.cat([row @ weights.first[number] for number in numbers])
    active, last = _gated(both).mul_(gates.view(-1, 1)).view(1, -1), [weights.last[number] for number in numbers]
    if (shared := weights.shared) is not None:
        active, last = torch.cat((active, _shared(row @ shared.first)), 1), [*last, shared.last]
    return active @ torch.cat(last)


def _shared(products: Tensor) -> Tensor:
    """What the shared expert's last matrix is multiplied by [N, F], of products with its first [N, 2 F (+ 1)]."""
    if products.shape[1] % 2 == 0:  # no column is its gate's
        return _gated(products)
    return _gated(products[:, :-1]).mul_(products[:, -1:].sigmoid())


def _by_all(rows: Tensor, gates: Tensor, chosen: Tensor, weights: ExpertWeights) -> Tensor:
    """Few tokens and few experts: products with all of them at once, where most gates are zero."""
    number, double = len(weights.first), weights.first[0].shape[1]
    products = linear(rows, weights.all_first)
    dense = torch.zeros(len(rows), number, dtype=rows.dtype, device=rows.device).scatter_(1, chosen, gates)
    routed = products[:, : number * double].view(len(rows), number, double)
    active = _gated(routed).mul_(dense[..., None]).view(len(rows), -1)
    if weights.shared is not None:
        active = torch.cat((active, _shared(products[:, number * double :])), 1)
    return linear(active, weights.all_last.t())


def _routed(rows: Tensor, gates: Tensor, chosen: Tensor, weights: ExpertWeights) -> Tensor:
    """Pairs of tokens and experts sorted by expert, those of an expert in one product."""
    numbers, order = chosen.flatten().sort()
    tokens = order // chosen.shape[1]
    found, counts = (each.tolist() for each in torch.unique_consecutive(numbers, return_counts=True))
    both = linear_by_part(rows.index_select(0, tokens), [weights.first[number].t() for number in found], counts)
    active = _gated(both).mul_(gates.flatten().index_select(0, order)[:, None])
    parts = linear_by_part(active, [weights.last[number].t() for number in found], counts)
    if (shared := weights.shared) is None:
        output = torch.zeros_like(rows)
    else:
        output = linear(_shared(linear(rows, shared.first.t())), shared.last.t())
    return output.index_add_(0, tokens, parts)
