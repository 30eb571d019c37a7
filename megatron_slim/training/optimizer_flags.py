"""The arguments of optimizers that update whole matrices, and what does not go with them (imports no torch).

Muon's own are Megatron's: ``--muon-momentum``, ``--muon-nesterov``, ``--muon-num-ns-steps``, ``--muon-scale-mode``,
``--muon-coefficient-type`` and ``--muon-extra-scale-factor``.
"""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_slim.aliases import ArgumentGroup
from megatron_slim.architecture.kinds import KINDS
from megatron_slim.errors import SlimError
from megatron_slim.extras import require
from megatron_slim.optimizers import AURORA, MUON, OPTIMIZERS

if TYPE_CHECKING:
    from megatron_slim.architecture.shape import ModelShape

PACKAGE, EXTRA = "emerging_optimizers", "optimizers"
SKIP, STEP = "skip", "step"
HIDDEN, ALL = "hidden", "all"
SPECTRAL, SHAPE = "spectral", "shape_scaling"
SAME_SCALE = f"--muon-scale-mode={SHAPE}"  # Aurora's, so that a learning rate means the same of both
# How far AdamW moves a weight in a step, as a share of its learning rate: about so far.
ADAMW_SHARE = 0.2
LEAST_RATE = 1e-3  # below it a learning rate is one that AdamW had


def add_optimizer(group: ArgumentGroup) -> None:
    """How matrices are updated, and what else is."""
    group.add_argument(
        "--adamw-lr",
        type=float,
        metavar="X",
        help="With --optimizer muon or aurora: learning rate of what AdamW updates, in place of --lr; it goes down as "
        "that does. Default: --lr / (0.2 sqrt(hidden_size)), with which weights move about as far.",
    )
    group.add_argument(
        "--optimizer-matrices",
        choices=(HIDDEN, ALL),
        default=HIDDEN,
        help="With --optimizer muon or aurora: which matrices it updates. hidden: those between channels; "
        "megatron-slim show-optimizer lists them. all: also routers, gates of shared experts and Gated DeltaNet's rows "
        "for heads, as in Megatron. Embeddings, output layer and vectors are AdamW's always. Default: hidden.",
    )
    group.add_argument(
        "--optimizer-idle",
        choices=(SKIP, STEP),
        default=SKIP,
        help="With --optimizer muon or aurora: what becomes of a matrix whose gradient is zero, as that of an expert "
        "without tokens. skip: it stays as it is. step: it moves as far as ever, along old gradients, as published. "
        "Default: skip.",
    )
    group.add_argument(
        "--optimizer-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="With --optimizer muon or aurora: precision of its products. bf16 makes noise of gradients of low "
        "rank, as of experts with few tokens. Default: fp32.",
    )
    about = "With --optimizer aurora: "
    group.add_argument(
        "--aurora-momentum", type=float, default=0.95, metavar="X", help=f"{about}share of the mean that stays."
    )
    group.add_argument("--aurora-no-nesterov", action="store_true", help=f"{about}no look ahead by the own gradient.")
    group.add_argument(
        "--aurora-iterations", type=int, default=2, metavar="N", help=f"{about}polar factors per step. Default: 2."
    )
    group.add_argument(
        "--aurora-beta", type=float, default=0.5, metavar="X", help=f"{about}exponent of the scales of rows."
    )


def adamw_rate(args: Namespace, hidden_size: int) -> float:
    """Learning rate of what AdamW updates under an optimizer of matrices."""
    if args.adamw_lr is not None:
        return float(args.adamw_lr)
    if args.optimizer == MUON and args.muon_scale_mode == SPECTRAL:  # whose updates have entries of about 1
        return float(args.lr)
    return float(args.lr) / (ADAMW_SHARE * math.sqrt(hidden_size))


def rate_note(args: Namespace, hidden_size: int) -> str | None:
    """One line where a learning rate looks like one of AdamW, under which matrices would hardly move."""
    if not OPTIMIZERS[args.optimizer].has_matrices or args.lr is None or args.lr >= LEAST_RATE:
        return None
    if args.optimizer == MUON and args.muon_scale_mode != SHAPE:
        return None
    proposed = ADAMW_SHARE * math.sqrt(hidden_size) * args.lr
    return (
        f"warning: --lr {args.lr:g} looks like a learning rate of AdamW; --optimizer {args.optimizer} moves weights as "
        f"far with 0.2 sqrt(fan_in) times as much: --lr {proposed:.2g}, and --adamw-lr {args.lr:g} for the rest"
    )


