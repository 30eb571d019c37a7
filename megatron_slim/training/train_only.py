"""Training of some parts of a student: which, and what does not go with it (imports no torch)."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence

from megatron_slim.aliases import ArgumentGroup
from megatron_slim.architecture.parts import MTP_PART, PARTS, ROUTER, Place, TrainOnly, rows_by_place
from megatron_slim.architecture.shape import ModelShape

TRAIN_ONLY = "--train-only"
AUX_LOSS = "--moe-aux-loss-coeff"
# What does not go with it, whatever it is set to but what counts as unset.
_EXCLUDED = {
    "elastic": "the gradients of smaller budgets are added up for every parameter",
    "carry_optimizer": "what is carried is of all parameters",
    "use_megatron_fsdp": "which was not tried with it",
    "use_torch_fsdp2": "which was not tried with it",
    "delay_wgrad_compute": "which takes the weights' gradients of all layers later",
}


def train_only(text: str) -> str:
    """An argument of `TRAIN_ONLY` as it is kept: the same for the same parts.

    >>> train_only("router, experts@3-5")
    'experts@3-5,router'

    Raises:
        argparse.ArgumentTypeError: it names no parts.
    """
    try:
        return TrainOnly.of(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_train_only(group: ArgumentGroup) -> None:
    """Which parts are trained."""
    group.add_argument(
        TRAIN_ONLY,
        type=train_only,
        metavar="PART,...",
        help=f"Train these parts of the student alone, and freeze the rest: {', '.join(PARTS)}, or blocks for all of "
        "the transformer blocks. With @ those of some layers, counted from 0: experts@12-23. The MTP block is mtp, as "
        "a whole. megatron-slim show-optimizer lists what is trained. Default: all.",
    )


def chosen(args: Namespace) -> TrainOnly | None:
    """What a run trains; None: everything."""
    return None if args.train_only is None else TrainOnly.of(args.train_only)


def trains_router(shape: ModelShape, only: TrainOnly | None) -> bool:
    """Whether a router is trained, an MTP block's too; without one load balancing has nothing to change."""
    if only is None:
        return True
    routers = (place for row, place in rows_by_place(shape) if place.part == ROUTER and not row.buffer)
    return any(map(only.trains, routers)) or (shape.mtp_num_layers > 0 and only.trains(Place(MTP_PART)))


def train_only_violations(shape: ModelShape, args: Namespace, given: Sequence[str]) -> list[str]:
    """What is wrong with the parts that are trained, in sentences.

    Args:
        shape: the student's.
        args: Megatron's arguments and ours as parsed.
        given: the command line as it was given.
    """
    if (only := chosen(args)) is None:
        return []
    found = [f"{TRAIN_ONLY} {sentence}" for sentence in only.violations(shape)]
    for name, why in _EXCLUDED.items():
        if getattr(args, name, None):
            found.append(f"{TRAIN_ONLY} does not go with --{name.replace('_', '-')}: {why}")
    if not trains_router(shape, only) and any(word.split("=")[0] == AUX_LOSS for word in given):
        coefficients = args.moe_aux_loss_coeff
        if any(coefficients if isinstance(coefficients, list) else [coefficients]):
            found.append(f"{TRAIN_ONLY} {only.name} trains no router, which {AUX_LOSS} is for; leave one of them out")
    return found


def train_only_note(shape: ModelShape, only: TrainOnly | None) -> str | None:
    """What is trained, in numbers, and what becomes of routers; None where everything is trained."""
    if only is None:
        return None
    whole = trained = 0
    for row, place in rows_by_place(shape):
        if not row.buffer:
            whole += row.numel(shape)
            trained += row.numel(shape) if only.trains(place) else 0
    routers = "" if trains_router(shape, only) else "; no router is, so nothing balances the load of experts"
    return f"train-only: {only.name}: {trained:,} of {whole:,} parameters ({trained / whole:.1%}) are trained{routers}"
