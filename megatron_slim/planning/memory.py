"""Memory of a training run on each pipeline rank: what is static, activations, losses (no torch).

What is static follows Megatron's buffers: parameters in the run's precision; of those that are trained, gradients in
fp32 (``main_grad``), and with the distributed optimizer, of the own share alone, a main copy in fp32 (of 16-bit
weights) and the optimizer's states. `storage` has other ways to keep these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megatron_slim.architecture.flops import Recompute
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.parts import TrainOnly, reaches
from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.loss_options import FORWARD_KL
from megatron_slim.optimizers import ADAM, OPTIMIZERS
from megatron_slim.planning.activations import Pass, largest_block_bytes, stage_bytes
from megatron_slim.planning.hardware import GIB, Assumptions
from megatron_slim.planning.layouts import RECOMPUTE, Settings, TrainLayout
from megatron_slim.planning.parameters import Count, counter
from megatron_slim.planning.schedule import most_held

GRADIENT = 4  # bytes
# Of a chunk of the losses, a token and column of the vocabulary (docs/distillation.md).
LOSS_BYTES = {"bf16": 14, "fp32": 12}
LOSS_OTHERS = 3.0  # losses that need both models' probabilities as well as the logits


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: of the student.
        gradients: its ``main_grad``.
        optimizer: main copy and moments.
        teacher: its weights.
        activations: kept for backward passes to come, at the fullest, and what stages have received.
        working: in use at once: a block of either model, forward or backward.
        loss: a chunk of logits, and hidden states of all heads with their gradients.
        overhead: CUDA context, libraries' and NCCL's buffers, what the allocator loses.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    teacher: float = 0.0
    activations: float = 0.0
    working: float = 0.0
    loss: float = 0.0
    overhead: float = 0.0

    @property
    def static(self) -> float:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer + self.teacher

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def rank_counts(
    shape: ModelShape | None, layers: Sequence[int], layout: TrainLayout, only: TrainOnly | None = None
) -> list[Count]:
    """Parameters of a model on each pipeline rank, all its virtual stages together; of ``only`` what is trained."""
    if shape is None:
        return [Count()] * layout.pp
    return list(_rank_counts(shape, tuple(layers), layout.tp, layout.ep, layout.pp, only))


@cache
def _rank_counts(
    shape: ModelShape, layers: tuple[int, ...], tp: int, ep: int, pp: int, only: TrainOnly | None
) -> tuple[Count, ...]:
    stages = counter(shape, tp, ep, only).stages(layers)
    return tuple(sum(stages[rank::pp], Count()) for rank in range(pp))


def teacher_counts(
    shape: ModelShape | None, layers: Sequence[int], layout: TrainLayout, settings: Settings
) -> list[Count]:
    """Parameters of the teacher on each pipeline rank: all of it, or of its output layer alone, on the last one."""
    if shape is None or not settings.teacher_head_only:
        return rank_counts(shape, layers, layout)
    return [*[Count()] * (layout.pp - 1), Count(padded_vocab_size(shape) // layout.tp * shape.hidden_size)]


def static_of_head(shape: ModelShape | None, layout: TrainLayout, settings: Settings) -> list[float]:
    """Bytes of the teacher's output layer on each pipeline rank, where it is all there is of the teacher; else 0."""
    if not settings.teacher_head_only:
        return [0.0] * layout.pp
    return [float(settings.width * count.total) for count in teacher_counts(shape, (), layout, settings)]


def static_memory(
    student: Count, teacher: Count, layout: TrainLayout, settings: Settings, trained: Count | None = None
) -> Memory:
    """Of a rank that holds so many parameters; buffers' padding is left out (`build` has it).

    Args:
        student: all of its parameters.
        teacher: likewise.
        layout: the parallel sizes.
        settings: the run.
        trained: of the student's, those that are; None: all.
    """
    optimizer, storage = OPTIMIZERS[settings.optimizer], settings.storage
    trained = student if trained is None else trained
    states = storage.state_bytes(settings.optimizer, settings.width) * shared(trained, layout, settings)
    if optimizer.has_matrices:  # the rest has Adam's two
        dense = layout.dp if settings.shards_optimizer else 1
        states += (OPTIMIZERS[ADAM].state_bytes - optimizer.state_bytes) * trained.rest / dense
    weights, gradients = settings.width * student.total, storage.gradient * trained.total
    return Memory(weights, gradients, states, settings.width * teacher.total)


def shared(trained: Count, layout: TrainLayout, settings: Settings) -> float:
    """Trained parameters whose state a rank has, of those that it holds."""
    dense, expert = (layout.dp, layout.expert_dp) if settings.shards_optimizer else (1, 1)
    return trained.dense / dense + trained.expert / expert


