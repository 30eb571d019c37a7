"""How long a training step takes: operations, memory traffic, communication, pipeline bubbles (no torch).

Estimates, not measurements: counted work over assumed rates (`hardware.Assumptions`). Nothing is assumed to overlap but
the sending of an interleaved pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_slim.architecture.family import MOE, MTP_SUBLAYERS
from megatron_slim.architecture.flops import block_flops, head_flops, mtp_flops, student_flops, teacher_flops
from megatron_slim.architecture.kinds import FEED_FORWARD
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.planning.activations import Pass, norm_bytes, sublayer_bytes
from megatron_slim.planning.hardware import Assumptions, Gpu
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import GRADIENT, LOSS_BYTES, micro_batch, rank_counts, received_bytes
from megatron_slim.planning.parameters import counter
from megatron_slim.planning.schedule import step_seconds

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


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        seconds: in all.
        pipeline: of these, forward and backward passes of all micro-batches, bubbles included.
        bubble: share of ``seconds`` that ranks wait for one another, mean over ranks: bubbles and uneven stages.
        data_parallel: seconds of reduce-scatter of gradients and all-gather of weights.
        optimizer: seconds.
        busy: what the mean rank does in the rest of the time, by what takes it.
        send: seconds of a micro-batch between two stages.
        tokens_per_gpu: tokens per second and GPU.
        mfu: operations of both models, nothing counted twice, over the GPUs' peak in bf16.
    """

    seconds: float
    pipeline: float
    bubble: float
    data_parallel: float
    optimizer: float
    busy: Seconds
    send: float
    tokens_per_gpu: float
    mfu: float


class Cost:
    """Times of one model's parts under a layout."""

    def __init__(self, shape: ModelShape, layout: TrainLayout, settings: Settings, gpu: Gpu, assumed: Assumptions):
        """Set up for one of the two models."""
        self.shape, self.layout, self.settings, self.gpu, self.assumed = shape, layout, settings, gpu, assumed
        self.of: Pass = micro_batch(layout, settings, assumed)
        self.hbm = gpu.hbm * assumed.hbm
        self.counts = counter(shape, layout.tp, layout.ep).sublayers
        self.kinds = {kind: block_flops(shape, (kind,), settings.seq_length, settings.kernels) for kind in self.counts}

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

    def heads(self, depths: int, *, trained: bool) -> Seconds:
        """Output layer and losses of the main head and MTP heads: the student's gradients come with the losses."""
        tokens = self.of.share * self.layout.tp
        columns = padded_vocab_size(self.shape) / self.layout.tp
        flops = (3.0 if trained else 1.0) * head_flops(self.shape) * self.of.share / self.gpu.bf16 / self.assumed.gemm
        each = LOSS_BYTES[self.settings.precision] * tokens * columns / self.hbm
        traffic = each * (self.assumed.forward_traffic if trained else 1.0)
        one = Seconds(flops, traffic, self.tensor(2 if trained else 1))
        return sum([one] * depths, one)

    def mtp(self, passes: int) -> Seconds:
        """An MTP block."""
        found = self.block(MTP_SUBLAYERS, 1) if passes == 1 else self.backward(MTP_SUBLAYERS)
        projection = passes * mtp_flops(self.shape) * self.of.share / self.gpu.bf16 / self.assumed.gemm
        return found + Seconds(projection, 0.0, self.tensor(1 + passes))


def _sum(parts: Sequence[Seconds]) -> Seconds:
    return sum(parts, Seconds())


def stage_seconds(
    student: Cost, teacher: Cost | None, stages: Stages, *, teacher_runs_mtp: bool
) -> list[tuple[Seconds, Seconds]]:
    """Forward (the teacher's too) and backward of one micro-batch on every virtual stage."""
    found = []
    number, start, teacher_start = len(stages.student_layers), 0, 0
    layers = zip(stages.student_layers, stages.teacher_layers or (0,) * number, strict=True)
    ahead = {kinds: student.block(kinds, 1) for kinds in set(student.shape.sublayers)}
    back = {kinds: student.backward(kinds) for kinds in ahead}
    ahead_of_teacher = {kinds: teacher.block(kinds, 1) for kinds in set(teacher.shape.sublayers)} if teacher else {}
    for stage, (own, theirs) in enumerate(layers):
        blocks = student.shape.sublayers[start : start + own]
        forward, backward = _sum([ahead[kinds] for kinds in blocks]), _sum([back[kinds] for kinds in blocks])
        if teacher is not None:
            blocks_of_teacher = teacher.shape.sublayers[teacher_start : teacher_start + theirs]
            forward += _sum([ahead_of_teacher[kinds] for kinds in blocks_of_teacher])
        if stage == number - 1:
            depths = student.shape.mtp_num_layers
            forward += student.heads(depths, trained=True) + _sum([student.mtp(1)] * depths)
            backward += _sum([student.mtp(2)] * depths)
            if teacher is not None:
                runs = teacher.shape.mtp_num_layers if teacher_runs_mtp else 0
                forward += teacher.heads(runs, trained=False) + _sum([teacher.mtp(1)] * runs)
        found.append((forward, backward))
        start, teacher_start = start + own, teacher_start + theirs
    return found


