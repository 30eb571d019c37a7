#!/usr/bin/env python3
"""Convert a checkpoint between Hugging Face safetensors and Megatron's torch_dist, every weight bit for bit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import add_load_arguments, run_tool, say, tool_parser

DTYPES = ("bfloat16", "float16", "float32")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__)
    add_load_arguments(parser, "convert")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="new directory for the result")
    parser.add_argument("--to", choices=("hf", "torch_dist"), help="format of the result; the other one if not given")
    parser.add_argument("--dtype", choices=DTYPES, help="cast every tensor; if not given, each keeps its type")
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back and compare it")
    return parser.parse_args()


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Detect the direction, convert, say what was done."""
    from megatron_slim.errors import CheckpointError
    from megatron_slim.files import refuse_existing

    refuse_existing(args.save)
    import torch

    from megatron_slim.checkpoint.convert import hf_to_torch_dist, torch_dist_to_hf
    from megatron_slim.checkpoint.distributed import is_torch_dist

    source = "torch_dist" if is_torch_dist(args.load) else "hf"
    target = args.to or ("hf" if source == "torch_dist" else "torch_dist")
    if source == target:
        raise CheckpointError(f"is a {source} checkpoint already", where=str(args.load), fix="leave --to out")
    if source == "hf" and args.hf_config is not None:
        raise CheckpointError("is no torch_dist checkpoint", where=str(args.load), fix="leave --hf-config out")
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype) if args.dtype else None}
    options["verify"] = not args.no_verify
    if source == "torch_dist":
        results = torch_dist_to_hf(args.load, args.save, hf_config=args.hf_config, **options)
    else:
        results = hf_to_torch_dist(args.load, args.save, **options)
    ending = "read back and verified" if results["verified"] else "NOT verified (--no-verify)"
    say(f"{args.save}: {results['tensors']} tensors, {results['parameters']:,} parameters as {target}, {ending}")
    return {"load": str(args.load), "save": str(args.save), **results}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: convert(arguments), as_json=arguments.json)
