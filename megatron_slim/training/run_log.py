"""Metrics of a run: measured on every rank, added up once per ``--log-interval``, logged by one rank.

Times are of the interval; losses and experts are of its last iteration, so that an interrupted run logs what a whole
one does.

Megatron has one hook per iteration, ``finalize_model_grads_func``, between the backward passes and the optimizer. An
interval therefore ends there; it is as long as Megatron's own, and one optimizer step earlier.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import megatron_slim.mcore

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_timers, get_wandb_writer

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import teacher_flops
from megatron_slim.architecture.gpus import peak_flops
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.distillation.losses import LossWeights
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.terms import terms_of, weights_of
from megatron_slim.recipe_sections import Phase
from megatron_slim.training.meters import ExpertCounter, LossSums, StageClock, weights_of_terms
from megatron_slim.training.progressive import Place
from megatron_slim.training.run_figures import KINDS, Interval, Progress, RunConstants, figures, line
from megatron_slim.training.stage_layout import kernels_of
from megatron_slim.training.teacher_config import teacher_recipe
from megatron_slim.training.train_only import chosen

logger = logging.getLogger(__name__)


def logging_violations(args: Namespace) -> list[str]:
    """What is wrong with the arguments of the log, in sentences."""
    found = []
    if args.log_throughput:
        found.append(
            "--log-throughput is not supported: Megatron's count of operations knows neither the teacher nor Gated "
            "DeltaNet; TFLOP/s and MFU of both models are in the log without it"
        )
    if args.peak_tflops is not None and not (math.isfinite(args.peak_tflops) and args.peak_tflops > 0):
        found.append(f"--peak-tflops {args.peak_tflops:g} is not positive")
    if not args.wandb_project:
        return found
    if find_spec("wandb") is None:
        found.append("--wandb-project needs wandb, which is not installed; pip install wandb, or leave the flag out")
    if not args.wandb_exp_name:
        found.append("--wandb-project needs --wandb-exp-name")
    if not args.tensorboard_dir:
        found.append("--wandb-project needs --tensorboard-dir: Megatron writes to wandb what it writes to tensorboard")
    if not (args.wandb_save_dir or args.save):
        found.append("--wandb-project needs --wandb-save-dir or --save, where its files go")
    return found


def run_constants(
    shape: ModelShape,
    teacher: ModelShape | None,
    args: Namespace,
    *,
    teacher_runs_mtp: bool,
    recorded: float = 0.0,
    phase: Phase | None = None,
    place: Place | None = None,
    budgets: tuple[str, ...] = ("",),
) -> RunConstants:
    """What the figures of a run are relative to.

    Args:
        shape: the student's sizes.
        teacher: the teacher's, None without one in memory.
        args: Megatron's, validated.
        teacher_runs_mtp: the student's MTP heads are supervised by the teacher's.
        recorded: operations per token of a teacher that was recorded, those of its output layer.
        phase: of a progressive schedule.
        place: of that phase.
        budgets: their names.
    """
    kernels, device = kernels_of(args), torch.cuda.get_device_name()
    flops = {"student": step_flops(shape, args.seq_length, kernels, only=chosen(args)).total}
    student_recipe = args.fp8_recipe if args.fp8 else None
    teacher_fp8 = teacher_recipe(args.teacher_dtype, args.teacher_fp8_recipe, student_recipe)
    fp8 = {"student": bool(args.fp8), "teacher": teacher_fp8 is not None}
    if teacher is not None:
        flops["teacher"] = teacher_flops(teacher, args.seq_length, kernels, runs_mtp=teacher_runs_mtp).total
    elif recorded:
        flops["teacher"] = recorded
    if args.peak_tflops is not None:
        peaks = dict.fromkeys(flops, args.peak_tflops * 1e12)
    elif args.bf16 or args.fp16:
        known = {model: peak_flops(device, fp8=fp8[model]) for model in flops}
        peaks = {model: peak for model, peak in known.items() if peak is not None}
    else:
        peaks = {}  # in fp32 tensor cores are not used unless TF32 is asked for
    return RunConstants(
        ranks=args.world_size,
        pipeline=args.pipeline_model_parallel_size,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
        layers=shape.num_layers,
        seq_length=args.seq_length,
        iterations=(args.train_iters or 0) if place is None else place.stop,
        flops=flops,
        peaks=peaks,
        phase="" if phase is None else f"phase {phase.number} of {phase.count}{phase.name and f', {phase.name}'}",
        phase_tokens=None if phase is None else phase.tokens,
        start=0 if place is None else place.start,
        tokens_before=0 if place is None else place.tokens_before,
        budgets=budgets,
    )


def experts_of_layers(shape: ModelShape) -> list[int]:
    """Number of experts of every layer and MTP block, 0 of a dense one."""
    return [shape.expert_counts.get(block, 0) for block in shape.blocks]


def _training_seconds() -> float:
    """Seconds that this process has trained, without validation and saving: Megatron's own timer."""
    timer = get_timers()("interval-time")
    timer.elapsed(reset=False)  # brings active_time() up to date
    return float(timer.active_time())


