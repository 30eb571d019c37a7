"""Training with LM + KD + MTP-LM + MTP-KD losses, by Megatron's own loop (``megatron.training.pretrain``)."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args, parse_args
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_slim.architecture.context_parallel import local_positions
from megatron_slim.architecture.hf_config import shape_to_hf_config
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, shape_config_fields
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.expert_storage import write_storage
from megatron_slim.checkpoint.huggingface import config_and_carried, storage_of
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.precision import keep_types
from megatron_slim.checkpoint.records import PLAN
from megatron_slim.checkpoint.side_files import carry_files, log_left_behind
from megatron_slim.checkpoint.torch_dist_names import HF_DIR
from megatron_slim.compat import hooks
from megatron_slim.compat.cpu_memory import TRAINING, keep_freed_memory
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.loss_options import DEFAULTS
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine, gradients_of_total
from megatron_slim.distillation.model import TEACHER_MAIN, TEACHER_MTP, DistillationModel
from megatron_slim.distillation.terms import LOSS_TERMS, weights_of
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import new_directory, to_json, write_atomic
from megatron_slim.processes import leave_ranks
from megatron_slim.training.arguments import install_argv, load_balancing_note, shape_directory
from megatron_slim.training.carried import carried_optimizer
from megatron_slim.training.checks import check_run, open_student, open_teacher, start_of, starts_by_ourselves
from megatron_slim.training.data import Batch, build_datasets, next_batch
from megatron_slim.training.finite import FiniteWatch
from megatron_slim.training.hidden_kd import HiddenLog, check_stages, hidden_inputs
from megatron_slim.training.missing_libraries import library_note
from megatron_slim.training.progressive import find_place, is_done, phase_of
from megatron_slim.training.rates import default_warmup
from megatron_slim.training.resume_checks import SAME_LAYOUT, check_resume, why_not_restored
from megatron_slim.training.run_log import RunLog, run_constants
from megatron_slim.training.slim_arguments import MEGATRON_HELP, add_slim_arguments, now
from megatron_slim.training.stage_layout import plan_stages
from megatron_slim.training.teacher_ahead import TeacherAhead, check_host_memory, held_bytes
from megatron_slim.training.teacher_check import check_teacher
from megatron_slim.training.teacher_config import teacher_config

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """What the callbacks of Megatron's loop share."""

    shape: ModelShape
    teacher_shape: ModelShape | None
    mtp_kd_target: str
    log: RunLog
    start: Path | None = None  # where the student's weights come from, through Megatron unless `loads_start`
    loads_start: bool = False
    teacher_layout: str | None = None
    chunks: list[DistillationModel] = dataclasses.field(default_factory=list)
    watch: FiniteWatch = dataclasses.field(default_factory=FiniteWatch)
    hidden_log: HiddenLog = dataclasses.field(default_factory=partial(HiddenLog, ()))
    ahead: TeacherAhead | None = None

    def model_provider(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: Any = None,
    ) -> DistillationModel:
        """Build one pipeline stage of the student and, co-located, its teacher with weights loaded."""
        args = get_args()
        base = config or core_transformer_config_from_args(args)
        stage: dict[str, Any] = {
            "pre_process": pre_process,
            "post_process": post_process,
            "vp_stage": vp_stage,
            "pg_collection": pg_collection,
            "max_sequence_length": args.max_position_embeddings,
        }
        student = build_model(
            self.shape,
            dataclasses.replace(base, **(shape_config_fields(self.shape) | load_balancing_fields(base))),
            padded_vocab_size=padded_vocab_size(self.shape, args.make_vocab_size_divisible_by),
            model_class=DistillationModel,
            **stage,
        )
        assert isinstance(student, DistillationModel)
        student.unpadded_vocab_size = self.shape.vocab_size
        student.kd_loss = KDLoss(args.kd_loss, args.kd_temperature, args.kd_top_k or DEFAULTS.kd_top_k)
        student.loss_chunk = args.loss_chunk_size
        if self.teacher_shape is not None:
            student.attach_teacher(self._build_teacher(base, stage), self.mtp_kd_target, ahead=self.ahead is not None)
            student.attach_hidden_distillation(self.hidden_log.pairs, args.hidden_kd_loss, args.seed)
        student.config.finalize_model_grads_func = self.finalize_grads
        self.chunks.append(student)
        if len(self.chunks) == (args.virtual_pipeline_model_parallel_size or 1):
            self._finish_chunks()
        return student

    def finalize_grads(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's ``finalize_model_grads_func``: the end of an iteration but for the optimizer's step."""
        self.hidden_log.finish(self.chunks, self.watch)
        self.watch.finalize_grads(*args, **kwargs)
        self.log.end_iteration()

    def _finish_chunks(self) -> None:
        """All chunks are built: fill the teacher, and the student where Megatron does not; watch what they do."""
        for chunk in self.chunks:
            self.log.watch(chunk)
        if self.teacher_shape is not None:
            teachers = [chunk.teacher for chunk in self.chunks if chunk.teacher is not None]
            checkpoint = open_teacher(get_args())
            keep_types(teachers, checkpoint)
            load_hf_weights(teachers, checkpoint)
            for chunk in self.chunks if get_args().teacher_offload else ():
                chunk.offload_teacher()
        if self.start is not None:
            checkpoint = open_student(self.start, get_args())
            keep_types(self.chunks, checkpoint)
            if self.loads_start:
                load_hf_weights(self.chunks, checkpoint)

    def _build_teacher(self, base: TransformerConfig, stage: dict[str, Any]) -> HiddenStatesModel:
        assert self.teacher_shape is not None
        args = get_args()
        dtype, recipe = args.teacher_dtype, args.teacher_fp8_recipe
        teacher = build_model(
            self.teacher_shape,
            teacher_config(self.teacher_shape, base, layout=self.teacher_layout, dtype=dtype, fp8_recipe=recipe),
            # The student's rows: then a rank has the same columns of both vocabularies.
            padded_vocab_size=padded_vocab_size(self.shape, args.make_vocab_size_divisible_by),
            model_class=HiddenStatesModel,
            **stage,
        )
        assert isinstance(teacher, HiddenStatesModel)
        # Megatron moves the student to its device later; some parameters are made on the host.
        return teacher.to(device=torch.cuda.current_device(), dtype=teacher.config.params_dtype)

    def datasets_provider(self, num_samples: tuple[int, Any, Any], vp_stage: int | None = None) -> list[Any]:
        """Build the datasets; before the first step, see that the teacher knows something of them."""
        datasets = build_datasets(num_samples)
        if self.ahead is not None:
            self.ahead.datasets.append(datasets[0])
        last_chunk = vp_stage is None or vp_stage == len(self.chunks) - 1
        if self.teacher_shape is not None and not get_args().no_teacher_check and last_chunk:
            check_teacher(self.chunks, self.batch, datasets[0], self.shape.vocab_size)
        return datasets

    def batch(self, iterator: Iterator[Any], vp_stage: int | None) -> Batch:
        """What this stage needs of the next micro-batch: MTP blocks need tokens, hidden-state losses the loss mask."""
        has_mtp = bool(self.shape.mtp_num_layers or (self.teacher_shape and self.teacher_shape.mtp_num_layers))
        chunk = self.chunks[vp_stage or 0]
        whole = (chunk.post_process and has_mtp) or chunk.hidden_kd is not None
        args, refuse = get_args(), self.watch.refuse
        size = args.micro_batch_size if chunk.training else args.eval_micro_batch_size
        vocab_size = self.shape.vocab_size
        return next_batch(iterator, vocab_size, vp_stage, micro_batch_size=size, whole=whole, refuse=refuse)

    def forward_step(self, iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        """One micro-batch through one stage, and the function that reduces its losses on the last one."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = self.batch(iterator, vp_stage)
        timers("batch-generator").stop()
        loss_mask, position_ids = batch["loss_mask"], batch["position_ids"]
        last = get_attr_wrapped_model(model, "post_process")
        weights, expected = _loss_weights(), None
        if last and torch.is_grad_enabled():
            expected = self.expected_gradients(loss_mask, weights, position_ids)
        targets: dict[str, Any] = {
            "expected": expected,
            "hidden_inputs": hidden_inputs(self.chunks[vp_stage or 0], loss_mask),
        }
        if last and model.training and self.ahead is not None:
            assert batch["labels"] is not None
            targets["teacher_hidden"] = self.ahead.take(batch["labels"])
        with self.log.clock.forward(vp_stage):
            output = model(batch["tokens"], position_ids, None, batch["labels"], **targets)
        self.log.clock.watch_backward(output, vp_stage)
        label = "" if model.training else "validation "
        if not last:
            for name, states in get_attr_wrapped_model(model, "states_between_stages")(output).items():
                self.watch.add_states(f"{label}{name}", vp_stage, states)
        return output, partial(self.reduce_losses, loss_mask, weights, position_ids, vp_stage, label)

    def reduce_losses(
        self,
        loss_mask: Tensor | None,
        weights: LossWeights,
        position_ids: Tensor | None,
        vp_stage: int | None,
        label: str,
        output: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum of the terms with this iteration's weights, in the form that Megatron's loop expects."""
        assert loss_mask is not None
        losses = TokenLosses.unstack(output, has_teacher=self.teacher_shape is not None)
        total, tokens, report = combine(losses, loss_mask, weights, position_ids, _local_positions(loss_mask))
        for name, (value, _) in report.items():
            self.watch.add("loss", f"{label}{name}", vp_stage, value)
        logged = {name: torch.stack(pair) for name, pair in report.items()}
        if label:  # after which Megatron reports a perplexity of everything
            logged = {term.name: logged[term.name] for term in LOSS_TERMS.values() if term.name in logged}
        else:
            self.log.losses.add(logged)
        if self.hidden_log.pairs and not label:
            logged |= self.hidden_log.report(tokens)
        return total, tokens.to(torch.int), logged

    def expected_gradients(
        self, loss_mask: Tensor | None, weights: LossWeights, position_ids: Tensor | None
    ) -> TokenLosses:
        """What Megatron's schedules will bring each term that `reduce_losses` is given.

        That of its sum times the loss scale: with ``--calculate-per-token-loss``, which is always on, they divide by
        the number of tokens when all micro-batches are done.
        """
        assert loss_mask is not None
        depths, has_teacher = self.shape.mtp_num_layers, self.teacher_shape is not None
        positions = _local_positions(loss_mask)
        gradients = gradients_of_total(
            loss_mask, weights, depths, position_ids, positions, has_teacher=has_teacher
        ).stack()
        # The schedules read the first chunk's config, and Megatron's loop writes there.
        if (scale := self.chunks[0].config.grad_scale_func) is not None:
            gradients = scale(gradients)
        return TokenLosses.unstack(gradients, has_teacher=has_teacher)


def _local_positions(whole: Tensor) -> Tensor | None:
    """Positions of this rank's part of a sequence [..., S] under context parallelism; None for all."""
    return local_positions(parallel_state.get_context_parallel_group(), whole.shape[-1])


def _loss_weights() -> LossWeights:
    """Lambda, beta and those of further terms in this iteration."""
    args = get_args()
    return {weight.key: now(weight, args) for weight in weights_of(LOSS_TERMS.values())}


def load_balancing_fields(config: TransformerConfig) -> dict[str, Any]:
    """The load-balancing coefficient that makes the global-batch loss independent of the number of ranks.

    Every data-parallel rank's ``global_aux_loss`` is its tokens' share of the loss over all ranks, so the shares must
    be summed; but gradients are averaged over ranks, which alone would weaken the loss by the data-parallel size.
    """
    kinds = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    ranks = parallel_state.get_data_parallel_world_size()
    if isinstance(kinds, list):
        pairs = zip(kinds, coefficients, strict=True)
        return {"moe_aux_loss_coeff": [c * ranks if kind == "global_aux_loss" else c for kind, c in pairs]}
    return {"moe_aux_loss_coeff": coefficients * ranks if kinds == "global_aux_loss" else coefficients}


def _mtp_kd_target(shape: ModelShape, teacher: ModelShape | None, args: Any) -> str:
    enough = teacher is None or teacher.mtp_num_layers >= shape.mtp_num_layers
    return args.mtp_kd_target or (TEACHER_MTP if enough else TEACHER_MAIN)


def _start(args: Any) -> dict[str, Any]:
    """Fields of `Run` on where the student's weights come from; if not through Megatron, it does not look there."""
    fields = {"start": start_of(args), "loads_start": starts_by_ourselves(args)}
    if fields["loads_start"]:
        args.pretrained_checkpoint, args.exit_on_missing_checkpoint = None, False
    return fields


def keep_plan(source: Path, directory: Path) -> None:
    """Copy the plan that gave a student, by which a later pruning knows it; of torch_dist it is next to ``hf/``."""
    places = (source, source.parent) if source.name == HF_DIR else (source,)
    if (file := next((place / PLAN for place in places if (place / PLAN).is_file()), None)) is not None:
        shutil.copyfile(file, directory / PLAN)


def keep_hf_files(source: Path, save: Path, shape: ModelShape) -> None:
    """Put config.json, the tokenizer and the like next to the checkpoints of this run, so that they can be exported.

    How files hold the experts is among it, and what a larger model has but for its language model.
    """
    if (save / HF_DIR).is_dir():
        return
    save.mkdir(parents=True, exist_ok=True)
    with new_directory(save / HF_DIR) as directory:
        without_mtp = not shape.mtp_num_layers
        config, carried = config_and_carried(source, without_mtp=without_mtp)
        write_atomic(directory / "config.json", to_json(shape_to_hf_config(shape, config)))
        carried.save(directory, verify=True)
        carry_files(source, directory)
        keep_plan(source, directory)
        write_storage(directory, storage_of(source, without_mtp=without_mtp))
    log_left_behind(source)


class _PlainHelp(argparse.HelpFormatter):
    """Megatron's help texts hold bare percent signs, at which argparse's own expansion fails."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""


def _validated_arguments() -> Any:
    """Megatron's arguments after its own validation, which asserts."""
    try:
        args = parse_and_validate_args(add_slim_arguments)
        core_transformer_config_from_args(args)  # validates more, and would do so after all else was set up
        return args
    except (AssertionError, ValueError) as error:
        what = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise SlimError(f"Megatron refuses the arguments: {what}") from None


def _train(run: Run, args: Any) -> None:
    """Megatron's loop, and what it raises where a run cannot resume from a checkpoint as one line.

    Raises:
        SlimError: all ranks raise it together.
    """
    provider = partial(run.datasets_provider)
    provider.is_distributed = True  # type: ignore[attr-defined]
    try:
        pretrain(
            pretrain_cfg_container_from_args(args),
            provider,
            ModelType.encoder_or_decoder,
            run.forward_step,
            model_provider=run.model_provider,
        )
        run.watch.check()  # of the last validation
    except SystemExit as exit_:  # how Megatron ends at --exit-interval, and on a signal
        if not exit_.code and torch.distributed.is_initialized():
            run.watch.check()
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


def main(argv: list[str]) -> None:
    """Train from the command line; see ``examples/slimqwen/pretrain_distill.sh``."""
    if MEGATRON_HELP in argv:
        parser = argparse.ArgumentParser(prog="pretrain.py", formatter_class=_PlainHelp, allow_abbrev=False)
        add_slim_arguments(add_megatron_arguments(parser)).print_help()
        return
    source = shape_directory(argv)
    shape = install_argv(argv)
    parsed = parse_args(add_slim_arguments)
    phase = phase_of(parsed.pretrained_checkpoint)
    place = find_place(phase, parsed)
    sys.argv[1:] = [*default_warmup(parsed, argv), *sys.argv[1:]]
    teacher = check_run(shape, parsed)
    if place is not None:
        if is_done(place, parsed.load, parsed.ckpt_step) and not parsed.skip_train:
            if parsed.rank == 0:
                logger.info(f"{parsed.load}: this phase is done, at iteration {place.stop}")
            return
        sys.argv[1:] = place.command_line(sys.argv[1:])
    if parsed.rank == 0 and (note := library_note()) is not None:
        logger.info(note)
    balancing = load_balancing_note(shape, argv, parsed.moe_router_load_balancing_type)
    if parsed.rank == 0 and balancing is not None:
        logger.info(balancing)
    keep_freed_memory(TRAINING)
    hooks.TRAINING_LOG.apply()
    carried = carried_optimizer(parsed)
    hooks.keep_schedule_with_iterations(0 if place is None else place.start, carried.load if carried else None)
    if place is not None and parsed.stage_warmup:
        hooks.scale_learning_rate(place.warmup(parsed.stage_warmup))
    target = _mtp_kd_target(shape, teacher, parsed)
    runs_mtp = target == TEACHER_MTP and shape.mtp_num_layers > 0
    layout = plan_stages(shape, teacher, parsed, teacher_runs_mtp=runs_mtp)
    if parsed.rank == 0 and parsed.pipeline_model_parallel_size > 1:
        logger.info(layout.table())
    sys.argv[1:] = layout.command_line(sys.argv[1:])
    check_stages(parsed.hidden_kd_layers, layout.stages)
    args = _validated_arguments()
    check_resume(args)
    if args.check_arguments:
        return
    constants = run_constants(shape, teacher, args, teacher_runs_mtp=runs_mtp, phase=phase, place=place)
    log = RunLog(shape, _loss_weights, constants)
    hidden_log = HiddenLog(args.hidden_kd_layers)
    run = Run(shape, teacher, target, log, teacher_layout=layout.teacher, hidden_log=hidden_log, **_start(args))
    if teacher is not None and args.teacher_ahead:
        check_host_memory(held_bytes(teacher, args, teacher.mtp_num_layers if runs_mtp else 0), args)
        run.ahead = TeacherAhead(run.chunks, run.batch, run.watch, log.clock.teacher_alone)
        hooks.before_training_steps(run.ahead.before_step)
    if args.save and args.rank == 0:
        keep_hf_files(source, Path(args.save), shape)
    _train(run, args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_from_command_line() -> None:
    """`main`, with a `SlimError` as one line on stderr and exit code 2, on all ranks."""
    try:
        main(sys.argv[1:])
    except SlimError as error:
        leave_ranks(error)
