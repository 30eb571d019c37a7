"""A teacher that computes ahead: some iterations' batches in one forward-only pass, then the student alone.

The pass comes before the first iteration of a block, outside the student's schedule, through the same pipeline stages.
The last stage keeps the hidden states that the losses need in host memory; they are what a co-located teacher
would have ended with, bit for bit. Validation runs the teacher co-located with the student as always.

The block's batches are read a second time, by a loader that starts where a run resumed at this iteration would start.
So the data of training, what counts as consumed, and resuming know nothing of blocks, which begin wherever a run does.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import megatron_slim.mcore

import psutil
import torch
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.training import cyclic_iter
from torch import Tensor

from megatron_slim.aliases import Function, Sample
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.offload import on_host
from megatron_slim.errors import SlimError
from megatron_slim.training.batches import Batch
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.teacher_config import DTYPES

logger = logging.getLogger(__name__)

# Flags of Megatron under which a block's batches, or the moment before a schedule, would not be what they seem.
_NOT_TOGETHER = {
    "rampup_batch_size": "the batch size must be the same in all iterations of a block",
    "step_batch_size_schedule": "the batch size must be the same in all iterations of a block",
    "phase_transition_iterations": "batches are found by the number of samples consumed since the start",
}


def ahead_violations(args: Namespace) -> list[str]:
    """What is wrong with the arguments of a teacher that computes ahead, in sentences.

    Args:
        args: Megatron's arguments and ours, as parsed.
    """
    if args.teacher_ahead == 0:
        why = "a co-located teacher is used in every micro-batch; give --teacher-ahead"
        return [f"--teacher-offload alone has no effect: {why}"] if args.teacher_offload else []
    if args.teacher_ahead < 0:
        return [f"--teacher-ahead {args.teacher_ahead} is not a number of iterations"]
    found = [] if args.teacher_load is not None else ["--teacher-ahead without a teacher; give --teacher-load"]
    for name, why in _NOT_TOGETHER.items():
        if getattr(args, name, None):
            found.append(f"--teacher-ahead does not go with --{name.replace('_', '-')}: {why}")
    if args.hidden_kd_layers:
        found.append("--teacher-ahead does not go with --hidden-kd-layers, which need a co-located teacher")
    if args.dataloader_type == "external":
        found.append("--teacher-ahead does not go with --dataloader-type external: batches are read twice")
    if args.cuda_graph_impl == "full_iteration":
        found.append("--teacher-ahead does not go with --cuda-graph-impl full_iteration: not all iterations are alike")
    if args.teacher_offload and args.fp8_param_gather and args.teacher_dtype is None:
        found.append("--teacher-offload does not go with weights kept in FP8; give --teacher-dtype")
    return found


def held_bytes(teacher: ModelShape, args: Namespace, depths: int) -> int:
    """Host memory that a rank of the last stage needs for the hidden states of a block.

    Tokens of a data-parallel rank, split under context and sequence parallelism, times hidden size, heads and
    bytes a number.

    Args:
        teacher: its sizes.
        args: Megatron's arguments, validated.
        depths: MTP depths that the teacher runs.
    """
    tokens = args.teacher_ahead * args.global_batch_size // args.data_parallel_size * args.seq_length
    tokens //= args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    dtype = args.params_dtype if args.teacher_dtype is None else DTYPES[args.teacher_dtype]
    return int(tokens * teacher.hidden_size * (1 + depths) * dtype.itemsize)


def check_host_memory(needed: int, args: Namespace) -> None:
    """Say how much host memory a block needs, or refuse it.

    Raises:
        SlimError: one rank alone would need more than this machine has left.
    """
    available = psutil.virtual_memory().available
    sizes = f"{needed / 1e9:.3g} GB of host memory on every rank of the last pipeline stage"
    if needed > available:
        what = f"--teacher-ahead {args.teacher_ahead} needs {sizes}, of which {available / 1e9:.3g} GB are left"
        raise SlimError(what, fix="give a smaller number of iterations")
    if args.rank == 0:
        logger.info(f"teacher ahead: hidden states of {args.teacher_ahead} iterations take {sizes}")


def block_end(start: int, length: int, args: Namespace) -> int:
    """The iteration, from 0, at which a block that begins with ``start`` is over: early where training stops or skips.

    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(train_iters=10, exit_interval=None, iterations_to_skip=[5])
    >>> block_end(0, 4, args), block_end(3, 4, args), block_end(8, 4, args)
    (4, 4, 10)
    """
    ends = [start + length, args.train_iters]
    if args.exit_interval:
        ends.append((start // args.exit_interval + 1) * args.exit_interval)
    ends += [number - 1 for number in args.iterations_to_skip if number - 1 > start]  # these count from 1
    return int(min(ends))


@dataclass(frozen=True)
class Held:
    """One micro-batch on the last stage: labels [b, s] on the device, the teacher's hidden states on the host."""

    labels: Tensor
    states: Tensor


