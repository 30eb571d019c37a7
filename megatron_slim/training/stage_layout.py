"""Pipeline stages of a run: what was asked for, checked, as Megatron's layouts of both models, and as a table."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import megatron_slim.mcore

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import (
    FUSED,
    TORCH,
    TORCH_ON_GPU,
    Flops,
    Kernels,
    Recompute,
    head_flops,
    teacher_flops,
)
from megatron_slim.architecture.pipeline_layout import (
    NO_TEACHER,
    Counts,
    Stages,
    balanced,
    balanced_apart,
    even_layers,
)
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.command_line import ToolParser
from megatron_slim.errors import SlimError
from megatron_slim.training.train_only import chosen

TARGET = 1.05  # slowest rank over the mean that needs no explanation
AUTO = "--pipeline-layout auto"
VIRTUAL_FLAGS = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")
# Megatron's other ways to divide unevenly speak of one model; the teacher would get the student's numbers.
_ONE_MODEL_ONLY = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True)
class StageLayout:
    """Stages of both models, and Megatron's flags for them.

    Attributes:
        stages: layers and operations of every virtual stage.
        student: the student's layout as `PipelineParallelLayerLayout` reads it; None, Megatron divides evenly.
        teacher: the teacher's.
        chosen: by what flag.
    """

    stages: Stages
    student: str | None
    teacher: str | None
    chosen: str

    def command_line(self, argv: list[str]) -> list[str]:
        """The arguments for Megatron, which takes a layout or a number of virtual stages, not both."""
        if self.student is None:
            return argv
        early = ToolParser(add_help=False, allow_abbrev=False)
        for flag in (*VIRTUAL_FLAGS, "--pipeline-model-parallel-layout"):
            early.add_argument(flag)
        _, rest = early.parse_known_args(argv)
        return [*rest, f"--pipeline-model-parallel-layout={self.student}"]

    def table(self) -> str:
        """Layers and relative operations of each stage, the slowest rank over the mean, and what limits it."""
        stages, rows = self.stages, []
        mean = sum(stages.rank_loads()) / stages.ranks
        counts = zip(stages.student_layers, stages.teacher_layers, stages.model_loads(), strict=True)
        for stage, (student, teacher, (own, theirs)) in enumerate(counts):
            at = f"{stage % stages.ranks}.{stage // stages.ranks}"
            shares = f"{own / mean:>8.3f} {theirs / mean:>8.3f} {(own + theirs) / mean:>6.3f}"
            rows.append(f"{at:>5} {student:>15} {teacher:>15} {shares}")
        head = f"{'stage':>5} {'student layers':>15} {'teacher layers':>15} {'student':>8} {'teacher':>8} {'sum':>6}"
        title = f"pipeline stages (rank.virtual; {self.chosen}), operations per token over the mean of the ranks:"
        return "\n".join(
            [title, head, *rows, f"slowest rank over the mean: {stages.slowest_over_mean:.3f}{self._why()}"]
        )

    def _why(self) -> str:
        """What keeps the ranks from being even, where they are not."""
        if self.stages.slowest_over_mean <= TARGET:
            return ""
        if self.stages.floor > TARGET:
            floor = f"{self.stages.floor:.3f}"
            return f" (no layout is below {floor}: heads, MTP blocks and loss stay together on the last rank)"
        return " (single layers are too much for less)" if self.chosen == AUTO else f" ({AUTO} would balance them)"


def virtual_stages(shape: ModelShape, args: Namespace) -> int:
    """Virtual stages per pipeline rank that the flags ask for."""
    if args.pipeline_model_parallel_layout is not None:
        return max(1, len(_rows(args.pipeline_model_parallel_layout) or ()) // args.pipeline_model_parallel_size)
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return int(args.num_virtual_stages_per_pipeline_rank)
    layers = args.num_layers_per_virtual_pipeline_stage
    return 1 if layers is None else max(1, shape.num_layers // args.pipeline_model_parallel_size // layers)


def _layout_of(name: str, args: Namespace) -> str | None:
    layout = args.pipeline_model_parallel_layout if name == "student" else args.teacher_pipeline_layout
    return None if layout is None else str(layout)


def stage_violations(args: Namespace) -> list[str]:
    """What is wrong with the flags of the pipeline whatever the models."""
    found = []
    auto, explicit = args.pipeline_layout == "auto", [_layout_of(name, args) for name in ("student", "teacher")]
    for name in _ONE_MODEL_ONLY:
        if getattr(args, name):
            fix = "use --pipeline-layout auto, or --pipeline-model-parallel-layout and --teacher-pipeline-layout"
            found.append(f"--{name.replace('_', '-')} does not say what the teacher's stages hold; {fix}")
    if auto and any(explicit):
        found.append("--pipeline-layout auto chooses the stages itself; leave it or the explicit layout out")
    if auto and args.num_layers_per_virtual_pipeline_stage is not None:
        found.append(f"--pipeline-layout auto needs {VIRTUAL_FLAGS[0]}, not {VIRTUAL_FLAGS[1]}")
    if explicit[1] and args.teacher_load is None:
        found.append("--teacher-pipeline-layout without a teacher")
    return found


def layer_violations(name: str, shape: ModelShape, args: Namespace) -> list[str]:
    """What keeps the layers of the student, or of the teacher, from being divided into stages as asked for."""
    ranks, virtual = args.pipeline_model_parallel_size, virtual_stages(shape, args)
    stages = f"{ranks} pipeline stages" if virtual == 1 else f"{ranks} x {virtual} virtual pipeline stages"
    layout = _layout_of(name, args)
    if layout is not None:
        return _explicit_violations(name, shape, layout, ranks, ranks * virtual)
    if args.pipeline_layout == "auto":
        inner = ranks * virtual - 2
        few = name == "student" and shape.num_layers < inner
        return [f"num_layers {shape.num_layers} is fewer than the {inner} inner ones of {stages}"] if few else []
    if shape.num_layers % (ranks * virtual):
        return [
            f"num_layers {shape.num_layers} does not divide into {stages} (--pipeline-layout auto needs no division)"
        ]
    return []


def _rows(layout: str) -> list[list[LayerType]] | None:
    """Megatron's reading of a layout; None where it can't."""
    try:
        rows: list[list[LayerType]] = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError:
        return None
    return rows


def _explicit_violations(name: str, shape: ModelShape, layout: str, ranks: int, stages: int) -> list[str]:
    rows = _rows(layout)
    if rows is None:
        return [f"layout {layout!r} is not of E, t, m, L and | (as in 'Ett|(tt|)*2tmL')"]
    found = []
    if len(rows) != stages:
        found.append(f"layout {layout!r} has {len(rows)} stages, not {stages} on {ranks} ranks")
    layers = sum(row.count(LayerType.decoder) for row in rows)
    if layers != shape.num_layers:
        found.append(f"layout {layout!r} has {layers} layers, the model {shape.num_layers}")
    ends = [LayerType.mtp] * shape.mtp_num_layers + [LayerType.loss]
    flat = [layer for row in rows for layer in row if layer is not LayerType.decoder]
    if rows[0][:1] != [LayerType.embedding] or rows[-1][-len(ends) :] != ends or flat != [LayerType.embedding, *ends]:
        tail = "m" * shape.mtp_num_layers + "L"
        found.append(f"layout {layout!r} does not begin with E and end with {tail}: heads and MTP blocks share a stage")
    if name == "student" and not all(rows):
        found.append(f"layout {layout!r} has a stage without a layer: nothing of it would be trained there")
    return found


def _counts(name: str, shape: ModelShape, args: Namespace) -> Counts:
    layout = _layout_of(name, args)
    if layout is not None:
        return tuple(row.count(LayerType.decoder) for row in _rows(layout) or ())
    return even_layers(shape.num_layers, args.pipeline_model_parallel_size * virtual_stages(shape, args))


def layout_string(counts: Counts, mtp_num_layers: int) -> str:
    """A layout in Megatron's own words.

    >>> layout_string((2, 0, 1), 1)
    'Ett||tmL'
    """
    return f"E{'|'.join('t' * count for count in counts)}{'m' * mtp_num_layers}L"


def plan_stages(
    shape: ModelShape, teacher: ModelShape | None, args: Namespace, *, teacher_runs_mtp: bool
) -> StageLayout:
    """Stages of a run whose flags have been checked.

    Args:
        shape: the student's sizes.
        teacher: the teacher's, if there is one.
        args: Megatron's arguments as parsed, before its own validation.
        teacher_runs_mtp: the student's MTP heads are supervised by the teacher's.

    Raises:
        SlimError: no stages hold the layers.
    """
    student, theirs = _flops(shape, teacher, args, teacher_runs_mtp)
    ranks = args.pipeline_model_parallel_size
    if args.pipeline_layout == "auto" and ranks > 1:
        virtual = virtual_stages(shape, args)
        if teacher and args.teacher_ahead:
            losses = head_flops(teacher) * (1 + (teacher.mtp_num_layers if teacher_runs_mtp else 0))
            stages = balanced_apart(student, theirs, losses, ranks, virtual)
        else:
            stages = balanced(student, theirs, ranks, virtual)
        if stages is None:
            raise SlimError(f"{shape.num_layers} layers do not fill the pipeline", fix="use fewer stages")
        own = layout_string(stages.student_layers, shape.mtp_num_layers)
        other = layout_string(stages.teacher_layers, teacher.mtp_num_layers) if teacher else None
        return StageLayout(stages, own, other, AUTO)
    counts = _counts("student", shape, args)
    teacher_counts = _counts("teacher", teacher, args) if teacher else (0,) * len(counts)
    stages = Stages(ranks, student, theirs, counts, teacher_counts)
    explicit = _layout_of("student", args), _layout_of("teacher", args)
    chosen = "as given" if any(explicit) else "--pipeline-layout even"
    return StageLayout(stages, explicit[0], explicit[1], chosen)


def kernels_of(args: Namespace) -> Kernels:
    """How a run computes what has no weights."""
    if args.transformer_impl != "local":
        return FUSED
    return TORCH_ON_GPU if torch.cuda.is_available() else TORCH


def _flops(
    shape: ModelShape, teacher: ModelShape | None, args: Namespace, teacher_runs_mtp: bool
) -> tuple[Flops, Flops]:
    kernels = kernels_of(args)
    length = args.seq_length or shape.max_position_embeddings
    selective = args.recompute_activations or args.recompute_granularity == "selective"
    recompute = Recompute(
        "selective" if selective else args.recompute_granularity,
        args.recompute_method,
        args.recompute_num_layers or 1,
        tuple(args.recompute_modules or (["core_attn"] if selective else [])),
    )
    student = step_flops(shape, length, kernels, recompute, chosen(args), everywhere=True)
    if teacher is None:
        return student, NO_TEACHER
    return student, teacher_flops(teacher, length, kernels, runs_mtp=teacher_runs_mtp)
