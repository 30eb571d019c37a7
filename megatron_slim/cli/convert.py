"""Convert a checkpoint between Hugging Face safetensors and Megatron's torch_dist, every weight bit for bit."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import (
    VERIFICATION,
    add_load_arguments,
    add_write_arguments,
    load_options,
    write_options,
)

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_load_arguments(parser, "convert")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="new directory for the result")
    parser.add_argument(
        "--to",
        choices=("hf", "torch_dist"),
        help="format of the result; the other one if not given. The same one takes a reason: --dequantize-fp8, "
        "--expert-storage, --without-mtp or --dtype",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="cast every tensor (default: each keeps its type)")
    add_write_arguments(parser)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Detect the direction, convert, say what was done."""
    from megatron_slim.errors import CheckpointError
    from megatron_slim.files import refuse_existing

    refuse_existing(args.save)
    import torch

    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint, write_checkpoint
    from megatron_slim.checkpoint.distributed import DistCheckpoint, is_torch_dist
    from megatron_slim.checkpoint.reference import carry_reference
    from megatron_slim.checkpoint.remarks import padding

    source = "torch_dist" if is_torch_dist(args.load) else "hf"
    target = args.to or ("hf" if source == "torch_dist" else "torch_dist")
    checkpoint = open_checkpoint(args.load, **load_options(args))
    changes = args.dtype or args.dequantize_fp8 or args.expert_storage or args.without_mtp or checkpoint.notes
    if source == target and not changes:
        fix = "leave --to out, or say what is to change: --dequantize-fp8, --expert-storage, --without-mtp, --dtype"
        raise CheckpointError(f"is a {source} checkpoint already", where=str(args.load), fix=fix)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    carry = partial(carry_reference, checkpoint, dtype=dtype)
    results = write_checkpoint(checkpoint, args.save, to=target, dtype=dtype, records=carry, **write_options(args))
    ending = VERIFICATION[results["verified"]]
    for line in padding(checkpoint, "conversion") if isinstance(checkpoint, DistCheckpoint) else ():
        logger.info(line)
    log_left_out(checkpoint)
    what = target if results["expert_storage"] == "separate" else f"{target} (experts {results['expert_storage']})"
    logger.info(f"{args.save}: {results['tensors']} tensors, {results['parameters']:,} parameters as {what}, {ending}")
    return {"load": str(args.load), "save": str(args.save), **results}


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, convert, argv, prog)
