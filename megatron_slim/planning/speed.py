"""How long a training step takes: stages, pipeline bubbles, data parallelism, the optimizer (no torch).

Estimates, not measurements: counted work over assumed rates (`hardware.Assumptions`). Nothing is assumed to overlap but
the sending of an interleaved pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import head_flops, teacher_flops
from megatron_slim.architecture.parts import EMBEDDING, MTP_PART, NORMS, OUTPUT, Place, reaches
from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.planning.cost import LATENCY, Cost, Seconds
from megatron_slim.planning.hardware import Assumptions, Gpu
from megatron_slim.planning.layouts import Settings, TrainLayout
from megatron_slim.planning.memory import rank_counts, received_bytes, shared
from megatron_slim.planning.parameters import Count
from megatron_slim.planning.schedule import step_seconds


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


def _sum(parts: Sequence[Seconds]) -> Seconds:
    return sum(parts, Seconds())


def stage_seconds(
    student: Cost, teacher: Cost | None, stages: Stages, *, teacher_runs_mtp: bool
) -> list[tuple[Seconds, Seconds]]:
    """Forward (the teacher's too) and backward of one micro-batch on every virtual stage."""
    found = []
    number, start, teacher_start = len(stages.student_layers), 0, 0
    head, of_mtp, back = _backward(student)
    layers = zip(stages.student_layers, stages.teacher_layers or (0,) * number, strict=True)
    ahead = {kinds: student.block(kinds, 1) for kinds in set(student.shape.sublayers)}
    ahead_of_teacher = {kinds: teacher.block(kinds, 1) for kinds in set(teacher.shape.sublayers)} if teacher else {}
    for stage, (own, theirs) in enumerate(layers):
        blocks = student.shape.sublayers[start : start + own]
        forward, backward = _sum([ahead[kinds] for kinds in blocks]), _sum(back[start : start + own])
        if teacher is not None:
            blocks_of_teacher = teacher.shape.sublayers[teacher_start : teacher_start + theirs]
            forward += _sum([ahead_of_teacher[kinds] for kinds in blocks_of_teacher])
        if stage == number - 1:
            depths = student.shape.mtp_num_layers
            forward += student.heads(depths, times=head) + _sum([student.mtp(1)] * depths)
            backward += _sum([of_mtp] * depths)
            if teacher is not None:
                runs = teacher.shape.mtp_num_layers if teacher_runs_mtp else 0
                forward += teacher.heads(runs, times=1.0)
                forward += Seconds() if teacher.settings.teacher_head_only else _sum([teacher.mtp(1)] * runs)
        found.append((forward, backward))
        start, teacher_start = start + own, teacher_start + theirs
    return found


def _backward(student: Cost) -> tuple[float, Seconds, list[Seconds]]:
    """Products of the output layer for every one forward, backward passes of an MTP block, and of every layer."""
    shape, only = student.shape, student.settings.only
    has_mtp = shape.mtp_num_layers > 0
    if only is None:
        back = {kinds: student.backward(kinds) for kinds in set(shape.sublayers)}
        return 3.0, student.mtp(2) if has_mtp else Seconds(), [back[kinds] for kinds in shape.sublayers]
    first, mtp = reaches(shape, only), has_mtp and only.trains(Place(MTP_PART))
    everywhere = student.layout.pp > 1 or (student.layout.recompute != "none" and first < shape.num_layers)
    through = everywhere or mtp or first < shape.num_layers or only.trains(Place(NORMS))
    layers = [
        student.backward_of(layer, passes_on=everywhere or layer > first or only.trains(Place(EMBEDDING)))
        for layer in range(shape.num_layers)
    ]
    of_mtp = student.mtp(2) if has_mtp and through else Seconds()
    if has_mtp and through and not mtp:  # of the gradients, those of weights are left out
        of_mtp = replace(of_mtp, compute=of_mtp.compute / 2)
    return 1.0 + through + only.trains(Place(OUTPUT)), of_mtp, layers


def _host_seconds(count: Count, cost: Cost) -> float:
    """Of an optimizer on the host: gradients go there, weights come back, and its memory moves all states."""
    storage, assumed = cost.settings.storage, cost.assumed
    own = shared(count, cost.layout, cost.settings)
    if not storage.host:
        return 0.0
    link = storage.host_traffic * own / (assumed.host_link_gb * 1e9)
    return link + OPTIMIZERS[cost.settings.optimizer].traffic * own / (assumed.host_memory_gb * 1e9)


def _synchronised(layers: Sequence[int], cost: Cost) -> tuple[float, float]:
    """Seconds that data-parallel ranks take for gradients and weights, and the optimizer; of the slowest rank."""
    layout, gpu, assumed = cost.layout, cost.gpu, cost.assumed
    optimizer, found = OPTIMIZERS[cost.settings.optimizer], []
    gradient = cost.settings.storage.gradient
    for count in rank_counts(cost.shape, layers, layout, cost.settings.only):
        communicated, updated = 0.0, _host_seconds(count, cost)
        for numel, rest, polar, ranks, spread in (
            (count.dense, count.rest, count.dense_polar, layout.dp, layout.dp * layout.tp),
            (count.expert, 0, count.expert_polar, layout.expert_dp, layout.expert_dp * layout.ep),
        ):
            near = spread <= gpu.per_node
            rate = gpu.nvlink * assumed.nvlink if near else gpu.network * assumed.network
            if ranks > 1:
                communicated += LATENCY + numel * (gradient + cost.of.width) * (ranks - 1) / ranks / rate
            shards = ranks if cost.settings.shards_optimizer else 1
            moved = (numel - rest) * optimizer.traffic + rest * OPTIMIZERS[ADAM].traffic
            on_gpu = 0.0 if cost.settings.storage.host else moved / shards
            updated += (on_gpu + numel * gradient) / cost.hbm
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
    runs = None if settings.teacher_head_only else teacher
    count, nbytes = layout.micro_batches(settings), received_bytes(student, runs, cost.of)
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
    flops = step_flops(student, settings.seq_length, settings.kernels, only=settings.only).total
    if teacher is not None and settings.teacher_head_only:
        flops += head_flops(teacher) * (1 + (teacher.mtp_num_layers if runs_mtp else 0))
    elif teacher is not None:
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
