"""How many of an MTP block's drafts the trunk accepts, by greedy speculative decoding.

``acc[k]`` is the share of drafts whose first k + 1 tokens were all accepted, and the mean accepted length is 1 +
accepted tokens / drafts: the definitions of vLLM's counters, and of SlimQwen. Drafts count where all of their positions
lie within the text.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_slim.architecture.hf_config import language_config
from megatron_slim.checkpoint.convert import Checkpoint
from megatron_slim.checkpoint.remarks import remarks
from megatron_slim.errors import CheckpointError, DataError
from megatron_slim.evaluation.prompts import Prompts, check_prompts, read_prompts
from megatron_slim.generation.decoder import Decoder
from megatron_slim.generation.speculative import Drafted, count_accepted, draft_everywhere, speculative
from megatron_slim.reporting import progress

if TYPE_CHECKING:
    from megatron_slim.evaluation.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """Acceptance of some drafts.

    Attributes:
        acc: share of drafts whose first k + 1 tokens were all accepted, k from 0.
        mean_accepted_length: tokens of a pass through the trunk: 1 + accepted tokens / drafts.
        drafts: how many there were.
    """

    acc: tuple[float, ...]
    mean_accepted_length: float
    drafts: int

    @classmethod
    def of(cls, accepted: Sequence[int], draft_tokens: int) -> Rates:
        """Those of drafts of which so many tokens were accepted each."""
        number = len(accepted)
        acc = (sum(each > k for each in accepted) / number for k in range(draft_tokens))
        return cls(tuple(acc), 1 + sum(accepted) / number, number)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of a model's own drafts in texts that it generated.

    Attributes:
        per_round: over the rounds of speculative decoding, as engines count. A rejected draft is followed by a round
            that starts right there, so hard positions weigh more.
        per_position: over all positions of the texts, each drafted at once.
        rounds: passes through the trunk after the prompts, those included whose drafts reach over the end.
        tokens: how many were generated.
    """

    per_round: Rates
    per_position: Rates
    rounds: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "acc": list(self.per_round.acc),
            "mean_accepted_length": self.per_round.mean_accepted_length,
            "drafts": self.per_round.drafts,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "per_position": {
                "acc": list(self.per_position.acc),
                "mean_accepted_length": self.per_position.mean_accepted_length,
                "drafts": self.per_position.drafts,
            },
        }


def check_acceptance(
    checkpoint: Checkpoint, prompts: Prompts, *, max_new_tokens: int, draft_tokens: int, where: str = "prompts"
) -> None:
    """Refuse what acceptance cannot be measured with.

    Raises:
        CheckpointError: the model has no MTP block.
        DataError: the prompts do not suit it, or no draft fits into the texts.
    """
    if not checkpoint.shape.mtp_num_layers:
        raise CheckpointError("has no MTP block, so nothing drafts", where=str(checkpoint.path))
    if draft_tokens < 1:
        raise DataError(f"--draft-tokens {draft_tokens} is not a positive number")
    if max_new_tokens <= draft_tokens:
        raise DataError(
            f"no draft of {draft_tokens} tokens fits into --max-new-tokens {max_new_tokens}",
            fix=f"generate {draft_tokens + 1} or more",
        )
    check_prompts(prompts, checkpoint.shape, max_new_tokens=max_new_tokens, where=where)


