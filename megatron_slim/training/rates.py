"""The schedule of the learning rate: how long its parts are, and what is wrong with them before anything is built."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)


DEFAULT_WARMUP = "--default-lr-warmup-iters"
_WARMUPS = ("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction")


@dataclass(frozen=True)
class Lengths:
    """Of a run and the parts of its schedule, in iterations or in samples, whichever the run is counted in.

    Attributes:
        unit: ``iters`` or ``samples``, as flags end.
        train: of the run.
        decay: from the first iteration to the lowest rate, warm-up included.
        warmup: a fraction of the decay need not be whole.
        wsd: of the last part of a WSD schedule.
    """

    unit: str
    train: int
    decay: int
    warmup: float
    wsd: int | None

    @staticmethod
    def of(args: Namespace) -> Lengths:
        """Of Megatron's arguments, parsed, validated or saved."""
        unit = "samples" if args.train_samples else "iters"
        train, decay = getattr(args, f"train_{unit}"), getattr(args, f"lr_decay_{unit}")
        decay = train if decay is None else decay
        fraction = args.lr_warmup_fraction
        warmup = getattr(args, f"lr_warmup_{unit}") if fraction is None else fraction * decay
        return Lengths(unit, train, decay, warmup, getattr(args, f"lr_wsd_decay_{unit}"))


def default_warmup(args: Namespace, argv: list[str]) -> list[str]:
    """Megatron's words for ``--default-lr-warmup-iters`` where nothing says how long the warm-up is.

    A default for long runs would not fit into a short one: it warms up over a tenth of its iterations, and says so.

    Args:
        args: as parsed; ``lr_warmup_iters`` is set.
        argv: what it was parsed from.
    """
    given = {word.split("=")[0] for word in argv}
    if args.default_lr_warmup_iters is None or not args.train_iters or given.intersection(_WARMUPS):
        return []
    length, warmup = Lengths.of(args).decay, args.default_lr_warmup_iters
    if warmup >= length:
        warmup = max(length, 0) // 10
        if args.rank == 0:
            logger.info(
                f"learning rate: warm-up of {warmup} iterations, a tenth of {length}; the default of "
                f"{args.default_lr_warmup_iters} is not below them (LR_WARMUP_ITERS or --lr-warmup-iters sets it)"
            )
    args.lr_warmup_iters = warmup
    return [f"--lr-warmup-iters={warmup}"]


def rate_violations(args: Namespace) -> list[str]:
    """What is wrong with the learning rate and the lengths of its schedule, in sentences.

    Args:
        args: Megatron's arguments as parsed, before its own validation.
    """
    if args.skip_train or not (args.train_iters or args.train_samples):
        return []
    return [*_of_rates(args), *_of_lengths(args), *_of_weight_decay(args)]


def _of_rates(args: Namespace) -> Iterator[str]:
    if args.lr is None:
        yield "--lr is not given"
        return
    rates = {"--lr": args.lr, "--min-lr": args.min_lr, "--lr-warmup-init": args.lr_warmup_init}
    for flag, rate in rates.items():
        if not (math.isfinite(rate) and rate >= 0):
            yield f"{flag} {rate:g} is not a finite non-negative rate"
        elif rate > args.lr:
            yield f"{flag} {rate:g} is above --lr {args.lr:g}"


def _of_lengths(args: Namespace) -> Iterator[str]:
    found = Lengths.of(args)
    unit, fraction, given = found.unit, args.lr_warmup_fraction, getattr(args, f"lr_decay_{found.unit}")
    whole = f"--train-{unit} {found.train}" if given is None else f"--lr-decay-{unit} {given}"
    if found.decay <= 0:
        yield f"{whole} is not positive"
    elif fraction is not None:
        if not 0 <= fraction < 1:
            yield f"--lr-warmup-fraction {fraction:g} is not from 0 to below 1"
    elif not 0 <= found.warmup < found.decay:
        yield f"--lr-warmup-{unit} {found.warmup} is not from 0 to below {whole}"
    if args.lr_decay_style == "WSD":
        if found.wsd is None:
            yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}"
        elif not 0 < found.wsd <= found.decay - found.warmup:
            yield f"--lr-wsd-decay-{unit} {found.wsd} is not between 1 and what {whole} leaves after the warm-up"


def _of_weight_decay(args: Namespace) -> Iterator[str]:
    style, start, end = args.weight_decay_incr_style, args.start_weight_decay, args.end_weight_decay
    if style == "constant":
        if args.weight_decay < 0:
            yield f"--weight-decay {args.weight_decay:g} is negative"
    elif start is None or end is None:
        yield f"--weight-decay-incr-style {style} needs --start-weight-decay and --end-weight-decay"
    elif not 0 <= start <= end:
        yield f"--start-weight-decay {start:g} is not from 0 to --end-weight-decay {end:g}"
