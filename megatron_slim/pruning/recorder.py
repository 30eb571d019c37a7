"""Listening to Megatron's layers: hooks that add up, in float64, what `importance` makes statistics of.

A rank adds what it alone sees, so that summed over all ranks every (token, unit) pair counts once: under tensor and
sequence parallelism the residual stream, norms and router see the rank's part of the sequence, heads and the shared
expert's neurons are the rank's own and see all of it, and an expert sees the tokens that were sent to it.

Sums of a block (H hidden, E experts, F neurons of one; sizes are those of the whole model on every rank):

    tokens []   input, output [H]   cosine []       tokens that count; their states; cosines of input and output
    {input|mlp}_norm.abs [H]                        |normed|
    {input|mlp}_norm.squares [H]                    over samples, squares of the mean over its tokens of |normed|
    heads [heads]   neurons [S]                     norms of heads; |activations| that all tokens have, of the shared
                                                    expert or of a dense network
    experts.{count|share} [E]                       1, share of the gate
    experts.NAME [E]                                what `expert_metrics.pair_sums` adds up of every pair
    experts.output [E, H]   experts.ffn [E, F]      outputs; |activations|
    experts.logits [E, E]                           products of logits

Shape suffixes: S sequence, B samples, T tokens, P routed (token, expert) pairs sorted by expert, E experts, H hidden.
Activations stay in their own precision: norms and products are taken in fp32, and only what is summed is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.feed_forward import EXPERT_NEURONS
from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.local_experts import LocalExperts
from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.architecture.packing import by_sample, in_one_sequence
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.expert_metrics import RoutedPairs, pair_sums
from megatron_slim.pruning.importance import Sums


class Recorder:
    """Sums of one module.

    Attributes:
        sums: by name, float64.
    """

    def __init__(self, sizes: dict[str, tuple[int, ...]]) -> None:
        """Start at zero; the parallel state must exist."""
        group = parallel_state.get_tensor_model_parallel_group()
        device = torch.cuda.current_device()
        self.sums: Sums = {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in sizes.items()}
        self._group, self._ranks, self._rank = group, group.size(), group.rank()
        self._counted_SB: Tensor | None = None
        self._samples_in_one, self._length_B1 = 1, torch.ones(0)

    def count_only(self, counted_SB: Tensor | None, samples_in_one: int = 1) -> None:
        """Say which tokens of the next micro-batches count.

        Args:
            counted_SB: over the whole sequence; None is all.
            samples_in_one: how many samples lie one behind the other in the sequence of what is listened to, as
                `packing.in_one_sequence` puts them.
        """
        self._samples_in_one = samples_in_one
        if counted_SB is None:
            self._counted_SB = None
            return
        counted_SB = counted_SB.to(torch.cuda.current_device())
        self._length_B1 = counted_SB.sum(0).clamp(min=1)[:, None]
        self._counted_SB = counted_SB if samples_in_one == 1 else in_one_sequence(counted_SB)

    def _local(self) -> Tensor | None:
        """Which tokens count of this rank's part of the sequence."""
        return None if self._counted_SB is None else self._counted_SB.chunk(self._ranks)[self._rank]

    def _add(self, name: str, values: Tensor, counted_SB: Tensor | None, start: int = 0) -> None:
        """Add values [S, B, units] of the tokens that count, from unit ``start`` on."""
        if counted_SB is not None:
            values = values * counted_SB[..., None]
        self.sums[name][start : start + values.shape[-1]] += values.sum((0, 1), dtype=torch.float64)

    def _add_norm(self, site: str, normed_SBH: Tensor) -> None:
        """Add the output of a norm, this rank's part of every sequence."""
        magnitude, counted_SB = normed_SBH.detach().abs(), self._local()
        if counted_SB is not None:
            magnitude = magnitude * counted_SB[..., None]
        if self._samples_in_one > 1:
            magnitude = by_sample(magnitude, self._samples_in_one)
        total_BH = magnitude.sum(0, dtype=torch.float64)
        self.sums[f"{site}.abs"] += total_BH.sum(0)
        if self._ranks > 1:  # the square is of the whole sequence's mean
            torch.distributed.all_reduce(total_BH, group=self._group)
        if self._rank == 0:
            length = len(magnitude) * self._ranks if counted_SB is None else self._length_B1
            self.sums[f"{site}.squares"] += (total_BH / length).square().sum(0)