@dataclass
class TeacherAhead:
    """Runs the teacher block by block, and hands out what it ended with.

    Attributes:
        chunks: this rank's virtual pipeline stages, teachers attached.
        next_batch: gives this rank's part of a batch, from an iterator and the virtual stage.
        watch: looks for hidden states that are not finite.
        timed: is entered around a forward pass, with the virtual stage.
        datasets: training data of every chunk.
    """

    chunks: Sequence[DistillationModel]
    next_batch: Callable[[Iterator[Sample], int | None], Batch]
    watch: FiniteWatch
    timed: Callable[[int | None], AbstractContextManager[None]]
    datasets: list[MegatronDataset] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    block: range = range(0)
    position: int = 0

    def around(self, schedule: Function, *, forward_only: bool, **arguments: object) -> object:
        """Run a schedule, before that of a training step the teacher where a block begins; all ranks call it."""
        if not forward_only:
            self._before_step()
        return schedule(forward_only=forward_only, **arguments)

    def _before_step(self) -> None:
        args = get_args()
        if args.curr_iteration not in self.block:
            self.block = range(args.curr_iteration, block_end(args.curr_iteration, args.teacher_ahead, args))
            self._run_teacher()
        self.position = self.block.index(args.curr_iteration) * get_num_microbatches()

    def take(self, labels: Tensor) -> Tensor:
        """The teacher's hidden states of the next micro-batch, whose labels show that it is the one it was.

        Only on the last stage, in the order of its forward passes.
        """
        held = self.held[self.position]
        self.position += 1
        torch._assert_async((held.labels == labels).all(), "the teacher computed ahead for other batches")
        return held.states.to(labels.device, non_blocking=True)

    def _run_teacher(self) -> None:
        args = get_args()
        self.held.clear()
        weights = [chunk.teacher_weights for chunk in self.chunks if chunk.teacher_weights is not None]
        for each in weights:
            each.load()
        readers = [_read(dataset, args.consumed_train_samples) for dataset in self.datasets]
        teachers = [chunk.teacher for chunk in self.chunks]
        interleaved = len(teachers) > 1
        with torch.no_grad():
            self.held = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=readers if interleaved else readers[0],
                model=teachers if interleaved else teachers[0],
                num_microbatches=len(self.block) * get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        for each in weights:
            each.drop()

    def _forward_step(
        self, iterator: Iterator[Sample], teacher: HiddenStatesModel
    ) -> tuple[Tensor, Callable[..., Held | None]]:
        batch = self.next_batch(iterator, teacher.vp_stage)
        with self.timed(teacher.vp_stage):
            states: Tensor = teacher(batch["tokens"], batch["position_ids"], None)
        if not teacher.post_process:
            self.watch.add_states("teacher", teacher.vp_stage, states)
        return states, partial(_hold, batch["labels"])


def _hold(labels: Tensor | None, states: Tensor, non_loss_data: bool = True) -> Held:
    assert labels is not None
    return Held(labels, on_host(states))


def _read(dataset: MegatronDataset, consumed: int) -> Iterator[Sample]:
    """Batches from the one after ``consumed`` samples on; nothing is opened on ranks that read none."""
    loader = build_pretraining_data_loader(dataset, consumed)
    yield from cyclic_iter(loader) if get_args().dataloader_type == "cyclic" else loader
