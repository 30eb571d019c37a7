"""What can be wrong with a training run, found before Megatron builds anything."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from pathlib import Path

import megatron_slim.mcore

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from megatron_slim.architecture.parallelism import layout_violations, padded_vocab_size
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.integrity import read_manifest
from megatron_slim.checkpoint.iterations import is_torch_dist, iteration_directory
from megatron_slim.checkpoint.records import ELASTIC
from megatron_slim.checkpoint.tracker import repair_tracker
from megatron_slim.distillation.options import TEACHER_MTP
from megatron_slim.errors import CheckpointError, SlimError
from megatron_slim.files import check_writable
from megatron_slim.training.cache_checks import cache_violations, check_caches
from megatron_slim.training.carried import carry_violations
from megatron_slim.training.chat_data import make_sample_sets
from megatron_slim.training.data_checks import check_data
from megatron_slim.training.document_checks import document_violations
from megatron_slim.training.elastic import check_kept_budgets, depth_violations, elastic_violations
from megatron_slim.training.fp8_checks import fp8_violations
from megatron_slim.training.hidden_kd import check_projections, check_stages, hidden_violations
from megatron_slim.training.kept_files import check_place
from megatron_slim.training.loss_checks import loss_violations
from megatron_slim.training.missing_libraries import library_violations
from megatron_slim.training.optimizer_flags import optimizer_violations
from megatron_slim.training.rates import rate_violations
from megatron_slim.training.run_log import logging_violations
from megatron_slim.training.spec import RunSpec
from megatron_slim.training.stage_layout import layer_violations, stage_violations
from megatron_slim.training.start_checks import check_mtp, check_rows, say_remarks
from megatron_slim.training.teacher_ahead import ahead_violations
from megatron_slim.training.train_only import train_only_violations


def check(spec: RunSpec) -> None:
    """Check what Megatron cannot know, or says with a traceback: models, layout, checkpoints and data.

    Raises:
        SlimError: lists every violation of the part that fails first.
    """
    args, shape = spec.args, spec.student
    found = _violations(shape, spec.teacher, args) + optimizer_violations(args, spec.given, shape)
    found += train_only_violations(shape, args, spec.given) + ([] if spec.resumes else carry_violations(args))
    found = cache_violations(shape, spec.cache, args) or found
    if found := found or _budget_violations(spec):
        raise SlimError("; ".join(found))
    if not args.train_iters and not args.train_samples:
        raise SlimError("nothing to train", fix="give --train-iters or --train-samples")
    if args.save is not None:
        check_writable(Path(args.save))
        check_place(Path(args.save))
        check_kept_budgets(Path(args.save), spec.elastic)
    start = _check_start(spec)
    if not args.check_arguments:
        make_sample_sets(args)
    check_data(args, shape.vocab_size)
    check_caches(args, spec.cache)
    if args.verify_integrity:
        _check_integrity(spec)
    if "MASTER_ADDR" not in os.environ:
        raise SlimError("not started by torchrun", fix="use megatron-slim distill, or torchrun")
    if args.rank == 0:
        say_remarks(shape, start, spec.checkpoint, args)
    check_stages(args.hidden_kd_layers, spec.stages.stages)


def _violations(shape: ModelShape, teacher: ModelShape | None, args: Namespace) -> list[str]:
    """What is wrong with the flags and both models, in sentences."""
    small = [f"{name} parallel size {size} is not positive" for name, size in _sizes(args).items() if size < 1]
    for name in ("eval_interval", "make_vocab_size_divisible_by"):
        if getattr(args, name) < 1:
            small.append(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    found = small or _process_violations(args) + stage_violations(args) + _model_violations("student", shape, args)
    found += loss_violations(shape, args) + ahead_violations(args) + logging_violations(args) + rate_violations(args)
    found += elastic_violations(args) + ([] if small else document_violations(shape, args))
    found += hidden_violations(shape, teacher, args) + ([] if small else fp8_violations(shape, teacher, args))
    if teacher is not None and not small:
        found += _model_violations("teacher", teacher, args) + _pair_violations(shape, teacher, args)
    return found


def _budget_violations(spec: RunSpec) -> list[str]:
    """What keeps the budgets of an elastic student from being trained on this layout, in sentences."""
    found = []
    for budget in () if spec.elastic is None else spec.elastic.budgets:
        of_budget = layout_violations(budget.plan.target_shape, **_sizes(spec.args) | {"pp": 1})
        found += [f"budget {budget.name}: {sentence}" for sentence in of_budget]
    if spec.elastic is not None and spec.elastic.budgets[0].plan.source_shape != spec.student:
        found.append(f"the student's {ELASTIC} is of a model of other sizes; prune anew, or leave --elastic out")
    return found or ([] if spec.elastic is None else depth_violations(spec.elastic, spec.stages))


def _check_start(spec: RunSpec) -> Checkpoint | None:
    """See that the weights to start from are whole and the student's; gives them, None where they are random."""
    shape, args = spec.student, spec.args
    for directory in sorted({path for path in (args.load, args.save) if path is not None}):
        repair_tracker(Path(directory), rank=args.rank)
    start = spec.start
    if start is None:
        if args.load is not None and args.exit_on_missing_checkpoint:  # Megatron would exit with status 0
            raise CheckpointError("holds no checkpoint", where=args.load, fix="check --load")
        return None
    checkpoint = spec.open_student(start)
    if spec.resumes:
        check_projections(checkpoint, args)
        check_mtp(checkpoint)
    found = checkpoint.shape
    differing = [
        f"{name} {size}, not {shape.sizes[name]}" for name, size in found.sizes.items() if size != shape.sizes[name]
    ]
    for name in ("model_type", "layer_types", "num_dense_layers", "experts_per_layer", "mtp_num_layers"):
        if getattr(found, name) != getattr(shape, name):
            differing.append(f"other {name}")
    if differing:
        raise SlimError(
            "not of the student's shape: " + "; ".join(differing), where=str(start), fix="check --hf-config"
        )
    if spec.resumes:
        check_rows(checkpoint, args)
    return checkpoint


