"""The models of one pipeline stage: built, for training and for planning alike, and filled."""

from __future__ import annotations

import copy
import dataclasses
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import megatron_slim.mcore

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, shape_config_fields
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.table import weights
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.precision import keep_types
from megatron_slim.distillation.elastic import ElasticModel
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.recorded import RecordedTeacher, StoredStates
from megatron_slim.distillation.selected import SelectedParameters
from megatron_slim.teacher_cache.cache import TeacherCache
from megatron_slim.training.elastic import ElasticRun, Numbers, layout_of
from megatron_slim.training.frozen import freeze
from megatron_slim.training.spec import RunSpec
from megatron_slim.training.teacher_config import DTYPES, teacher_config

logger = logging.getLogger(__name__)


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
    stage: Keywords = {
        "pre_process": pre_process,
        "post_process": post_process,
        "vp_stage": vp_stage,
        "pg_collection": pg_collection,
        "max_sequence_length": spec.student.max_position_embeddings,
        # The same of both models: then a rank has the same columns of both vocabularies.
        "padded_vocab_size": padded_vocab_size(spec.student, spec.args.make_vocab_size_divisible_by),
    }
    teacher = _build_teacher(spec, config, stage)
    model: Keywords = {"options": spec.options, "teacher": teacher, "timed_losses": timed_losses}
    if post_process and spec.cache is not None:
        model["recorded"] = _build_recorded(spec.cache, config, spec.args, stage)
    fields = shape_config_fields(spec.student) | router_fields(config, spec.elastic, 0)
    student = build_model(
        spec.student,
        dataclasses.replace(config, **fields),
        model_class=DistillationModel if spec.elastic is None else ElasticModel,
        **model,
        **stage,
    )
    assert isinstance(student, DistillationModel)
    if isinstance(student, ElasticModel):
        _attach_budgets(student, spec, config, stage | model)
    student.apart = spec.documents_apart
    if spec.train_only is not None:
        freeze(student, spec.student, spec.train_only)
    return student


def _attach_budgets(student: ElasticModel, spec: RunSpec, config: TransformerConfig, model: Keywords) -> None:
    """Build the smaller budgets of a stage, co-located with it; their weights are undefined."""
    assert spec.elastic is not None
    others = []
    for number, budget in enumerate(spec.elastic.budgets[1:], start=1):
        shape = budget.plan.target_shape
        fields = shape_config_fields(shape) | router_fields(config, spec.elastic, number)
        fields |= {
            "perform_initialization": False,
            "pipeline_model_parallel_layout": layout_of(budget, spec.stages, spec.args),
        }
        with _own_random_numbers():
            other = build_model(shape, dataclasses.replace(config, **fields), model_class=DistillationModel, **model)
        assert isinstance(other, DistillationModel)
        other.apart = spec.documents_apart
        other.to(device=torch.cuda.current_device())
        others.append(other)
    student.attach(*others)
    _number_layers(student.students, spec.elastic)


def select_parameters(spec: RunSpec, chunks: Sequence[DistillationModel]) -> None:
    """Make the parameters of smaller budgets selections of the largest one's; all ranks call it together.

    Not while stages are built, when Megatron has first and last stages wait for each other.

    Args:
        spec: of the run.
        chunks: all virtual pipeline stages of this rank.
    """
    for chunk in chunks:
        if spec.elastic is not None and isinstance(chunk, ElasticModel):
            pairs = zip(chunk.students[1:], spec.elastic.budgets[1:], strict=True)
            chunk.selected = tuple(SelectedParameters(other, chunk, budget.plan) for other, budget in pairs)
            _say_what_is_gathered(spec, chunk)


def _say_what_is_gathered(spec: RunSpec, chunk: ElasticModel) -> None:
    """What uneven survivors cost before and after each step, on the first rank."""
    assert spec.elastic is not None
    stacked = {weight.key for weight in weights(spec.student) if weight.stacked}
    for selected, name in zip(chunk.selected, spec.elastic.names[1:], strict=True):
        if not selected.gathered or spec.args.rank != 0:
            continue
        experts = len(stacked.intersection(selected.gathered))
        ranks = spec.args.expert_model_parallel_size
        spare = f"; megatron-slim sort --expert-parallel {ranks} spares these" if experts else ""
        logger.info(
            f"elastic: {len(selected.gathered)} tensors of budget {name} on this stage are unevenly divided over ranks "
            f"and gathered before and after its steps, {experts} of them experts{spare}"
        )