# Megatron's optimizers that are not offered, and why.
_OTHERS = {
    "sgd": "has no second moment, which the planner and carried states count on",
    "dist_muon": "is Megatron's old name for --optimizer muon --use-distributed-optimizer",
    "adaptive_muon": "does not run with the package that has it",
    "lion": "was not tried on recovery",
    "soap": "was not tried on recovery",
}
# Flags of Megatron's Muon that ours has another answer to.
_NOT_OURS = {
    "--muon-tp-mode": "every matrix is gathered whole, whatever the layout",
    "--muon-no-split-qkv": "queries, gates, keys and values are matrices of their own",
    "--muon-fp32-matmul-prec": "give --optimizer-precision",
    "--muon-scalar-optimizer": "what is not a matrix is AdamW's",
    "--decoupled-lr": "give --adamw-lr",
    "--decoupled-min-lr": "give --adamw-lr",
}
# Arguments of Megatron's that do not go with matrices, whatever they are set to but what counts as unset.
_EXCLUDED = {
    "fp16": "gradients may be infinite there, and are scaled",
    "use_torch_fsdp2": "which has parts of matrices on every rank",
    "use_megatron_fsdp": "which has parts of matrices on every rank",
    "use_precision_aware_optimizer": "which is of Adam's states",
    "optimizer_cpu_offload": "which is of Adam's states",
    "overlap_param_gather_with_optimizer_step": "which steps the first layers on their own",
    "moe_single_grouped_weight": "which has all experts in one parameter",
}


def optimizer_violations(args: Namespace, given: Sequence[str], student: ModelShape) -> list[str]:
    """What is wrong with the optimizer and its arguments, in sentences.

    Args:
        args: Megatron's arguments and ours as parsed.
        given: the command line as it was given.
        student: sizes of the model.
    """
    name, flags = args.optimizer, {word.split("=")[0] for word in given}
    if name not in OPTIMIZERS:
        return [f"--optimizer {name} {_OTHERS.get(name, 'is not known')}: give {', '.join(OPTIMIZERS)}"]
    found = [] if name == AURORA else _unused(flags, "--aurora-", AURORA)
    if not OPTIMIZERS[name].has_matrices:
        return found + [each for flag in ("--optimizer-", "--adamw-lr") for each in _unused(flags, flag, MATRICES)]
    return [*found, *_missing(name), *_excluded(args, flags), *_of_values(args), *_of_layout(args, student)]


MATRICES = f"{MUON} or {AURORA}"
_MEGATRONS = ("--optimizer-cpu-offload", "--optimizer-offload-fraction", "--optimizer-cuda-graph")


def _unused(flags: set[str], beginning: str, of: str) -> list[str]:
    """Flags that are given without the optimizer that has them."""
    return [
        f"{flag} goes with --optimizer {of} alone"
        for flag in sorted(flags)
        if flag.startswith(beginning) and flag not in _MEGATRONS
    ]


def _missing(name: str) -> Iterator[str]:
    if importlib.util.find_spec(PACKAGE) is None:
        try:
            require(EXTRA, PACKAGE, f"--optimizer {name}")
        except SlimError as error:
            yield str(error)


def _excluded(args: Namespace, flags: set[str]) -> Iterator[str]:
    for attribute, why in _EXCLUDED.items():
        if getattr(args, attribute, False):
            yield f"--optimizer {args.optimizer} does not go with --{attribute.replace('_', '-')}, {why}"
    for flag, why in _NOT_OURS.items():
        if flag in flags:
            yield f"--optimizer {args.optimizer} does not take {flag}: {why}"
    if args.use_distributed_optimizer and not args.bf16:
        yield (
            f"--optimizer {args.optimizer} in fp32 does not go with --use-distributed-optimizer, which Megatron builds "
            "for it in bf16 alone: leave it out, or give --bf16"
        )
    if getattr(args, "num_distributed_optimizer_instances", 1) > 1:
        yield f"--optimizer {args.optimizer} does not go with several distributed optimizer instances"


def _of_values(args: Namespace) -> Iterator[str]:
    for flag, value in (("--aurora-momentum", args.aurora_momentum), ("--muon-momentum", args.muon_momentum)):
        if not 0 < value < 1:
            yield f"{flag} {value:g} is not between 0 and 1"
    for flag, value in (
        ("--adamw-lr", args.adamw_lr),
        ("--aurora-iterations", args.aurora_iterations),
        ("--aurora-beta", args.aurora_beta),
        ("--muon-num-ns-steps", args.muon_num_ns_steps),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"{flag} {value:g} is not positive"
    if args.optimizer == MUON and args.muon_coefficient_type not in COEFFICIENTS:
        yield f"--muon-coefficient-type {args.muon_coefficient_type} is not one of {', '.join(COEFFICIENTS)}"


COEFFICIENTS = ("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4")


def _of_layout(args: Namespace, student: ModelShape) -> Iterator[str]:
    tp = args.tensor_model_parallel_size
    for heads in (kind.heads for kind in KINDS.values() if not kind.heads.exchanged):
        if tp > 0 and (groups := getattr(student, heads.groups_field)) % tp:
            yield (
                f"--optimizer {args.optimizer} needs a tensor parallel size that divides {heads.groups_field} "
                f"{groups}: with {tp}, a rank has parts of keys and values"
            )
