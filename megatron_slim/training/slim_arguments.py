"""The arguments that training has in addition to Megatron's; no torch, so that help is instant."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from megatron_slim.aliases import ArgumentGroup
from megatron_slim.architecture.fp8_sizes import TEACHER_RECIPES
from megatron_slim.command_line import ToolParser, add_chat_arguments, positive
from megatron_slim.distillation.layer_pairs import FLAG, parse_layer_pairs
from megatron_slim.distillation.loss_options import DEFAULTS, HIDDEN_LOSSES, KD_LOSSES
from megatron_slim.distillation.schedule import SHAPES, Schedule
from megatron_slim.distillation.terms import LOSS_TERMS, LossWeight, check_terms, weights_of
from megatron_slim.errors import SlimError
from megatron_slim.training.optimizer_flags import add_optimizer
from megatron_slim.training.train_only import add_train_only

MEGATRON_HELP, WITHOUT_MTP = "--help-megatron", "--without-mtp"
ELASTIC_FLAG, IN_TURN, TOGETHER = "--elastic", "in-turn", "together"


def help_parser(prog: str) -> argparse.ArgumentParser:
    """A parser that knows how to print the help of our arguments alone."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train or distil with Megatron's loop. Takes all of Megatron's arguments but those of the model's "
        "shape, which comes from its config.json. In front of -- it takes those of megatron-slim distill instead.",
    )
    parser.add_argument(MEGATRON_HELP, action="store_true", help="Print all of Megatron's arguments and exit.")
    return add_slim_arguments(parser)


