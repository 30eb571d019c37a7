"""Convert a checkpoint between Hugging Face safetensors and Megatron's torch_dist, every weight bit for bit.

With --quantize fp8 write it in block-scaled FP8.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_slim.aliases import JsonObject
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
        "--quantize, --expert-storage, --without-mtp or --dtype",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="cast every tensor of the language model (default: each keeps its type)"
    )
    parser.add_argument(
        "--quantize",
        choices=("fp8",),
        help="write the linear layers in block-scaled FP8, as the published FP8 checkpoints have them (to hf)",
    )
    add_write_arguments(parser)


def convert(args: argparse.Namespace) -> JsonObject:
    """Detect the direction, convert, say what was done."""
    from megatron_slim.errors import CheckpointError
    from megatron_slim.files import refuse_existing

    refuse_existing(args.save)
    import torch

    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint, write_checkpoint
    from megatron_slim.checkpoint.huggingface_files import is_fp8
    from megatron_slim.checkpoint.iterations import is_torch_dist
    from megatron_slim.checkpoint.reference import carry_records
    from megatron_slim.checkpoint.remarks import remarks

    source = "torch_dist" if is_torch_dist(args.load) else "hf"
    target = args.to or ("hf" if source == "torch_dist" or args.quantize else "torch_dist")
    if args.quantize and source == "hf" and (args.dequantize_fp8 or is_fp8(args.load)):
        raise CheckpointError("is in FP8 already", where=str(args.load), fix="use it as it is, or its source in bf16")
    checkpoint = open_checkpoint(args.load, **load_options(args))
    changes = (args.dtype, args.dequantize_fp8, args.quantize, args.expert_storage, args.without_mtp, checkpoint.notes)
    if source == target and not any(changes):
        flags = "--dequantize-fp8, --quantize, --expert-storage, --without-mtp, --dtype"
        fix = f"leave --to out, or say what is to change: {flags}"
        raise CheckpointError(f"is a {source} checkpoint already", where=str(args.load), fix=fix)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    carry = partial(carry_records, checkpoint, dtype=dtype, quantized=bool(args.quantize))
    options = {"dtype": dtype, "quantize": args.quantize, "records": carry, **write_options(args)}
    results = write_checkpoint(checkpoint, args.save, to=target, **options)
    ending = VERIFICATION[results["verified"]]
    for line in remarks(checkpoint, torch.bfloat16 if args.quantize else None, "conversion"):
        logger.info(line)
    log_left_out(checkpoint)
    what = target if results["expert_storage"] == "separate" else f"{target} (experts {results['expert_storage']})"
    logger.info(f"{args.save}: {results['tensors']} tensors, {results['parameters']:,} parameters as {what}, {ending}")
    if "quantization" in results:
        _log_quantization(results["quantization"])
    return {"load": str(args.load), "save": str(args.save), **results}


def _log_quantization(found: JsonObject) -> None:
    """The error, and what clients do not load."""
    worst = found["worst"]
    kinds = found["relative_rms"].values()
    logger.info(
        f"{found['tensors']} tensors in FP8, relative RMS error {min(kinds):.2%} to {max(kinds):.2%} by kind of layer, "
        f"at worst {worst['relative_rms']:.2%} ({worst['tensor']})"
    )
    if count := found["partial_blocks"]:
        logger.warning(
            f"{count} of {found['tensors']} tensors in FP8 are not made of whole blocks of 128 x 128: "
            "clients may refuse them or read them wrong (docs/checkpoints.md)"
        )


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, convert, argv, prog)
