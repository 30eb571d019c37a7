"""Training with LM + KD + MTP-LM + MTP-KD losses, by Megatron's own loop (``megatron.training.pretrain``)."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import megatron_slim.mcore

import torch
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from torch.distributed.checkpoint.api import CheckpointException

from megatron_slim.compat import hooks
from megatron_slim.compat.cpu_memory import TRAINING, keep_freed_memory
from megatron_slim.compat.saving import RESULTS_OF_WRITING
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.errors import CheckpointError
from megatron_slim.processes import leaving_together
from megatron_slim.training.arguments import print_help, validated
from megatron_slim.training.build import build_stage, load_weights, select_parameters
from megatron_slim.training.cached_data import states_entry
from megatron_slim.training.carried import CarriedOptimizer, carried_optimizer
from megatron_slim.training.checks import check
from megatron_slim.training.data import build_datasets
from megatron_slim.training.elastic import Numbers, flops_of_budgets
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.hidden_kd import HiddenLog
from megatron_slim.training.kept_files import keep_hf_files
from megatron_slim.training.matrix_entry import register
from megatron_slim.training.resume_checks import SAME_LAYOUT, check_resume, why_not_restored
from megatron_slim.training.run_log import RunLog, experts_of_layers, run_constants
from megatron_slim.training.slim_arguments import MEGATRON_HELP
from megatron_slim.training.spec import RunSpec, resolve
from megatron_slim.training.start_checks import say_notes
from megatron_slim.training.steps import Batches, Steps, loss_weights
from megatron_slim.training.teacher_ahead import TeacherAhead, check_host_memory, held_bytes
from megatron_slim.training.teacher_check import check_teacher
from megatron_slim.training.turns import Turns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What Megatron's loop asks for before its first step: models and data.

    Attributes:
        spec: of the run.
        steps: what it calls then.
    """

    spec: RunSpec
    steps: Steps

    @staticmethod
    def of(spec: RunSpec, args: Namespace) -> Run:
        """The parts of a run, which share the list of this rank's stages; it is filled when they are built.

        Args:
            spec: of the run.
            args: Megatron's, validated.

        Raises:
            SlimError: this machine has no memory for a teacher that computes ahead.
        """
        chunks: list[DistillationModel] = []
        watch, runs_mtp = FiniteWatch(), spec.teacher_runs_mtp
        names = {} if spec.elastic is None else {"budgets": spec.elastic.names}
        constants = run_constants(
            spec.student,
            spec.teacher,
            args,
            teacher_runs_mtp=runs_mtp,
            recorded=0.0 if spec.cache is None else spec.recorded_heads * spec.cache.head_flops,
            phase=spec.phase,
            place=spec.place,
            **names,
        )
        log, turns = RunLog(spec.student, loss_weights, constants, experts_of_layers(spec.student)), None
        if spec.elastic is not None:
            turns = Turns(spec.elastic, chunks, flops_of_budgets(spec.elastic, args))
            log.experts_of_rows, log.work = Numbers(spec.elastic).experts(), turns.work
        batches, ahead = Batches(spec, chunks, watch, states_entry(spec)), None
        if spec.teacher is not None and spec.options.teacher_ahead:
            depths = spec.teacher.mtp_num_layers if runs_mtp else 0
            check_host_memory(held_bytes(spec.teacher, args, depths), args)
            ahead = TeacherAhead(chunks, batches.take, watch, log.clock.teacher_alone)
        return Run(spec, Steps(spec, chunks, batches, watch, log, HiddenLog(args.hidden_kd_layers), ahead, turns))

    def model_provider(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> DistillationModel:
        """Build one pipeline stage of the student and, co-located, its teacher; with the last of them, load weights."""
        args, steps = get_args(), self.steps
        student = build_stage(
            self.spec,
            config or core_transformer_config_from_args(args),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            timed_losses=steps.log.clock.losses,
        )
        student.config.finalize_model_grads_func = steps.finalize_grads
        steps.chunks.append(student)
        if len(steps.chunks) == (args.virtual_pipeline_model_parallel_size or 1):
            for chunk in steps.chunks:
                steps.log.watch(chunk)
            select_parameters(self.spec, steps.chunks)
            load_weights(self.spec, steps.chunks)
        return student

    def datasets_provider(
        self, num_samples: tuple[int, int | None, int | None], vp_stage: int | None = None
    ) -> list[MegatronDataset]:
        """Build the datasets; before the first step, see that the teacher knows something of them."""
        steps, spec = self.steps, self.spec
        needs_states = spec.cache is not None and steps.chunks[vp_stage or 0].post_process
        datasets = build_datasets(num_samples, spec.cache, spec.recorded_heads if needs_states else 0)
        if steps.ahead is not None:
            steps.ahead.datasets.append(datasets[0])
        last_chunk = vp_stage is None or vp_stage == len(steps.chunks) - 1
        if self.spec.has_teacher and not get_args().no_teacher_check and last_chunk:
            check_teacher(steps.chunks, steps.batches.take, datasets[0], self.spec.student.vocab_size)
        return datasets


def _change_the_loop(spec: RunSpec, carried: CarriedOptimizer | None, steps: Steps) -> None:
    """What this run needs of Megatron's loop in places where it calls nobody."""
    place = spec.place
    hooks.TRAINING_LOG.apply()
    RESULTS_OF_WRITING.apply()
    hooks.keep_schedule_with_iterations(0 if place is None else place.start, carried.load if carried else None)
    if place is not None and spec.args.stage_warmup:
        hooks.scale_learning_rate(place.warmup(spec.args.stage_warmup))
    around = steps.ahead or steps.turns  # the one does not go with the other
    if around is not None:
        hooks.around_schedules(around.around)


def _run_the_loop(run: Run, args: Namespace) -> None:
    """Megatron's loop, and what it raises where a run cannot resume from a checkpoint as one line.

    Raises:
        SlimError: all ranks raise it together.
    """
    provider = partial(run.datasets_provider)
    provider.is_distributed = True  # type: ignore[attr-defined]
    watch = run.steps.watch
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            provider,
            ModelType.encoder_or_decoder,
            run.steps.forward_step,
            model_provider=run.model_provider,
        )
        watch.check()  # of the last validation
    except SystemExit as exit_:  # how Megatron ends at --exit-interval, and on a signal
        if not exit_.code and torch.distributed.is_initialized():
            watch.check()
        raise
    except CheckpointingException as error:  # all ranks raise it together
        raise CheckpointError(f"refused by Megatron: {error}") from None
    except CheckpointException as error:  # as above, out of the ranks' common plan to read
        reasons = [reason for reason, _ in error.failures.values()]
        if not all(isinstance(reason, CheckpointingException) for reason in reasons):
            raise
        raise CheckpointError(f"refused by Megatron: {reasons[0]}", fix=SAME_LAYOUT) from None
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        # Likewise, if it is about restoring the optimizer.
        if (reason := why_not_restored(error)) is None:
            raise
        raise reason from None