def _check_integrity(spec: RunSpec) -> None:
    """See that --verify-integrity verifies all: Megatron what it loads itself, and we, on one rank, what we do."""
    start = spec.start
    for path in filter(None, (start, spec.args.teacher_load)):
        if not is_torch_dist(path):
            continue
        read_manifest(iteration_directory(path))
        if spec.args.rank != 0 or (path == start and not spec.starts_by_ourselves):
            continue
        try:
            verify_integrity_manifest(str(iteration_directory(path)))
        except CheckpointingException as error:
            raise CheckpointError(str(error)) from None


def _sizes(args: Namespace) -> dict[str, int]:
    """Parallel sizes under the names of `layout_violations`."""
    tp = args.tensor_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    sizes = {"tp": tp, "pp": args.pipeline_model_parallel_size, "ep": args.expert_model_parallel_size, "etp": etp}
    return sizes | {"cp": args.context_parallel_size}


def _process_violations(args: Namespace) -> list[str]:
    sizes = _sizes(args)
    found = library_violations(args)
    for names in (("tp", "cp", "pp") if sizes["cp"] > 1 else ("tp", "pp"), ("etp", "ep", "pp")):
        ranks = 1
        for name in names:
            ranks *= sizes[name]
        if args.world_size % ranks:
            product = " x ".join(f"{name} {sizes[name]}" for name in names)
            found.append(f"{args.world_size} processes do not divide into groups of {product}")
    if args.sequence_parallel and args.seq_length is not None and args.seq_length % sizes["tp"]:
        found.append(f"--seq-length {args.seq_length} does not divide by tensor parallel size {sizes['tp']}")
    return found + _context_violations(args, sizes["tp"], sizes["cp"]) + _expert_violations(args, sizes)


def _context_violations(args: Namespace, tp: int, cp: int) -> list[str]:
    """What is wrong with context parallelism, whose ranks have two chunks of a sequence each."""
    found = []
    parts = cp * math.lcm(2, tp if args.sequence_parallel else 1)
    if cp > 1 and args.seq_length is not None and args.seq_length % parts:
        found.append(f"--seq-length {args.seq_length} does not divide by {parts} (context parallel size {cp})")
    if args.hybrid_context_parallel:
        found.append("--hybrid-context-parallel is not supported: samples are whole sequences of one length")
    if isinstance(args.cp_comm_type, list) and len(args.cp_comm_type) > 1 and args.teacher_load is not None:
        found.append("--cp-comm-type by layer does not say what the teacher's layers use; give one for all")
    return found


def _expert_violations(args: Namespace, sizes: dict[str, int]) -> list[str]:
    """What Megatron's MoE layers, or gloo, cannot do."""
    found = []
    if sizes["tp"] > 1 and not args.sequence_parallel:
        found.append("tensor parallelism of MoE layers needs --sequence-parallel in training")
    if sizes["etp"] > 1 and sizes["ep"] > 1 and args.distributed_backend == "gloo":
        found.append(
            f"expert tensor parallel size {sizes['etp']} with expert parallel size {sizes['ep']} gathers unequal "
            "numbers of tokens, which gloo cannot; give --expert-tensor-parallel-size 1"
        )
    return found


def _model_violations(name: str, shape: ModelShape, args: Namespace) -> list[str]:
    found = layer_violations(name, shape, args) + layout_violations(shape, **_sizes(args) | {"pp": 1})
    rows, tp = padded_vocab_size(shape, args.make_vocab_size_divisible_by), args.tensor_model_parallel_size
    if rows % tp:
        found.append(f"{rows} rows of the padded vocabulary do not divide by tensor parallel size {tp}")
    if args.seq_length is not None and args.seq_length > shape.max_position_embeddings:
        found.append(f"--seq-length {args.seq_length} is above max_position_embeddings {shape.max_position_embeddings}")
    return [f"{name}: {sentence}" for sentence in found]


def _pair_violations(shape: ModelShape, teacher: ModelShape, args: Namespace) -> list[str]:
    found = []
    if teacher.vocab_size != shape.vocab_size:
        found.append(f"teacher: vocabulary {teacher.vocab_size}, the student has {shape.vocab_size}")
    if args.mtp_kd_target == TEACHER_MTP and teacher.mtp_num_layers < shape.mtp_num_layers:
        heads = f"{teacher.mtp_num_layers or 'no'} MTP head"
        found.append(f"teacher: {heads} for --mtp-kd-target teacher-mtp; use teacher-main")
    if args.tp_comm_overlap:
        found.append("--tp-comm-overlap has buffers of the student's size alone; leave it out with a teacher")
    narrow = args.teacher_dtype in ("bf16", "fp16", "fp8") and not (args.bf16 or args.fp16)
    if narrow and teacher.hidden_size % 2 and args.pipeline_model_parallel_size > 1:
        found.append(
            f"teacher: hidden_size {teacher.hidden_size} in 16 bits does not fill numbers of 32 between stages"
        )
    return found
