"""Loss and perplexity of a Hugging Face or torch_dist checkpoint, main head and MTP; acceptance of MTP drafts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_slim.cli.tool import run_command
from megatron_slim.command_line import add_load_arguments, load_options, not_negative, positive
from megatron_slim.errors import DataError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = (
        "With --json: loss (nats per token), perplexity, tokens (predicted by the main head), mtp_loss (a list, one "
        "number per MTP depth, depth 1 first; empty without MTP), samples, seq_length, dtype. With --acceptance also "
        "acceptance, and teacher_acceptance: acc (a list, share of drafts whose first 1, 2, ... tokens were all "
        "accepted), mean_accepted_length, drafts, rounds, tokens, and per_position, the same over all positions."
    )
    add_load_arguments(parser, "evaluate")
    parser.add_argument(
        "--data",
        type=Path,
        help="prefix of a Megatron .bin/.idx pair, or a .npy integer matrix [samples, sequence], used as it is; not "
        "needed with --acceptance",
    )
    parser.add_argument("--seq-length", type=positive, metavar="N", help="tokens per sample; needed with .bin/.idx")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="samples, drawn at random (default: all)")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="seed of the random choice")
    parser.add_argument(
        "--micro-batch-size", type=positive, default=1, metavar="N", help="samples, or prompts, in one forward pass"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="keep the losses of the first tokens in slim_reference.json next to the checkpoint: training compares its "
        "teacher with them before the first step",
    )
    group = parser.add_argument_group("acceptance of MTP drafts, by greedy speculative decoding")
    group.add_argument(
        "--acceptance",
        type=Path,
        metavar="PROMPTS",
        help='measure it on these prompts: JSON lines with "text" or "tokens" (ids), or a .npy matrix of ids',
    )
    group.add_argument("--teacher", type=Path, metavar="DIR", help="a checkpoint to compare with, on the same prompts")
    group.add_argument("--draft-tokens", type=positive, default=5, metavar="N", help="tokens drafted in a round")
    group.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="tokens after each prompt")
    group.add_argument("--num-prompts", type=positive, metavar="N", help="prompts, the first ones (default: all)")
    group.add_argument("--prompt-tokens", type=positive, metavar="N", help="tokens of each prompt (default: all)")
    group.add_argument("--stop-at-eos", action="store_true", help="end texts at the eos_token_id of config.json")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, say the result."""
    if args.data is None and args.acceptance is None:
        raise DataError("neither --data nor --acceptance is given", fix="name samples, or a file of prompts")
    if args.teacher is not None and args.acceptance is None:
        raise DataError("--teacher is given without --acceptance", fix="evaluate it by itself with --load")
    found = _evaluate_acceptance(args) if args.acceptance is not None else {}
    return (_evaluate_losses(args) if args.data is not None else {"load": str(args.load)}) | found


def _evaluate_acceptance(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint
    from megatron_slim.evaluation.acceptance import Acceptance, acceptance_of

    models = [open_checkpoint(args.load, **load_options(args))]
    if args.teacher is not None:
        models.append(open_checkpoint(args.teacher, dequantize_fp8=args.dequantize_fp8))
    for model in models:
        log_left_out(model)
    found = acceptance_of(
        models[0],
        models[1] if len(models) > 1 else None,
        args.acceptance,
        number=args.num_prompts,
        length=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        draft_tokens=args.draft_tokens,
        micro_batch_size=args.micro_batch_size,
        dtype=_dtype(args),
        stop_at_eos=args.stop_at_eos,
    )

    def shown(name: str, result: Acceptance) -> None:
        for kind, rates in (("round", result.per_round), ("position", result.per_position)):
            acc = ", ".join(f"acc_{k} {share:.3f}" for k, share in enumerate(rates.acc))
            mean = f"mean accepted length {rates.mean_accepted_length:.3f}"
            logger.info(f"{name} per {kind}: {mean}, {acc} over {rates.drafts} drafts")

    results: dict[str, Any] = {}
    for key, result in zip(("acceptance", "teacher_acceptance"), found, strict=True):
        if result is not None:
            shown(key.replace("_", " "), result)
            results[key] = result.to_dict()
    return results


def _dtype(args: argparse.Namespace) -> torch.dtype:
    import torch

    from megatron_slim.device import default_dtype

    return getattr(torch, DTYPES[args.dtype]) if args.dtype else default_dtype()


def _evaluate_losses(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_slim.checkpoint.records import REFERENCE
    from megatron_slim.evaluation.perplexity import evaluate_checkpoint

    results = evaluate_checkpoint(
        args.load,
        args.data,
        seq_length=args.seq_length,
        num_samples=args.num_samples,
        micro_batch_size=args.micro_batch_size,
        dtype=_dtype(args),
        seed=args.seed,
        record=args.record,
        **load_options(args),
    )
    mtp = "".join(f", mtp {depth} {loss:.4f}" for depth, loss in enumerate(results["mtp_loss"], start=1))
    logger.info(
        f"loss {results['loss']:.4f}, perplexity {results['perplexity']:.3f}{mtp} over {results['tokens']} tokens"
    )
    if args.record:
        logger.info(f"losses of the first tokens written to {args.load / REFERENCE}")
    return results


def main(argv: Sequence[str], prog: str) -> None:
    """Run the command."""
    run_command(__doc__ or "", add_arguments, evaluate, argv, prog)