def norm_sizes(site: str, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the sums of one norm site."""
    return {f"{site}.abs": (hidden_size,), f"{site}.squares": (hidden_size,)}


def block_sizes(block: str, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the sums of a block."""
    hidden, experts = shape.hidden_size, shape.in_block(block).num_moe_experts
    sizes: dict[str, tuple[int, ...]] = {
        "tokens": (),
        "cosine": (),
        "input": (hidden,),
        "output": (hidden,),
        "heads": (getattr(shape, KINDS[shape.layer_type(block)].heads.field),),
    }
    kind = FEED_FORWARD[shape.ffn_kind(block)]
    if kind.is_routed:
        sizes |= {f"experts.{name}": (experts,) for name in ("count", "share", *pair_sums())}
        sizes |= {
            "experts.output": (experts, hidden),
            "experts.ffn": (experts, getattr(shape, EXPERT_NEURONS.field)),
            "experts.logits": (experts, experts),
        }
    if neurons := getattr(shape, kind.neurons.field):
        sizes["neurons"] = (neurons,)
    if block.startswith("model."):
        sizes |= norm_sizes("input_norm", hidden) | norm_sizes("mlp_norm", hidden)
    return sizes


class NormRecorder(Recorder):
    """Sums of a norm that is a module of its own: the trunk's final one."""

    SITE = "final_norm"

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(norm_sizes(self.SITE, shape.hidden_size))

    def add(self, normed_SBH: Tensor) -> None:
        """Add an output of the norm."""
        self._add_norm(self.SITE, normed_SBH)


@dataclass
class _Pairs:
    """Routed pairs of one micro-batch on their way through the experts of this rank."""

    gates_P: Tensor
    counted_P: Tensor | None
    by_expert: list[int]

    def sums_by_expert(self, values: Tensor) -> Tensor:
        """Sums [E of this rank, ...] of values [P, ...] over the pairs of every expert."""
        if self.counted_P is not None:
            values = values * self.counted_P[:, None]
        return torch.stack([part.sum(0, dtype=torch.float64) for part in values.split(self.by_expert)])


class BlockRecorder(Recorder):
    """Listens to one transformer layer: its ends, its norms, its heads, its neurons, its router and its experts."""

    def __init__(self, block: str, shape: ModelShape, layer: TransformerLayer) -> None:
        """Register the hooks.

        Args:
            block: name of the layer.
            shape: sizes of the whole model.
            layer: this rank's part of the layer.
        """
        super().__init__(block_sizes(block, shape))
        self._layer, self._in_trunk = layer, block.startswith("model.")
        self._zero_centered, self._epsilon = shape.family.zero_centered_norms, shape.layernorm_epsilon
        self._input_weight = next(
            parameter for name, parameter in layer.named_parameters() if name.endswith("layer_norm_weight")
        )
        self._pairs: _Pairs | None = None
        self._pair_sums = pair_sums()
        layer.register_forward_hook(self._on_layer, with_kwargs=True)
        if self._in_trunk:
            layer.pre_mlp_layernorm.register_forward_hook(self._on_mlp_norm)
        self._listen_to_heads(layer.self_attention, block, shape)
        kind = FEED_FORWARD[shape.ffn_kind(block)]
        if "neurons" in self.sums:
            layer.mlp.get_submodule(kind.neurons.projection).register_forward_pre_hook(self._on_neurons)
        if kind.is_routed:
            self._listen_to_experts(layer.mlp)

    def _listen_to_heads(self, attention: nn.Module, block: str, shape: ModelShape) -> None:
        heads = KINDS[shape.layer_type(block)].heads
        self._head_dim = getattr(shape, heads.width)
        getattr(attention, heads.projection).register_forward_pre_hook(self._on_heads)

    def _listen_to_experts(self, mlp: MoELayer) -> None:
        mlp.router.register_forward_hook(self._on_router)
        local: Sequence[int] = mlp.local_expert_indices
        self._own = slice(local[0], local[-1] + 1)
        mlp.experts.register_forward_pre_hook(self._before_experts)
        mlp.experts.register_forward_hook(self._after_experts)
        # One site for the pairs of all experts, with Transformer Engine and without.
        site = mlp.experts.activations if isinstance(mlp.experts, LocalExperts) else mlp.experts.linear_fc2
        site.register_forward_pre_hook(self._on_expert_ffn)

    def _on_layer(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Keywords, output: tuple[Tensor, Tensor | None]
    ) -> None:
        before_SBH, after_SBH, counted_SB = args[0] if args else kwargs["hidden_states"], output[0], self._local()
        count = before_SBH[..., 0].numel() if counted_SB is None else counted_SB.sum()
        self.sums["tokens"] += count
        self._add("input", before_SBH, counted_SB)
        self._add("output", after_SBH, counted_SB)
        cosine_SB = torch.cosine_similarity(before_SBH.float(), after_SBH.float(), dim=-1)
        self.sums["cosine"] += (cosine_SB if counted_SB is None else cosine_SB * counted_SB).sum(dtype=torch.float64)
        if self._in_trunk:
            weight = self._input_weight
            normed = rms_norm(before_SBH, weight, self._epsilon, zero_centered=self._zero_centered)
            self._add_norm("input_norm", normed)

    def _on_mlp_norm(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._add_norm("mlp_norm", output)

    def _on_heads(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        by_head = args[0].unflatten(-1, (-1, self._head_dim))
        lengths = torch.linalg.vector_norm(by_head, dim=-1, dtype=torch.float32)
        self._add("heads", lengths, self._counted_SB, start=self._rank * lengths.shape[-1])

    def _on_neurons(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add("neurons", args[0].abs(), self._counted_SB, start=self._rank * args[0].shape[-1])

    def _on_router(
        self, module: TopKRouter, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add the routing; gates of pairs that do not count leave with a minus sign, which travels with the pair."""
        (gates_TE, routed_TE), counted_SB = output, self._local()
        logits_TE = args[0].flatten(0, -2).float() @ module.weight.float().T
        shares_TE = gates_TE.float() * routed_TE
        shares_TE /= shares_TE.sum(1, keepdim=True)
        visits_TE = routed_TE
        if counted_SB is not None:
            counted_T1 = counted_SB.flatten()[:, None]
            visits_TE, shares_TE, logits_TE = routed_TE & counted_T1, shares_TE * counted_T1, logits_TE * counted_T1
            gates_TE = torch.where(counted_T1, gates_TE, -gates_TE)
        self.sums["experts.count"] += visits_TE.sum(0)
        self.sums["experts.share"] += shares_TE.sum(0, dtype=torch.float64)
        self.sums["experts.logits"] += logits_TE.T @ logits_TE
        return gates_TE, routed_TE

    def _before_experts(self, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Megatron applies the gate inside an expert, before its last projection; here it is applied after it."""
        hidden, by_expert, gates_P = args
        counted_P = ~gates_P.signbit()
        self._pairs = _Pairs(gates_P.abs(), None if counted_P.all() else counted_P, by_expert.tolist())
        return hidden, by_expert, torch.ones_like(gates_P)

    def _on_expert_ffn(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self._pairs is not None
        self.sums["experts.ffn"][self._own] += self._pairs.sums_by_expert(args[0].abs())

    def _after_experts(self, module: nn.Module, args: object, output: tuple[Tensor, object]) -> tuple[Tensor, object]:
        assert self._pairs is not None
        outputs_PH, gates_P = output[0], self._pairs.gates_P
        lengths_P = torch.linalg.vector_norm(outputs_PH, dim=1, dtype=torch.float32)
        pairs = RoutedPairs(outputs_PH, gates_P, lengths_P)
        per_pair = torch.stack([value(pairs) for value in self._pair_sums.values()], dim=1)
        for name, total_E in zip(self._pair_sums, self._pairs.sums_by_expert(per_pair).T, strict=True):
            self.sums[f"experts.{name}"][self._own] += total_E
        self.sums["experts.output"][self._own] += self._pairs.sums_by_expert(outputs_PH)
        self._pairs = None
        return (outputs_PH * gates_P[:, None]).to(outputs_PH.dtype), output[1]
