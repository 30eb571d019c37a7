"""Attention and Gated DeltaNet as plain functions of hidden states, weights and caches.

Megatron's modules cost more in Python per token than their arithmetic does; here a step is a few operations.

Shapes: N = B * T rows, of B sequences with T new tokens each; H hidden; G groups, n queries of each, D of a head;
Z = B * value heads, K and V size of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.architecture.frequencies import rotary_frequencies
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.generation.cache import DeltaNetCache, KeyValueCache, Written
from megatron_slim.generation.weights import AttentionWeights, DeltaNetWeights
from megatron_slim.products import linear

L2_EPSILON = 1e-6  # of the norm of queries and keys in Gated DeltaNet, in Megatron as in transformers


class Sizes(NamedTuple):
    """What the functions need of a shape, and the constants of attention.

    Attributes:
        groups: G.
        queries: n.
        head: D.
        value_heads: of Gated DeltaNet.
        value: V.
        key: K.
        topk: experts of a token.
        norm_topk: gates of a token add up to 1.
        sigmoid: scores of experts are sigmoids, not a softmax.
        scaling: what gates are multiplied by.
        expert_groups: groups of experts, of which a token chooses first.
        chosen_groups: how many of them.
        epsilon: of norms.
    """

    groups: int
    queries: int
    head: int
    value_heads: int
    value: int
    key: int
    topk: int
    norm_topk: bool
    sigmoid: bool
    scaling: float
    expert_groups: int
    chosen_groups: int
    epsilon: float

    @classmethod
    def of(cls, shape: ModelShape) -> Sizes:
        """Those of a model."""
        return cls(
            groups=shape.num_query_groups,
            queries=shape.num_attention_heads // shape.num_query_groups,
            head=shape.kv_channels,
            value_heads=shape.linear_num_value_heads,
            value=shape.linear_value_head_dim,
            key=shape.linear_key_head_dim,
            topk=shape.moe_router_topk,
            norm_topk=shape.norm_topk_prob,
            sigmoid=shape.family.router_score_function == "sigmoid",
            scaling=shape.moe_router_topk_scaling_factor,
            expert_groups=shape.moe_router_num_groups,
            chosen_groups=shape.moe_router_group_topk,
            epsilon=shape.layernorm_epsilon,
        )


class Rotary:
    """Rotary embedding of any positions, as a product and a sum over whole heads.

    Attributes:
        partner: by dimension of a head, the dimension that it is rotated with; itself where nothing rotates.
    """

    def __init__(self, shape: ModelShape, positions: int, device: torch.device) -> None:
        size, half = shape.rotary_dim, shape.rotary_dim // 2
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * rotary_frequencies(shape)
        factor = 1.0 if shape.rope_scaling is None else shape.rope_scaling.attention_factor
        cos, sin = angles.cos() * factor, angles.sin() * factor
        still = cos.new_zeros(positions, shape.kv_channels - size)
        self.cos = torch.cat((cos, cos, still + 1), 1).to(device)
        self.sin = torch.cat((-sin, sin, still), 1).to(device)
        order = [*range(half, size), *range(half), *range(size, shape.kv_channels)]
        self.partner = torch.tensor(order, device=device)


@dataclass(frozen=True)
class Step:
    """Where the new tokens of a step are.

    Attributes:
        batch: B.
        length: T.
        places: of their keys and values among all places of all sequences [N].
        cos: of their positions [N, 1, 1, D].
        sin: the same.
        partner: of `Rotary`.
        end: one more than the last position.
        mask: what is added to attention scores [B, 1, n * T, end]; None where every token sees everything.
    """

    batch: int
    length: int
    places: Tensor
    cos: Tensor
    sin: Tensor
    partner: Tensor
    end: int
    mask: Tensor | None


def norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Rows over their root mean square, times a weight, in fp32; the result has the type of the rows."""
    return F.rms_norm(rows.float(), weight.shape, weight, epsilon).to(rows.dtype)


def attention(rows: Tensor, weights: AttentionWeights, sizes: Sizes, step: Step, cache: KeyValueCache) -> Tensor:
    """Norm and full attention of new tokens [N, H] over those before and themselves; their keys join the cache."""
    groups, queries, head = sizes.groups, sizes.queries, sizes.head
    heads = linear(norm(rows, weights.norm, sizes.epsilon), weights.qkv)
    heads = (heads if weights.bias is None else heads + weights.bias).view(len(rows), groups, -1, head)
    both = heads[:, :, : queries + 1].float()
    if weights.qk_norm is not None:
        both = F.rms_norm(both, (head,), None, sizes.epsilon) * weights.qk_norm
    both = torch.addcmul(both * step.cos, both.index_select(-1, step.partner), step.sin).to(rows.dtype)
    cache.keys.flatten(0, 1).index_copy_(0, step.places, both[:, :, queries])
    cache.values.flatten(0, 1).index_copy_(0, step.places, heads[:, :, queries + 1])
    asked = both[:, :, :queries].view(step.batch, step.length, groups, queries, head).permute(0, 2, 3, 1, 4)
    seen = F.scaled_dot_product_attention(
        asked.reshape(step.batch, groups, queries * step.length, head),
        cache.keys[:, : step.end].transpose(1, 2),
        cache.values[:, : step.end].transpose(1, 2),
        attn_mask=step.mask,
    )
    found = seen.view(step.batch, groups, queries, step.length, head).permute(0, 3, 1, 2, 4)
    if heads.shape[2] > queries + 2:
        gates = heads[:, :, queries + 2 :].sigmoid().view(step.batch, step.length, groups, queries, head)
        found = found * gates
    return linear(found.reshape(len(rows), -1), weights.out)