def _synchronised(layers: Sequence[int], cost: Cost) -> tuple[float, float]:
    """Seconds that data-parallel ranks take for gradients and weights, and the optimizer; of the slowest rank."""
    layout, gpu, assumed = cost.layout, cost.gpu, cost.assumed
    optimizer, found = OPTIMIZERS[cost.settings.optimizer], []
    for count in rank_counts(cost.shape, layers, layout):
        communicated = updated = 0.0
        for numel, rest, polar, ranks, spread in (
            (count.dense, count.rest, count.dense_polar, layout.dp, layout.dp * layout.tp),
            (count.expert, 0, count.expert_polar, layout.expert_dp, layout.expert_dp * layout.ep),
        ):
            near = spread <= gpu.per_node
            rate = gpu.nvlink * assumed.nvlink if near else gpu.network * assumed.network
            if ranks > 1:
                communicated += LATENCY + numel * (GRADIENT + cost.of.width) * (ranks - 1) / ranks / rate
            shards = ranks if cost.settings.shards_optimizer else 1
            moved = (numel - rest) * optimizer.traffic + rest * OPTIMIZERS[ADAM].traffic
            updated += (moved / shards + numel * GRADIENT) / cost.hbm
            updated += optimizer.polar_steps * polar / shards / (gpu.fp64 * assumed.gemm)  # in fp32, at that rate
        found.append((communicated, updated))
    return max(each for each, _ in found), max(each for _, each in found)


def step(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: TrainLayout,
    stages: Stages,
    settings: Settings,
    gpu: Gpu,
    assumed: Assumptions,
) -> Step:
    """What a training step takes."""
    runs_mtp = teacher is not None and teacher.mtp_num_layers >= student.mtp_num_layers > 0
    cost = Cost(student, layout, settings, gpu, assumed)
    teacher_cost = Cost(teacher, layout, settings, gpu, assumed) if teacher is not None else None
    each = stage_seconds(cost, teacher_cost, stages, teacher_runs_mtp=runs_mtp)
    count, nbytes = layout.micro_batches(settings), received_bytes(student, teacher, cost.of)
    near = layout.gpus <= gpu.per_node  # else some stage's next one is on another node
    rate = gpu.nvlink * assumed.nvlink if near else gpu.network * assumed.network
    send = LATENCY + nbytes / rate if layout.pp > 1 else 0.0
    times = [forward.total for forward, _ in each], [backward.total for _, backward in each]
    pipeline = step_seconds(layout.pp, count, layout.vpp, *times, send)
    communicated, updated = _synchronised(stages.student_layers, cost)
    seconds = pipeline + communicated + updated
    busy = _sum([part for both in each for part in both])
    share = count / layout.pp
    mean = Seconds(*(value * share for value in (busy.compute, busy.traffic, busy.tensor, busy.all_to_all, busy.host)))
    tokens = settings.global_batch * settings.seq_length
    flops = student_flops(student, settings.seq_length, settings.kernels).total
    if teacher is not None:
        flops += teacher_flops(teacher, settings.seq_length, settings.kernels, runs_mtp=runs_mtp).total
    return Step(
        seconds=seconds,
        pipeline=pipeline,
        bubble=max(0.0, pipeline - mean.total) / seconds,  # of one rank, rounding alone is left
        data_parallel=communicated,
        optimizer=updated,
        busy=mean,
        send=send,
        tokens_per_gpu=tokens / seconds / layout.gpus,
        mfu=flops * tokens / seconds / layout.gpus / gpu.bf16,
    )
