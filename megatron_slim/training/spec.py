"""One description of a run: everything that is decided before a model is built.

`resolve` makes it of a command line, and of the recipe and the checkpoints that it names. `checks.check` looks for what
is wrong with it. `build.build_stage` builds what one pipeline stage has of its models, for training and planning alike.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import megatron_slim.mcore

from megatron_slim.architecture.parts import TrainOnly
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import Checkpoint, open_checkpoint
from megatron_slim.checkpoint.iterations import is_torch_dist
from megatron_slim.checkpoint.torch_dist_names import TRACKER
from megatron_slim.checkpoint.tracker import missing_parts
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.loss_options import DEFAULTS
from megatron_slim.distillation.options import TEACHER_MAIN, TEACHER_MTP, DistillationOptions
from megatron_slim.errors import CheckpointError, summarise
from megatron_slim.recipe_sections import Phase
from megatron_slim.teacher_cache.cache import TeacherCache, open_cache
from megatron_slim.training.arguments import complete_argv, parse, shape_directory
from megatron_slim.training.chat_data import SFT, name_sample_sets, without_tokenizer_type
from megatron_slim.training.document_checks import keeps_documents_apart, sample_sets
from megatron_slim.training.elastic import ElasticRun, elastic_run, without_overlap
from megatron_slim.training.progressive import Place, find_place, is_done, phase_of
from megatron_slim.training.rates import default_warmup
from megatron_slim.training.stage_layout import StageLayout, plan_stages
from megatron_slim.training.train_only import chosen
from megatron_slim.training.variables import expand


@dataclass(frozen=True)
class RunSpec:
    """A run.

    Attributes:
        given: the command line as it was given, variables and recipe as Megatron's arguments.
        argv: Megatron's, with what the shape, the place in a schedule and our defaults add; stages are not in it.
        args: Megatron's arguments and ours as parsed, before Megatron's own validation.
        source: directory whose config.json describes the student.
        student: its sizes.
        teacher: those of the teacher, None without one.
        checkpoint: what the teacher's weights come from; None without any.
        options: what the student is trained by.
        phase: of a progressive schedule that the student is of, if any.
        place: of that phase in the schedule; None for a run of its own.
        elastic: the budgets that it trains; None where it trains the student as it is.
        cache: the hidden states of a teacher that was recorded; None without one.
    """

    given: tuple[str, ...]
    argv: tuple[str, ...]
    args: Namespace
    source: Path
    student: ModelShape
    teacher: ModelShape | None
    checkpoint: Checkpoint | None = field(repr=False)
    options: DistillationOptions
    phase: Phase | None
    place: Place | None
    elastic: ElasticRun | None = None
    cache: TeacherCache | None = None

    @property
    def has_teacher(self) -> bool:
        """Whether there is distillation: from a teacher in memory, or one that was recorded."""
        return self.teacher is not None or self.cache is not None

    @property
    def is_done(self) -> bool:
        """Whether it is a phase whose last checkpoint is there, and nothing is left to train.

        Raises:
            CheckpointError: the checkpoint is of another phase.
        """
        if self.place is None or self.args.skip_train:
            return False
        return is_done(self.place, self.args.load, self.args.ckpt_step)

    @property
    def train_only(self) -> TrainOnly | None:
        """Which parts of the student are trained; None: all."""
        return chosen(self.args)

    @property
    def resumes(self) -> bool:
        """Whether it continues from a checkpoint of its own, which Megatron finds by ``--load``."""
        load = self.args.load
        return load is not None and bool(self.args.ckpt_step or _holds_checkpoint(load))

    @property
    def start(self) -> Path | None:
        """Where Megatron, or we, will read the student's weights; None where they are random.

        Raises:
            CheckpointError: there is no such iteration, or it is incomplete.
        """
        args = self.args
        if args.load is not None and args.ckpt_step:
            directory = Path(args.load) / f"iter_{args.ckpt_step:07d}"
            fix = "check --ckpt-step"
            if not directory.is_dir():
                raise CheckpointError("no such directory", where=str(directory), fix=fix)
            if found := missing_parts(directory):
                raise CheckpointError(f"is incomplete: {summarise(found)}", where=str(directory), fix=fix)
            return directory
        start = args.load if _holds_checkpoint(args.load) else args.pretrained_checkpoint
        return None if start is None else Path(start)

    @property
    def starts_by_ourselves(self) -> bool:
        """Whether the student's weights do not come through Megatron.

        That is a ``--pretrained-checkpoint`` in Hugging Face's format, and any where projections are to be trained,
        which Megatron would look for in it. Like Megatron's own, it counts only as long as ``--load`` holds no
        checkpoint.
        """
        path = self.args.pretrained_checkpoint
        ours = path is not None and (bool(self.options.hidden_pairs) or not is_torch_dist(Path(path)))
        return ours and not _holds_checkpoint(self.args.load)

    def open_student(self, path: Path) -> Checkpoint:
        """A checkpoint of the student, opened as the command line says."""
        config = self.args.hf_config if is_torch_dist(path) else None
        return open_checkpoint(path, config, without_mtp=self.args.without_mtp)

    @property
    def recorded_heads(self) -> int:
        """Heads of a recorded teacher whose states are needed."""
        return 1 + (self.student.mtp_num_layers if self.teacher_runs_mtp else 0)

    @property
    def teacher_runs_mtp(self) -> bool:
        """Whether the student's MTP heads are supervised by the teacher's."""
        return self.options.mtp_kd_target == TEACHER_MTP and self.student.mtp_num_layers > 0

    @cached_property
    def has_masks(self) -> bool:
        """Whether the data say that some tokens do not count.

        Losses then look for those that do, for which the host waits for the device.

        Raises:
            DataError: the data are of more than one kind.
        """
        return not self.args.mock_data and not all(each.loss_mask.all() for each in sample_sets(self.args))

    @cached_property
    def documents_apart(self) -> bool:
        """Whether documents of a sample do not see each other, in student and teacher.

        Raises:
            DataError: the data are of more than one kind.
        """
        return keeps_documents_apart(self.args)

    @cached_property
    def stages(self) -> StageLayout:
        """Pipeline stages of both models, of flags that have been checked.

        Raises:
            SlimError: no stages hold the layers.
        """
        return plan_stages(self.student, self.teacher, self.args, teacher_runs_mtp=self.teacher_runs_mtp)

    @property
    def megatron_argv(self) -> list[str]:
        """The whole command line that Megatron parses."""
        return self.stages.command_line(list(self.argv))


def resolve(argv: Sequence[str], teacher: ModelShape | None = None) -> RunSpec:
    """Decide what a command line leaves open, by the recipe and the checkpoints that it names.

    Args:
        argv: Megatron's arguments and ours; with ``--`` among them, those in front of it are variables, as
            `megatron-slim distill` takes them, and what they leave open the section ``train`` of ``--recipe`` says.
        teacher: sizes of a teacher without a checkpoint, as in planning.

    Raises:
        SlimError: a flag contradicts the shape, which config.json alone decides, or nothing gives the shape; flags do
            not go with the place in a progressive schedule; a checkpoint cannot be read.
    """
    given = expand(argv)
    source = shape_directory(given)
    asked = without_tokenizer_type(given)
    flags, student = complete_argv(asked)
    words = without_overlap([*flags, *asked])
    args = parse(words)
    # Samples need none of what --sft changes in Megatron, as validation, whose means are then not over tokens.
    words = [word for word in (*words, *name_sample_sets(args)) if word != SFT]
    phase = phase_of(args.pretrained_checkpoint)
    place = find_place(phase, args)
    words = [*default_warmup(args, given), *words]
    if place is not None:
        words = place.command_line(words)
    checkpoint, cache = None, None
    if args.teacher_cache is not None and args.teacher_load is None and not args.before_recording:
        cache = open_cache(args.teacher_cache)
    elif args.teacher_load is not None:
        checkpoint = open_checkpoint(args.teacher_load, without_mtp=args.teacher_without_mtp)
        teacher = checkpoint.shape
    enough = (teacher.mtp_num_layers if teacher else cache.heads - 1 if cache else 1 << 30) >= student.mtp_num_layers
    options = _options(
        student, args, has_teacher=teacher is not None, mtp_target=TEACHER_MTP if enough else TEACHER_MAIN
    )
    elastic = elastic_run(args, source)
    return RunSpec(
        tuple(given), tuple(words), args, source, student, teacher, checkpoint, options, phase, place, elastic, cache
    )


def _options(student: ModelShape, args: Namespace, *, has_teacher: bool, mtp_target: str) -> DistillationOptions:
    """What the student is trained by; ``mtp_target`` supervises its MTP heads unless a flag says what does."""
    return DistillationOptions(
        vocab_size=student.vocab_size,
        kd_loss=KDLoss(args.kd_loss, args.kd_temperature, args.kd_top_k or DEFAULTS.kd_top_k),
        loss_chunk=args.loss_chunk_size,
        mtp_kd_target=args.mtp_kd_target or mtp_target,
        teacher_ahead=has_teacher and args.teacher_ahead > 0,
        hidden_pairs=args.hidden_kd_layers,
        hidden_loss=args.hidden_kd_loss,
        seed=args.seed,
    )


def _holds_checkpoint(directory: str | None) -> bool:
    """Whether Megatron would find a checkpoint there; then a run resumes from it instead of starting."""
    return directory is not None and (Path(directory) / TRACKER).exists()
