"""The models of one pipeline stage: built, for training and for planning alike, and filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, shape_config_fields
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.precision import keep_types
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.training.spec import RunSpec
from megatron_slim.training.teacher_config import teacher_config


def build_stage(
    spec: RunSpec,
    config: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
    timed_losses: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> DistillationModel:
    """Build the part of the student, and of its teacher, that belongs to this rank and virtual pipeline stage.

    Args:
        spec: of the run.
        config: of Megatron's validated arguments.
        pre_process: this stage holds the embedding.
        post_process: this stage holds the output layer.
        vp_stage: virtual pipeline stage, None without interleaving.
        pg_collection: process groups; None, those of Megatron's parallel state.
        timed_losses: is entered around output layers and losses.

    Returns:
        The student, its teacher co-located; weights are random, and the teacher's undefined.
    """
    stage: dict[str, Any] = {
        "pre_process": pre_process,
        "post_process": post_process,
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
        "max_sequence_length": spec.student.max_position_embeddings,
        # The same of both models: then a rank has the same columns of both vocabularies.
        "padded_vocab_size": padded_vocab_size(spec.student, spec.args.make_vocab_size_divisible_by),
    }
    student = build_model(
        spec.student,
        dataclasses.replace(config, **(shape_config_fields(spec.student) | load_balancing_fields(config))),
        model_class=DistillationModel,
        options=spec.options,
        teacher=_build_teacher(spec, config, stage),
        timed_losses=timed_losses,
        **stage,
    )
    assert isinstance(student, DistillationModel)
    return student


def _build_teacher(spec: RunSpec, config: TransformerConfig, stage: dict[str, Any]) -> HiddenStatesModel | None:
    if spec.teacher is None:
        return None
    layout, dtype, recipe = spec.stages.teacher, spec.args.teacher_dtype, spec.args.teacher_fp8_recipe
    # A student's random weights are the same with a teacher as without one.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        teacher = build_model(
            spec.teacher,
            teacher_config(spec.teacher, config, layout=layout, dtype=dtype, fp8_recipe=recipe),
            model_class=HiddenStatesModel,
            **stage,
        )
    assert isinstance(teacher, HiddenStatesModel)
    # Megatron moves the student to its device later; some parameters are made on the host.
    return teacher.to(device=torch.cuda.current_device(), dtype=teacher.config.params_dtype)


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


def load_weights(spec: RunSpec, chunks: Sequence[DistillationModel]) -> None:
    """Fill the teacher, and the student where Megatron does not.

    Args:
        spec: of the run.
        chunks: all virtual pipeline stages of this rank.
    """
    if spec.checkpoint is not None:
        teachers = [chunk.teacher for chunk in chunks if chunk.teacher is not None]
        keep_types(teachers, spec.checkpoint)
        load_hf_weights(teachers, spec.checkpoint)
        for chunk in chunks if spec.args.teacher_offload else ():
            chunk.offload_teacher()
    if (start := spec.start) is not None:
        checkpoint = spec.open_student(start)
        keep_types(chunks, checkpoint)
        if spec.starts_by_ourselves:
            load_hf_weights(chunks, checkpoint)
