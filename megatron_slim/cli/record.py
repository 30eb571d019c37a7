"""Record what a teacher ends with, once: training with --teacher-cache then needs no teacher in memory.

One process streams through the model; under megatron-slim torchrun every process, on a GPU of its own, records its part
of the samples. The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.evaluation_extras import DTYPES, dtype_of
from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import add_load_arguments, load_options, not_negative, positive
from megatron_slim.processes import leaving_together
from megatron_slim.recipe_run import STATES

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "record", "--teacher")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="directory of the cache")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a sample set, as megatron-slim preprocess --chat makes one; or the prefix of a Megatron .bin/.idx pair, "
        "or a .npy integer matrix [samples, positions + 1]",
    )
    parser.add_argument("--seq-length", type=positive, metavar="N", help="positions of a sample; needed with .bin/.idx")
    parser.add_argument(
        "--num-samples", type=positive, metavar="N", help="samples of .bin/.idx or .npy, drawn at random (default: all)"
    )
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of the random choice")
    parser.add_argument(
        "--states",
        choices=STATES,
        default="bf16",
        help="type of the recorded hidden states; fp8 has a scale for every 128 numbers",
    )
    parser.add_argument(
        "--micro-batch-size", type=positive, metavar="N", help="samples per forward pass (default: about 4096 tokens)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        metavar="N",
        help="tokens between two readings of the teacher, and what a kill can cost (default: 16 Mi, or as many hidden "
        "states as half of the free memory holds)",
    )
    parser.add_argument(
        "--no-teacher-check", action="store_true", help="record a teacher that predicts no better than guessing"
    )


def run_record(args: argparse.Namespace) -> JsonObject:
    """Record, say what was recorded."""
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    source = open_checkpoint(args.load, **load_options(args))
    from megatron_slim.teacher_cache.given import read_recorded

    samples = read_recorded(
        args.data, source.shape, seq_length=args.seq_length, num_samples=args.num_samples, seed=args.seed
    )
    if rank == 0:
        log_left_out(source)
    from megatron_slim.teacher_cache.record import RecordOptions, record

    options = RecordOptions(
        kind=args.states,
        dtype=dtype_of(args),
        micro_batch_size=args.micro_batch_size,
        round_tokens=args.shard_tokens,
        check_teacher=not args.no_teacher_check,
        rank=rank,
        world=world,
        announce=lambda *sizes: _announce(source, args.save, world, samples.loss_mask.shape[1], *sizes),
    )
    cache = record(source, samples, args.save, options)
    if cache is None:
        return {}
    found = cache.summary()
    logger.info(
        f"{args.save}: states of {found['tokens']:,} tokens in {cache.kind}; rounding them costs a KL of "
        f"{found['kl_of_rounding']:.2g} nats a token, the teacher's cross entropy is {found['teacher_loss']:.4f}"
    )
    return found


def _announce(source: Checkpoint, save: Path, world: int, length: int, tokens: int, nbytes: int, shards: int) -> None:
    """What is about to be recorded, and how long that takes, by estimate."""
    from megatron_slim.compression.machine import recording_seconds, size_text, this_machine, time_text

    machine, readings = this_machine(world), -(-shards // world)
    took = recording_seconds(source.shape, length, tokens, nbytes, machine, readings=readings, processes=world)
    logger.info(
        f"{save}: recording {tokens:,} tokens in {shards} shard{'s' if shards != 1 else ''}, {size_text(nbytes)} on "
        f"disk, about {time_text(took)} on {machine.name} (estimate)"
    )


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, _as_rank, argv, prog)


def _as_rank(args: argparse.Namespace) -> JsonObject:
    """`run_record`; of several processes an error is one line, and all leave with exit code 2."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_record(args)
    with leaving_together():
        return run_record(args)
