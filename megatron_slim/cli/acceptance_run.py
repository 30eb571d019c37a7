"""Acceptance of MTP drafts, as `evaluate` measures it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_slim.aliases import JsonObject
from megatron_slim.cli.evaluation_extras import dtype_of
from megatron_slim.command_line import positive
from megatron_slim.recipe_run import DRAFT_TOKENS, MAX_NEW_TOKENS

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.evaluation.acceptance import Acceptance
    from megatron_slim.evaluation.prompts import Prompts
    from megatron_slim.evaluation.teacher import Teacher

logger = logging.getLogger(__name__)


def add_acceptance_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments; ``--teacher`` is that of the comparison."""
    group = parser.add_argument_group(
        "acceptance of MTP drafts", "by greedy speculative decoding, of --teacher too where it is given"
    )
    group.add_argument(
        "--acceptance",
        type=Path,
        metavar="PROMPTS",
        help='measure it on these prompts: JSON lines with "text" or "tokens" (ids), or a .npy matrix of ids',
    )
    group.add_argument(
        "--draft-tokens", type=positive, metavar="N", help=f"tokens drafted in a round (default: {DRAFT_TOKENS})"
    )
    group.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help=f"tokens after each prompt (default: {MAX_NEW_TOKENS})"
    )
    group.add_argument("--num-prompts", type=positive, metavar="N", help="prompts, the first ones (default: all)")
    group.add_argument("--prompt-tokens", type=positive, metavar="N", help="tokens of each prompt (default: all)")
    group.add_argument("--stop-at-eos", action="store_true", help="end texts at the eos_token_id of config.json")


def prompts_of(args: argparse.Namespace, checkpoint: Checkpoint, teacher: Teacher | None) -> Prompts:
    """What acceptance will be measured on; raises what forbids it, before anything is measured."""
    from megatron_slim.evaluation.acceptance import checked_prompts

    return checked_prompts(
        checkpoint, teacher, args.acceptance, number=args.num_prompts, length=args.prompt_tokens, **_sizes(args)
    )


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    return {
        "max_new_tokens": args.max_new_tokens or MAX_NEW_TOKENS,
        "draft_tokens": args.draft_tokens or DRAFT_TOKENS,
    }


def run_acceptance(
    args: argparse.Namespace, checkpoint: Checkpoint, teacher: Teacher | None, prompts: Prompts
) -> JsonObject:
    """Measure a checkpoint, and the teacher; say and give what was found."""
    from megatron_slim.compat.runtime import default_dtype
    from megatron_slim.evaluation.acceptance import acceptance_of

    found = acceptance_of(
        checkpoint,
        teacher,
        prompts,
        **_sizes(args),
        micro_batch_size=args.micro_batch_size,
        dtype=dtype_of(args) or default_dtype(),
        stop_at_eos=args.stop_at_eos,
    )
    results: JsonObject = {}
    for key, result in zip(("acceptance", "teacher_acceptance"), found, strict=True):
        if result is not None:
            _say(key.replace("_", " "), result)
            results[key] = result.to_dict()
    return results


def _say(name: str, result: Acceptance) -> None:
    for kind, rates in (("round", result.per_round), ("position", result.per_position)):
        acc = ", ".join(f"acc_{k} {share:.3f}" for k, share in enumerate(rates.acc))
        mean = f"mean accepted length {rates.mean_accepted_length:.3f}"
        logger.info(f"{name} per {kind}: {mean}, {acc} over {rates.drafts} drafts")
