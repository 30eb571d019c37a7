"""How long the parts of one model take on one rank: operations, memory traffic, communication (no torch).

Estimates, not measurements: counted work over assumed rates (`hardware.Assumptions`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_slim.architecture.backward import backward_flops
from megatron_slim.architecture.family import MOE, MTP_SUBLAYERS
from megatron_slim.architecture.flops import block_flops, head_flops, mtp_flops
from megatron_slim.architecture.kinds import FEED_FORWARD
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.parts import EXPERTS, part_name, parts_of_kind
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.planning.activations import Pass, norm_bytes, sublayer_bytes
from megatron_slim.planning.hardware import Assumptions, Gpu
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import GRADIENT, LOSS_BYTES, micro_batch
from megatron_slim.planning.parameters import counter

WEIGHED = ("projections", "mlp", EXPERTS)  # products that take as long as reading weights if there are few tokens
LATENCY = 20e-6  # seconds of a collective or a message, whatever it carries


@dataclass(frozen=True)
class Seconds:
    """Time on one rank by what takes it."""

    compute: float = 0.0
    traffic: float = 0.0
    tensor: float = 0.0
    all_to_all: float = 0.0
    host: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.compute + other.compute,
            self.traffic + other.traffic,
            self.tensor + other.tensor,
            self.all_to_all + other.all_to_all,
            self.host + other.host,
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.traffic + self.tensor + self.all_to_all + self.host


class Cost:
    """Times of one model's parts under a layout."""

    def __init__(self, shape: ModelShape, layout: TrainLayout, settings: Settings, gpu: Gpu, assumed: Assumptions):
        """Set up for one of the two models."""
        self.shape, self.layout, self.settings, self.gpu, self.assumed = shape, layout, settings, gpu, assumed
        self.of: Pass = micro_batch(layout, settings, assumed)
        self.hbm = gpu.hbm * assumed.hbm
        self.counts = counter(shape, layout.tp, layout.ep).sublayers
        self.kinds = {kind: block_flops(shape, (kind,), settings.seq_length, settings.kernels) for kind in self.counts}
        self._of_parts: dict[tuple[tuple[str, str], frozenset[str], bool], Seconds] = {}

    def _collective(self, nbytes: float, ranks: int) -> float:
        """An all-gather or reduce-scatter over NVLink, of so many bytes gathered or scattered."""
        if ranks == 1:
            return 0.0
        return LATENCY + nbytes * (ranks - 1) / ranks / (self.gpu.nvlink * self.assumed.nvlink)

    def tensor(self, passes: int) -> float:
        """So many all-gathers or reduce-scatters of the hidden states of all tokens."""
        return passes * self._collective(
            self.of.share * self.layout.tp * self.of.width * self.shape.hidden_size, self.layout.tp
        )

    def all_to_all(self) -> float:
        """Dispatch of routed tokens to their experts, or their way back; NVLink within a node, the network beyond."""
        ep, node = self.layout.ep, self.gpu.per_node
        if ep == 1:
            return 0.0
        routed = self.of.share * self.shape.moe_router_topk * self.shape.hidden_size * self.of.width * self.of.imbalance
        near = min(ep, node)
        inside = routed * (near - 1) / ep / (self.gpu.nvlink * self.assumed.nvlink)
        outside = routed * (ep - near) / ep / (self.gpu.network * self.assumed.network)
        return LATENCY + max(inside, outside)

    def _product(self, flops: float, share_of_peak: float, weights: float, passes: int) -> float:
        """Products of one or (backward) two passes, or the reading of their weights, whichever takes longer.

        Backward, the gradient of the weights is also read, added to and written in fp32.
        """
        peak = (self.gpu.bf16 if self.of.width == 2 else self.gpu.bf16 / 2) * share_of_peak
        moved = weights * (self.of.width if passes == 1 else self.of.width + 2 * GRADIENT)
        return max(passes * flops * self.of.share / peak, moved / self.hbm)

    def attention(self, kind: str, passes: int) -> Seconds:
        """Attention or Gated DeltaNet; ``passes`` is 1 forward, 2 backward."""
        flops, assumed, count = self.kinds[kind], self.assumed, self.counts[kind]
        core = flops.get("core_attn", 0.0) / assumed.attention + flops.get("delta_rule", 0.0) / assumed.delta_rule
        compute = self._product(flops["projections"], assumed.gemm, count.dense, passes)
        compute += passes * core * self.of.share / self.gpu.bf16
        return Seconds(compute, self._traffic(kind, passes), self.tensor(1 + passes))

    def _traffic(self, kind: str, passes: int) -> float:
        """Seconds in which memory moves what a sublayer keeps."""
        kept = norm_bytes(self.shape, self.of) + sublayer_bytes(self.shape, kind, self.of)
        times = self.assumed.forward_traffic if passes == 1 else self.assumed.backward_traffic
        return times * kept / self.hbm

    def feed_forward(self, kind: str, passes: int) -> Seconds:
        """The network behind attention."""
        if FEED_FORWARD[kind].is_routed:
            return self.moe(passes)
        compute = self._product(self.kinds[kind]["mlp"], self.assumed.gemm, self.counts[kind].dense, passes)
        return Seconds(compute, self._traffic(kind, passes), self.tensor(1 + passes))

    def moe(self, passes: int) -> Seconds:
        """Router, experts, shared expert."""
        flops, assumed = self.kinds[MOE], self.assumed
        compute = self._product(
            flops["experts"] * self.of.imbalance, assumed.grouped_gemm, self.counts[MOE].expert, passes
        )
        compute += passes * (flops["shared_experts"] + flops["router"]) * self.of.share / self.gpu.bf16 / assumed.gemm
        shared = self.tensor(1 + passes) if self.shape.moe_shared_expert_intermediate_size else 0.0
        return Seconds(compute, self._traffic(MOE, passes), shared, 2 * self.all_to_all())

    def block(self, kinds: tuple[str, str], passes: int) -> Seconds:
        """A transformer block; no shorter than it takes the host to launch it."""
        found = self.attention(kinds[0], passes) + self.feed_forward(kinds[1], passes)
        short = self.assumed.block_seconds - found.compute - found.traffic
        return replace(found, host=max(0.0, short))

    def backward(self, kinds: tuple[str, str]) -> Seconds:
        """The backward pass of a block, with what it computes again."""
        found = self.block(kinds, 2)
        if self.layout.recompute == "full":
            return found + self.block(kinds, 1)
        again = self.layout.recompute == "moe" and FEED_FORWARD[kinds[1]].is_routed
        return found + self.moe(1) if again else found

    def backward_of(self, layer: int, *, passes_on: bool) -> Seconds:
        """As `backward`, of a layer of which some parts are trained.

        Args:
            layer: from 0.
            passes_on: something before it needs a gradient.
        """
        only, kinds = self.settings.only, self.shape.sublayers[layer]
        assert only is not None
        key = kinds, only.parts_of_layer(layer), passes_on
        if key not in self._of_parts:
            self._of_parts[key] = self._backward_of(*key)
        return self._of_parts[key]

    def _backward_of(self, kinds: tuple[str, str], trained: frozenset[str], passes_on: bool) -> Seconds:
        found, again = Seconds(), Seconds()
        for kind in kinds:
            settings = self.settings
            back = backward_flops(self.shape, kind, settings.seq_length, settings.kernels, trained, passes_on=passes_on)
            if not any(back.values()):
                continue
            routed = kind in FEED_FORWARD and FEED_FORWARD[kind].is_routed
            found += Seconds(self._products_of(kind, back, trained), self._traffic(kind, 2), self.tensor(3))
            found += Seconds(all_to_all=2 * self.all_to_all() if routed else 0.0)
            passes_on = passes_on or bool(trained.intersection(parts_of_kind(self.shape, kind).values()))
            again = self.moe(1) if routed and self.layout.recompute == "moe" else again
        if not found.total:
            return found
        short = self.assumed.block_seconds - found.compute - found.traffic
        found = replace(found, host=max(0.0, short))
        return found + (self.block(kinds, 1) if self.layout.recompute == "full" else again)

    def _products_of(self, kind: str, back: dict[str, float], trained: frozenset[str]) -> float:
        """Seconds of products of a backward pass, by what does them."""
        assumed, count, total = self.assumed, self.counts[kind], 0.0
        rates = {"core_attn": assumed.attention, "delta_rule": assumed.delta_rule, EXPERTS: assumed.grouped_gemm}
        for name, flops in back.items():
            flops *= self.of.imbalance if name == EXPERTS else 1.0
            weights = {"projections": count.dense, "mlp": count.dense, EXPERTS: count.expert}.get(name, 0)
            own = part_name(kind, name) in trained if name not in ("core_attn", "delta_rule") else False
            moved = weights * (self.of.width + (2 * GRADIENT if own else 0)) / self.hbm if flops else 0.0
            peak = self.gpu.bf16 if self.of.width == 2 or name not in WEIGHED else self.gpu.bf16 / 2
            total += max(flops * self.of.share / peak / rates.get(name, assumed.gemm), moved)
        return total

    def heads(self, depths: int, *, times: float) -> Seconds:
        """Output layer and losses of the main head and MTP heads: the student's gradients come with the losses.

        Args:
            depths: of MTP.
            times: products of the output layer: one forward, and one each for the gradients of inputs and weight.
        """
        trained = times > 1
        tokens = self.of.share * self.layout.tp
        columns = padded_vocab_size(self.shape) / self.layout.tp
        flops = times * head_flops(self.shape) * self.of.share / self.gpu.bf16 / self.assumed.gemm
        each = LOSS_BYTES[self.settings.precision] * tokens * columns / self.hbm
        traffic = each * (self.assumed.forward_traffic if trained else 1.0)
        one = Seconds(flops, traffic, self.tensor(2 if trained else 1))
        return sum([one] * depths, one)

    def mtp(self, passes: int) -> Seconds:
        """An MTP block."""
        found = self.block(MTP_SUBLAYERS, 1) if passes == 1 else self.backward(MTP_SUBLAYERS)
        projection = passes * mtp_flops(self.shape) * self.of.share / self.gpu.bf16 / self.assumed.gemm
        return found + Seconds(projection, 0.0, self.tensor(1 + passes))
