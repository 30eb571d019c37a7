"""Memory of a training run on each pipeline rank: what is static, activations, losses (no torch).

What is static follows Megatron's buffers: parameters in the run's precision, gradients in fp32 (``main_grad``), and
with the distributed optimizer, of the own share alone, a main copy in fp32 (of 16-bit weights) and the optimizer's
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.pipeline_layout import Stages
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.loss_options import FORWARD_KL
from megatron_slim.optimizers import ADAM, MAIN_COPY, OPTIMIZERS
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


def rank_counts(shape: ModelShape | None, layers: Sequence[int], layout: TrainLayout) -> list[Count]:
    """Parameters of a model on each pipeline rank, all its virtual stages together."""
    if shape is None:
        return [Count()] * layout.pp
    return list(_rank_counts(shape, tuple(layers), layout.tp, layout.ep, layout.pp))


@cache
def _rank_counts(shape: ModelShape, layers: tuple[int, ...], tp: int, ep: int, pp: int) -> tuple[Count, ...]:
    stages = counter(shape, tp, ep).stages(layers)
    return tuple(sum(stages[rank::pp], Count()) for rank in range(pp))


def static_memory(student: Count, teacher: Count, layout: TrainLayout, settings: Settings) -> Memory:
    """Of a rank that holds so many parameters; buffers' padding is left out (`build` has it)."""
    optimizer = OPTIMIZERS[settings.optimizer]
    state = optimizer.state_bytes + (MAIN_COPY if settings.width < MAIN_COPY else 0)
    dense, expert = (layout.dp, layout.expert_dp) if settings.shards_optimizer else (1, 1)
    states = state * (student.dense / dense + student.expert / expert)
    if optimizer.has_matrices:  # the rest has Adam's two
        states += (OPTIMIZERS[ADAM].state_bytes - optimizer.state_bytes) * student.rest / dense
    weights, gradients = settings.width * student.total, GRADIENT * student.total
    return Memory(weights, gradients, states, settings.width * teacher.total)


def least_static(student: ModelShape, teacher: ModelShape | None, layout: TrainLayout, settings: Settings) -> float:
    """What no stages go below on the fullest rank: everything, split evenly."""

    def spread(shape: ModelShape | None) -> Count:
        whole = (
            rank_counts(shape, [shape.num_layers], TrainLayout(1, tp=layout.tp, ep=layout.ep))[0] if shape else Count()
        )
        return Count(whole.dense // layout.pp, whole.expert // layout.pp)

    return static_memory(spread(student), spread(teacher), layout, settings).total


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
            rank_counts(teacher, stages.teacher_layers, layout),
            strict=True,
        )
        static = [static_memory(own, theirs, layout, settings) for own, theirs in counts]
    held, start, number = [], 0, len(stages.student_layers)
    for stage, count in enumerate(stages.student_layers):
        kept = stage_bytes(student, start, start + count, of, recompute, is_last=stage == number - 1)
        held.append(kept + (received_bytes(student, teacher, of) if stage else 0.0))
        start += count
    fullest = most_held(layout.pp, layout.micro_batches(settings), layout.vpp, held)
    working = max(largest_block_bytes(shape, of) for shape in (student, teacher) if shape is not None)
    found = []
    for rank, (own, activations) in enumerate(zip(static, fullest, strict=True)):
        loss = loss_bytes(student, teacher, layout, settings) if rank == layout.pp - 1 else 0.0
        lost = assumed.overhead_gib * GIB + assumed.fragmentation * (activations + working + loss)
        found.append(Memory(own.weights, own.gradients, own.optimizer, own.teacher, activations, working, loss, lost))
    return found