def train(spec: RunSpec, args: Namespace, carried: CarriedOptimizer | None) -> None:
    """Train.

    Args:
        spec: of the run, checked.
        args: Megatron's, validated.
        carried: the state of an optimizer that it begins with; None for a new one.

    Raises:
        SlimError: all ranks raise it together.
    """
    keep_freed_memory(TRAINING)
    if spec.starts_by_ourselves:  # then Megatron is not to look there
        args.pretrained_checkpoint, args.exit_on_missing_checkpoint = None, False
    run = Run.of(spec, args)
    register(args, spec.student)
    _change_the_loop(spec, carried, run.steps)
    if args.save and args.rank == 0:
        keep_hf_files(spec.source, Path(args.save), spec.student, spec.elastic.document if spec.elastic else None)
    _run_the_loop(run, args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str]) -> None:
    """Train from the command line; see ``examples/slimqwen/pretrain_distill.sh``."""
    if MEGATRON_HELP in argv:
        print_help()
        return
    spec = resolve(argv)
    check(spec)
    if spec.is_done:
        if spec.place is not None and spec.args.rank == 0:
            logger.info(f"{spec.args.load}: this phase is done, at iteration {spec.place.stop}")
        return
    say_notes(spec)
    carried = carried_optimizer(spec)
    args = validated(spec.megatron_argv)
    check_resume(args)
    if not args.check_arguments:
        train(spec, args, carried)


def run_ranks(argv: Sequence[str]) -> None:
    """`main`, with an error that a user can fix as one line on stderr and exit code 2, on all ranks."""
    with leaving_together():
        main(argv)