def measure_acceptance(
    checkpoint: Checkpoint,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    draft_tokens: int,
    micro_batch_size: int,
    dtype: torch.dtype,
    stop_at_eos: bool = False,
) -> Acceptance:
    """Generate from prompts and count what was accepted; the whole model is in memory.

    Args:
        checkpoint: a model with an MTP block.
        prompts: token ids of each.
        max_new_tokens: tokens to generate after each.
        draft_tokens: of a round.
        micro_batch_size: prompts that are continued at the same time.
        dtype: of weights and activations.
        stop_at_eos: end texts at config.json's ``eos_token_id``.

    Raises:
        CheckpointError: texts should end at an eos, and there is none.
        DataError: all texts ended before a draft fitted.
    """
    eos = eos_ids(checkpoint) if stop_at_eos else ()
    for line in remarks(checkpoint, dtype, "evaluation"):
        logger.info(line)
    decoder = Decoder(checkpoint, dtype)
    texts: list[Drafted] = []
    positions: list[int] = []
    for batch in progress(list(itertools.batched(prompts, micro_batch_size)), "decoding"):
        found = speculative(decoder, batch, max_new_tokens=max_new_tokens, draft_tokens=draft_tokens, eos=eos)
        texts += found
        for prompt, text in zip(batch, found, strict=True):
            positions += accepted_everywhere(decoder, prompt, text.tokens, draft_tokens)
    counted = [each for text in texts for each in text.accepted(draft_tokens)]
    if not counted or not positions:
        raise DataError(
            f"all texts ended before a draft of {draft_tokens} tokens fitted", fix="leave --stop-at-eos out"
        )
    return Acceptance(
        per_round=Rates.of(counted, draft_tokens),
        per_position=Rates.of(positions, draft_tokens),
        rounds=sum(len(text.rounds) for text in texts),
        tokens=sum(len(text.tokens) for text in texts),
    )


def accepted_everywhere(decoder: Decoder, prompt: Sequence[int], tokens: Sequence[int], draft_tokens: int) -> list[int]:
    """Of a draft at every position of a text, how many tokens come before the first that differs from the text."""
    if len(tokens) <= draft_tokens:
        return []
    drafts = draft_everywhere(decoder, prompt, tokens, draft_tokens)
    wanted = torch.tensor(tokens, device=drafts.device)[1:].unfold(0, draft_tokens, 1)
    accepted: list[int] = count_accepted(drafts, wanted).tolist()
    return accepted


def eos_ids(checkpoint: Checkpoint) -> Collection[int]:
    """Ids that end a text, by config.json.

    Raises:
        CheckpointError: it names none.
    """
    named = language_config(checkpoint.config).get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    if not ids or any(type(each) is not int for each in ids):
        raise CheckpointError(
            f"its config.json has eos_token_id {named!r}", where=str(checkpoint.path), fix="leave --stop-at-eos out"
        )
    return frozenset(ids)


def checked_prompts(
    checkpoint: Checkpoint,
    teacher: Teacher | None,
    prompts: Path | Prompts,
    *,
    number: int | None,
    length: int | None,
    **options: int,
) -> Prompts:
    """The prompts that acceptance is measured on, once it is clear that it can be; arguments as `acceptance_of`.

    Raises:
        CheckpointError: a model has no MTP block, or the vocabularies differ.
        DataError: the prompts do not suit a model.
    """
    where = str(prompts) if isinstance(prompts, Path) else "prompts"
    if isinstance(prompts, Path):
        ids = read_prompts(prompts, checkpoint.config_path, number=number, length=length)
    else:
        ids = [[int(token) for token in prompt] for prompt in prompts]
    if teacher is not None:
        teacher.check_vocabulary(checkpoint.shape)
    for model in [checkpoint] if teacher is None else [checkpoint, teacher.checkpoint]:
        check_acceptance(model, ids, where=where, **options)
    return ids


def acceptance_of(
    checkpoint: Checkpoint,
    teacher: Teacher | None,
    prompts: Path | Prompts,
    *,
    number: int | None = None,
    length: int | None = None,
    **options: Any,
) -> tuple[Acceptance, Acceptance | None]:
    """Acceptance of a model, and of its teacher where there is one, on the same prompts; everything is checked first.

    Args:
        checkpoint: the model, whose tokenizer reads the prompts.
        teacher: another model of the same vocabulary, which measures itself once for the same prompts.
        prompts: a file of `read_prompts`, or token ids.
        number: prompts to take of a file; None is all.
        length: tokens to take of each of them; None is all.
        options: of `measure_acceptance`.
    """
    if options["micro_batch_size"] < 1:
        raise DataError(f"--micro-batch-size {options['micro_batch_size']} is not a positive number")
    checks = {name: options[name] for name in ("max_new_tokens", "draft_tokens")}
    ids = checked_prompts(checkpoint, teacher, prompts, number=number, length=length, **checks)
    return measure_acceptance(checkpoint, ids, **options), teacher.acceptance(ids, **options) if teacher else None