@dataclass
class RunLog:
    """What one rank has measured since the last log.

    Attributes:
        shape: of the student.
        weights: gives those of the iteration.
        constants: of the run.
        experts_of_rows: number of experts of every layer, as they are counted; of a dense one 0.
        work: operations of the student in this iteration, relative to those of the constants.
    """

    shape: ModelShape
    weights: Callable[[], LossWeights]
    constants: RunConstants
    experts_of_rows: Sequence[int]
    work: Callable[[], float] = lambda: 1.0
    training_seconds: Callable[[], float] = _training_seconds
    wall: Callable[[], float] = time.monotonic
    clock: StageClock = field(default_factory=StageClock)
    experts: ExpertCounter = field(default_factory=ExpertCounter)
    losses: LossSums = field(default_factory=LossSums)
    _iterations: int = 0
    _samples: int = 0
    _work: float = 0.0
    _seconds: float = 0.0
    _started: float = field(init=False)
    _first: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        self._started = self.wall()

    def watch(self, chunk: DistillationModel) -> None:
        """Measure a stage of the model, its teacher attached."""
        self.clock.watch(chunk)
        self.experts.watch(chunk)

    def end_iteration(self) -> None:
        """Every rank calls it when the backward passes are done; logs where an interval or the training ends."""
        args, weights = get_args(), self.weights()
        iteration = args.curr_iteration + 1
        if not self.constants.iterations:  # of --train-samples, which Megatron has counted since
            self.constants = dataclasses.replace(self.constants, iterations=args.train_iters)
        self.clock.end_iteration()
        self.losses.end_iteration(weights_of_terms(weights, has_teacher="teacher" in self.constants.flops))
        batch = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
        self._iterations, self._samples = self._iterations + 1, self._samples + batch
        self._work += self.work()
        self._first = self._first or (iteration, self.wall())
        if iteration % args.log_interval == 0 or iteration == args.train_iters:
            interval = self._gather(weights)
            if args.rank == args.world_size - 1:  # where Megatron logs
                self._tell(interval, self._progress(iteration, args.consumed_train_samples + batch))
        else:
            self.experts.forget()

    def _progress(self, iteration: int, samples: int) -> Progress:
        assert self._first is not None
        first, at = self._first
        now = self.wall()
        mean = (now - at) / (iteration - first) if iteration > first else None
        return Progress(iteration, samples, now - self._started, mean)

    def _gather(self, weights: LossWeights) -> Interval:
        """One sum over all ranks of what each of them has, in slots of its own where it is not to be added up."""
        run, rank = self.constants, get_args().rank
        device = torch.cuda.current_device()
        of_rank = torch.zeros(run.ranks, 2 + run.chunks * len(KINDS), dtype=torch.float64)
        of_rank[rank, 0] = parallel_state.get_pipeline_model_parallel_rank()
        of_rank[rank, 1] = torch.cuda.max_memory_allocated()
        of_rank[rank, 2:] = self.clock.take(run.chunks).flatten()
        counts = self.experts.take(len(self.experts_of_rows), max(self.experts_of_rows))
        parts = [of_rank.to(device), self.losses.take(), counts]
        whole = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(whole)
        ranks, losses, tokens = (
            found.view(part.shape).numpy()
            for found, part in zip(whole.cpu().split([part.numel() for part in parts]), parts, strict=True)
        )
        for row, count in zip(tokens, self.experts_of_rows, strict=True):
            row[count:] = np.nan
        seconds = self.training_seconds()
        terms = terms_of(has_teacher="teacher" in run.flops, has_mtp=self.shape.mtp_num_layers > 0)
        interval = Interval(
            iterations=self._iterations,
            samples=self._samples,
            seconds=seconds - self._seconds,
            pipeline_rank=ranks[:, 0],
            peak_bytes=ranks[:, 1],
            computing=ranks[:, 2:].reshape(run.ranks, run.chunks, len(KINDS)),
            losses=losses,
            tokens_per_expert=tokens,
            weights={weight.key: weights[weight.key] for weight in weights_of(terms.values())},
            work=self._work / self._iterations,
        )
        self._iterations, self._samples, self._work, self._seconds = 0, 0, 0.0, seconds
        return interval

    def _tell(self, interval: Interval, done: Progress) -> None:
        found = figures(self.constants, interval, done)
        logger.info(line(self.constants, found, done))
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        for tag, value in found.items() if writer else ():
            writer.add_scalar(tag, value, done.iteration)
        if wandb:
            wandb.log(found, done.iteration)