def host_bytes(student: ModelShape, layout: TrainLayout, stages: Stages, settings: Settings) -> float:
    """Bytes on the host for each GPU, of the rank with most of them: states that are not on the GPU."""
    counts = rank_counts(student, stages.student_layers, layout, settings.only)
    return settings.storage.host * max(shared(count, layout, settings) for count in counts)


def least_static(student: ModelShape, teacher: ModelShape | None, layout: TrainLayout, settings: Settings) -> float:
    """What no stages go below on the fullest rank: everything, split evenly."""
    one = TrainLayout(1, tp=layout.tp, ep=layout.ep)

    def spread(counts: Sequence[Count]) -> Count:
        return Count(counts[0].dense // layout.pp, counts[0].expert // layout.pp)

    own, trained = (spread(rank_counts(student, [student.num_layers], one, only)) for only in (None, settings.only))
    layers = [teacher.num_layers if teacher else 0]
    theirs = spread(teacher_counts(teacher, layers, one, settings))
    return static_memory(own, theirs, layout, settings, trained).total


def loss_bytes(student: ModelShape, teacher: ModelShape | None, layout: TrainLayout, settings: Settings) -> float:
    """Of output layer and losses, on the last stage."""
    tokens = settings.seq_length * layout.micro_batch
    columns = padded_vocab_size(student) / layout.tp
    each = LOSS_BYTES[settings.precision] * (1.0 if settings.kd_loss == FORWARD_KL else LOSS_OTHERS)
    chunk = each * min(settings.loss_chunk, tokens) * columns
    heads = 2 * (1 + student.mtp_num_layers) * student.hidden_size  # and their gradients
    if teacher is not None:
        heads += (1 + teacher.mtp_num_layers) * teacher.hidden_size
    return chunk + tokens * settings.width * heads


def micro_batch(layout: TrainLayout, settings: Settings, assumed: Assumptions) -> Pass:
    """One forward pass of the layout."""
    imbalance = assumed.imbalance if layout.ep > 1 else 1.0
    width, kernels = settings.width, settings.kernels
    return Pass(settings.seq_length, layout.micro_batch, layout.tp, width, kernels, imbalance)


def first_with_graph(student: ModelShape, settings: Settings, recompute: Recompute) -> int:
    """The first layer that keeps something for backward on the first stage.

    None before what is trained does; but recomputed ones do, and those that any stage behind the first has.
    """
    if settings.only is None:
        return 0
    first = reaches(student, settings.only)
    return 0 if recompute.granularity is not None and first < student.num_layers else first


def received_bytes(student: ModelShape, teacher: ModelShape | None, of: Pass) -> float:
    """Hidden states of both models between two stages, of one micro-batch."""
    return of.share * of.width * (student.hidden_size + (teacher.hidden_size if teacher else 0))


def rank_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: TrainLayout,
    stages: Stages,
    settings: Settings,
    assumed: Assumptions,
    static: Sequence[Memory] | None = None,
) -> list[Memory]:
    """Memory of every pipeline rank.

    Args:
        student: sizes of the student.
        teacher: of the teacher.
        layout: the parallel sizes.
        stages: layers of both models on each virtual stage.
        settings: the run.
        assumed: overhead and fragmentation.
        static: of every rank as built; None counts it from the table.
    """
    of, recompute = micro_batch(layout, settings, assumed), RECOMPUTE[layout.recompute]
    if static is None:
        counts = zip(
            rank_counts(student, stages.student_layers, layout),
            teacher_counts(teacher, stages.teacher_layers, layout, settings),
            rank_counts(student, stages.student_layers, layout, settings.only),
            strict=True,
        )
        static = [static_memory(own, theirs, layout, settings, trained) for own, theirs, trained in counts]
    runs = None if settings.teacher_head_only else teacher
    held, start, number = [], 0, len(stages.student_layers)
    for stage, count in enumerate(stages.student_layers):
        first = start if stage else min(count, first_with_graph(student, settings, recompute))
        kept = stage_bytes(student, first, start + count, of, recompute, is_last=stage == number - 1)
        held.append(kept + (received_bytes(student, runs, of) if stage else 0.0))
        start += count
    fullest = most_held(layout.pp, layout.micro_batches(settings), layout.vpp, held)
    working = max(largest_block_bytes(shape, of) for shape in (student, runs) if shape is not None)
    found = []
    for rank, (own, activations) in enumerate(zip(static, fullest, strict=True)):
        loss = loss_bytes(student, teacher, layout, settings) if rank == layout.pp - 1 else 0.0
        lost = assumed.overhead_gib * GIB + assumed.fragmentation * (activations + working + loss)
        found.append(Memory(own.weights, own.gradients, own.optimizer, own.teacher, activations, working, loss, lost))
    return found