def add_slim_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our group of arguments: the teacher, the loss weights, where the shape comes from."""
    parser.error = partial(ToolParser.error, parser)  # type: ignore[method-assign, arg-type]
    group = parser.add_argument_group("megatron_slim")
    group.add_argument(
        "--hf-config",
        type=Path,
        help="Directory whose config.json gives the model's shape. Default: that of --load if there is a checkpoint, "
        "else that of --pretrained-checkpoint.",
    )
    group.add_argument(
        WITHOUT_MTP,
        action="store_true",
        help="Train the student without an MTP block, even if its checkpoint or its config.json has one.",
    )
    group.add_argument(
        "--progressive-schedule",
        action="store_true",
        help="The student is that of one phase of a recipe: start at the iteration at which the phase before it ended, "
        "and end when the tokens of this phase are done. --train-iters, schedules and the order of the data are those "
        "of all phases. Default: a run of its own.",
    )
    group.add_argument(
        "--stage-warmup",
        type=int,
        default=0,
        metavar="ITERATIONS",
        help="With --progressive-schedule: the learning rate goes from a tenth of the schedule's value to all of it "
        "over the first iterations of the phase. Default: 0.",
    )
    group.add_argument(
        "--carry-optimizer",
        action="store_true",
        help="Begin with the optimizer's moments and main weights that megatron-slim prune --carry-optimizer put into "
        "--pretrained-checkpoint. A run that resumes has its own. Default: the optimizer is new.",
    )
    group.add_argument(
        "--default-lr-warmup-iters",
        type=int,
        metavar="ITERATIONS",
        help="Warm-up of the learning rate where no --lr-warmup-... is given. A run that is not longer than this warms "
        "up over a tenth of its iterations. Default: none.",
    )
    group.add_argument(
        "--check-arguments",
        action="store_true",
        help="Check arguments, models and data as every run does, and exit before anything is built. One process is "
        "enough: WORLD_SIZE in its environment says how many a run would have.",
    )
    group.add_argument(
        "--before-recording",
        type=positive,
        metavar="SAMPLES",
        help="With --check-arguments: --teacher-cache is not there yet, and will be recorded on so many samples of the "
        "data. Refuse what it will not go with.",
    )
    _add_teacher(group)
    _add_losses(group)
    _add_hidden_states(group)
    _add_budgets(group)
    add_train_only(group)
    add_chat_arguments(parser.add_argument_group("conversations, with --sft"))
    add_optimizer(group)
    group.add_argument(
        "--peak-tflops",
        type=float,
        help="Dense peak of one GPU in TFLOP/s, for the MFU in the log. Default: that of the data sheet of an A100, "
        "H100, H200 or B200, in bf16 or FP8; none for other GPUs and CPUs.",
    )
    group.add_argument(
        "--no-teacher-check",
        action="store_true",
        help="Skip both checks of the teacher before the first step: better than guessing on the first batch, and "
        "equal to its recorded losses.",
    )
    return parser


def _add_teacher(group: ArgumentGroup) -> None:
    """Where the teacher comes from, where it is, and what it computes in."""
    group.add_argument(
        "--teacher-load",
        type=Path,
        help="Teacher checkpoint, Hugging Face or torch_dist. Without it and --teacher-cache the run is plain LM + "
        "MTP-LM training.",
    )
    group.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="DIR",
        help="In place of --teacher-load: what megatron-slim record wrote. Of the teacher the output layer alone is in "
        "memory. The samples of the cache are the data, divided by --split, unless others recorded are named.",
    )
    group.add_argument(
        "--teacher-head-offload",
        action="store_true",
        help="With --teacher-cache: keep the teacher's output layer in host memory; it comes to the device in pieces.",
    )
    group.add_argument("--teacher-without-mtp", action="store_true", help="Use the teacher without its MTP block.")
    group.add_argument(
        "--teacher-dtype",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="Type of the teacher's weights and of its computation; fp8: weights in bf16, GEMMs in FP8. Default: the "
        "student's (--bf16, --fp16, --fp8-format).",
    )
    group.add_argument(
        "--teacher-fp8-recipe",
        choices=TEACHER_RECIPES,
        help="FP8 scaling of the teacher. Default: --fp8-recipe, or tensorwise if that is delayed, which needs "
        "backward passes.",
    )
    group.add_argument(
        "--teacher-ahead",
        type=int,
        default=0,
        metavar="ITERATIONS",
        help="Let the teacher compute the batches of this many iterations ahead, before the first of them, and keep "
        "its last hidden states in host memory. Default: 0, the teacher computes in each forward pass of the student.",
    )
    group.add_argument(
        "--teacher-offload",
        action="store_true",
        help="With --teacher-ahead: keep the teacher's weights in host memory except during its pass and validation.",
    )
    group.add_argument(
        "--pipeline-layout",
        choices=("even", "auto"),
        default="even",
        help="How the layers of each model are divided into pipeline stages. even (default): the same number in each, "
        "as Megatron does. auto: balanced by FLOPs. To set the stages yourself, use --pipeline-model-parallel-layout "
        "for the student and --teacher-pipeline-layout.",
    )
    group.add_argument(
        "--teacher-pipeline-layout",
        help="The teacher's stages, in the format of --pipeline-model-parallel-layout, such as 'Ettt|ttt|tmL'.",
    )


def _add_losses(group: ArgumentGroup) -> None:
    """What supervises main and MTP heads, and how much each term weighs."""
    group.add_argument(
        "--mtp-kd-target",
        choices=("teacher-mtp", "teacher-main"),
        help="What supervises an MTP head: the teacher's MTP head, or its main head at the later position. Default: "
        "the teacher's MTP head where it has one.",
    )
    group.add_argument(
        "--kd-loss",
        choices=KD_LOSSES,
        default=DEFAULTS.kd_loss,
        help=f"Divergence between student and teacher, of main and MTP heads; docs/distillation.md has the formulas. "
        f"Default: {DEFAULTS.kd_loss}.",
    )
    group.add_argument(
        "--kd-temperature",
        type=float,
        default=DEFAULTS.kd_temperature,
        help="Temperature T of both softmaxes in the distillation losses, which are multiplied by T^2. LM losses use "
        f"1. Default: {DEFAULTS.kd_temperature:g}.",
    )
    group.add_argument(
        "--kd-top-k",
        type=int,
        help=f"With --kd-loss top-k: number of the teacher's most probable tokens. Default: {DEFAULTS.kd_top_k}.",
    )
    group.add_argument(
        "--loss-chunk-size",
        type=int,
        help="Tokens whose logits are in memory at once. Default: 512 on a CPU, 1024 on a GPU.",
    )
    check_terms()
    for weight in weights_of(LOSS_TERMS.values()):
        _add_schedule(group, weight)


def _add_hidden_states(group: ArgumentGroup) -> None:
    """Which layers are supervised by which layers of the teacher."""
    group.add_argument(
        FLAG,
        type=parse_layer_pairs,
        default=(),
        metavar="S:T,...",
        help="Pairs of layers, student:teacher, whose hidden states are compared through a trained projection. Layers "
        "count from 0, as in model.layers.N; both must be in one pipeline stage. Default: none.",
    )
    group.add_argument(
        "--hidden-kd-loss",
        choices=HIDDEN_LOSSES,
        default=DEFAULTS.hidden_kd_loss,
        help=f"1 - cosine of hidden states, or the mean of squared differences. Default: {DEFAULTS.hidden_kd_loss}.",
    )


def _add_budgets(group: ArgumentGroup) -> None:
    """Training of several sizes of one student."""
    group.add_argument(
        ELASTIC_FLAG,
        choices=(IN_TURN, TOGETHER),
        help="Train all budgets of the student's elastic.json, which are parts of it. in-turn: each iteration one of "
        "them, by shares. together: each iteration all of them, with one pass of the teacher. Default: the student as "
        "it is alone.",
    )
    group.add_argument(
        "--elastic-shares",
        type=parse_shares,
        metavar="N,N,...",
        help=f"With {ELASTIC_FLAG} in-turn: of how many iterations in their sum each budget is, from the largest. "
        "Default: 1 each.",
    )
    group.add_argument(
        "--elastic-late-shares",
        type=parse_shares,
        metavar="N,N,...",
        help="The same from --elastic-late-from on, as where a second stage favours the largest. Default: no change.",
    )
    group.add_argument(
        "--elastic-late-from", type=int, metavar="ITERATION", help="Iterations before --elastic-late-shares."
    )


def parse_shares(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, none negative and one positive.

    >>> parse_shares("5,3,2")
    (5, 3, 2)

    Raises:
        argparse.ArgumentTypeError: they are not.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) <= 4 for part in parts) or not any(map(int, parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 5,3,2")
    return tuple(map(int, parts))


def _add_schedule(group: ArgumentGroup, weight: LossWeight) -> None:
    """The flags of a weight.

    Raises:
        SlimError: another argument has one of them.
    """
    default, shape = weight.default, f"Schedule of {weight.about}. Default: {weight.default.shape}."
    try:
        group.add_argument(f"{weight.flag}-schedule", choices=sorted(SHAPES), default=default.shape, help=shape)
        for end, value, when in (("start", default.start, "first"), ("end", default.end, "last")):
            text = f"Its value in the {when} iteration. Default: {value:g}."
            group.add_argument(f"{weight.flag}-{end}", type=float, metavar="X", default=value, help=text)
    except argparse.ArgumentError as error:
        raise SlimError(f"the weight {weight.name!r} of a loss: {error}", fix="give it another name") from None


def schedule_of(weight: LossWeight, args: argparse.Namespace) -> Schedule:
    """What the flags say about a weight."""
    shape, start, end = (getattr(args, f"{weight.key}_{part}") for part in ("schedule", "start", "end"))
    return Schedule(shape, start, end)


def now(weight: LossWeight, args: argparse.Namespace) -> float:
    """A weight's value in this iteration of Megatron's loop; before the loop, in the one that it begins with."""
    return schedule_of(weight, args).at(getattr(args, "curr_iteration", args.iteration), args.train_iters)