def _number_layers(students: Sequence[DistillationModel], run: ElasticRun) -> None:
    """Give every layer of every budget a number of its own in what Megatron records of routers (`elastic.Numbers`)."""
    numbers = Numbers(run)
    for budget, student in enumerate(students):
        layers = run.budgets[budget].plan.kept_layers
        for router in (module for module in student.modules() if isinstance(module, TopKRouter)):
            place = router.layer_number - 1
            layer = numbers.trunk + place if router.is_mtp_layer else layers[place]
            router.config = copy.copy(router.config)
            router.config.num_layers = numbers.total - numbers.mtp
            router.layer_number = numbers.of(budget, layer) - (router.config.num_layers if router.is_mtp_layer else 0)


def _own_random_numbers() -> AbstractContextManager[None]:
    """What is built within leaves the random weights of a student as they are without it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _build_teacher(spec: RunSpec, config: TransformerConfig, stage: Keywords) -> HiddenStatesModel | None:
    if spec.teacher is None:
        return None
    layout, dtype, recipe = spec.stages.teacher, spec.args.teacher_dtype, spec.args.teacher_fp8_recipe
    with _own_random_numbers():
        teacher = build_model(
            spec.teacher,
            teacher_config(spec.teacher, config, layout=layout, dtype=dtype, fp8_recipe=recipe),
            model_class=HiddenStatesModel,
            **stage,
        )
    assert isinstance(teacher, HiddenStatesModel)
    teacher.apart = spec.documents_apart
    # Megatron moves the student to its device later; some parameters are made on the host.
    return teacher.to(device=torch.cuda.current_device(), dtype=teacher.config.params_dtype)


def router_fields(config: TransformerConfig, run: ElasticRun | None, budget: int) -> Keywords:
    """What trains a budget's routers: losses by its weight, and of a bias's rate the part of one of the step's budgets.

    Args:
        config: of Megatron's validated arguments.
        run: of which budgets; None: of the student alone.
        budget: which.
    """
    if run is None:
        return load_balancing_fields(config)
    weight, z_loss = run.budgets[budget].weight, config.moe_z_loss_coeff
    return load_balancing_fields(config, weight) | {
        "moe_z_loss_coeff": None if z_loss is None else weight * z_loss,
        "moe_router_bias_update_rate": config.moe_router_bias_update_rate / (len(run.budgets) if run.together else 1),
    }


def _build_recorded(
    cache: TeacherCache, config: TransformerConfig, args: Namespace, stage: Keywords
) -> RecordedTeacher:
    """This rank's rows of the output layer of a teacher that was recorded; their content is undefined."""
    dtype = config.params_dtype if args.teacher_dtype is None else DTYPES[args.teacher_dtype]
    rows = stage["padded_vocab_size"] // args.tensor_model_parallel_size
    stored = StoredStates(cache.kind, cache.hidden_size)
    return RecordedTeacher(stored, rows, dtype, on_host=args.teacher_head_offload)


def load_balancing_fields(config: TransformerConfig, weight: float = 1.0) -> Keywords:
    """The load-balancing coefficient that makes the global-batch loss independent of the number of ranks.

    Args:
        config: of Megatron's validated arguments.
        weight: of all losses of the model.

    Every data-parallel rank's ``global_aux_loss`` is its tokens' share of the loss over all ranks, so the shares must
    be summed; but gradients are averaged over ranks, which alone would weaken the loss by the data-parallel size.
    """
    kinds = config.moe_router_load_balancing_type
    coefficients = config.moe_aux_loss_coeff
    ranks = parallel_state.get_data_parallel_world_size()
    if isinstance(kinds, list):
        pairs = zip(kinds, coefficients, strict=True)
        return {"moe_aux_loss_coeff": [weight * (c * ranks if kind == "global_aux_loss" else c) for kind, c in pairs]}
    return {"moe_aux_loss_coeff": weight * (coefficients * ranks if kinds == "global_aux_loss" else coefficients)}


def load_weights(spec: RunSpec, chunks: Sequence[DistillationModel]) -> None:
    """Fill the teacher, and the student where Megatron does not.

    Args:
        spec: of the run.
        chunks: all virtual pipeline stages of this rank.
    """
    for chunk in chunks:
        if spec.cache is not None and chunk.recorded is not None:
            rank = parallel_state.get_tensor_model_parallel_rank()
            spec.cache.load_head(chunk.recorded.weight, rank * len(chunk.recorded.weight))
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