def delta_net(rows: Tensor, weights: DeltaNetWeights, sizes: Sizes, step: Step, cache: DeltaNetCache) -> Tensor:
    """Norm and Gated DeltaNet of new tokens [N, H].

    A single token is written to the cache's state; what several would write is left to `DeltaNetCache.keep`.
    """
    batch, length, channels = step.batch, step.length, weights.convolution.shape[1]
    heads, size = sizes.value_heads, sizes.value
    projected = linear(norm(rows, weights.norm, sizes.epsilon), weights.projection)
    mixed, z, beta, alpha = projected.split([channels, heads * size, heads, heads], -1)
    window = torch.cat((cache.window, mixed.view(batch, length, channels)), 1)
    query, key, value = _convolved(window, weights, sizes, length)
    decay = _by_head(weights.rate * F.softplus(alpha.float() + weights.dt_bias), batch, length)
    strength = _by_head(beta.float().sigmoid(), batch, length)[..., None]
    state = cache.state.flatten(0, 1)
    if length == 1:
        cache.window = window[:, 1:]
        state.mul_(decay.exp()[..., None])
        state.baddbmm_(key.transpose(1, 2), (value - torch.bmm(key, state)) * strength)
        read = torch.bmm(query, state)
    else:
        read, errors, total = _delta_rule(query, key, value, decay, strength, state)
        cache.written = Written(window, key, errors, total)
    found = read.view(batch, heads, length, size).transpose(1, 2).reshape(len(rows), heads, size)
    found = norm(found, weights.out_norm, sizes.epsilon) * F.silu(z.float()).view(len(rows), heads, size)
    return linear(found.view(len(rows), -1).to(rows.dtype), weights.out)


def _by_head(values: Tensor, batch: int, length: int) -> Tensor:
    """[N, heads] as [Z, T]."""
    return values.view(batch, length, -1).transpose(1, 2).reshape(-1, length)


def _convolved(window: Tensor, weights: DeltaNetWeights, sizes: Sizes, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys [Z, T, K] and values [Z, T, V] in fp32; a key head serves several value heads."""
    if length == 1:
        mixed = (window * weights.convolution).sum(1, keepdim=True)
    else:
        mixed = (window.unfold(1, len(weights.convolution), 1) * weights.convolution.t()).sum(-1)
    mixed = F.silu(mixed).float()
    batch, per_side = len(mixed), (mixed.shape[-1] - sizes.value_heads * sizes.value) // 2
    key_heads = per_side // sizes.key
    both = F.rms_norm(
        mixed[..., : 2 * per_side].view(batch, length, 2, key_heads, sizes.key),
        (sizes.key,),
        None,
        L2_EPSILON / sizes.key,
    )
    # [2, B, key heads, value heads of each, T, K]
    both = (both * weights.scale).permute(2, 0, 3, 1, 4).unsqueeze(3)
    both = both.expand(-1, -1, -1, sizes.value_heads // key_heads, -1, -1).reshape(2, -1, length, sizes.key)
    values = mixed[..., 2 * per_side :].view(batch, length, -1, sizes.value).transpose(1, 2)
    return both[0], both[1], values.reshape(-1, length, sizes.value)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, strength: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Several tokens at once, in the chunked form of the rule (arXiv 2412.06464), the state left as it is.

    Returns:
        what queries read [Z, T, V], errors times strength [Z, T, V], and the running sum of decay [Z, T], fp64.
    """
    # In fp32 the difference of two large sums would lose a small decay between neighbours.
    total = decay.double().cumsum(-1)
    length = decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=decay.device).triu(1)
    between = (total[:, :, None] - total[:, None, :]).masked_fill(later, -torch.inf).exp().to(key.dtype)
    since = total.exp().to(key.dtype)[..., None]
    system = torch.bmm(key, key.transpose(1, 2)) * between * strength
    wanted = (value - torch.bmm(key, state) * since) * strength
    errors = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    read = torch.bmm(query, state) * since
    return read.baddbmm_(torch.bmm(query, key.transpose(1, 2)) * between, errors), errors, total
