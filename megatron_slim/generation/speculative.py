"""Speculative decoding with the MTP block: it drafts, the trunk verifies; greedy, as vLLM and SGLang do it.

With the trunk's hidden state h_i at position i, after the final norm, and the token t_{i+1} that follows from it, the
block at position j reads h_j and the embedding of t_{j+1}. What it gives after its norm predicts t_{j+2} through the
trunk's output layer. Further drafts read, in place of h, what the block itself gave one position before. The trunk then
reads t_{i+1} and all drafts at once; those that it would have generated are accepted, and its own token follows them.
The block reads the accepted positions again, with the trunk's hidden states.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_slim.generation.cache import KeyValueCache
from megatron_slim.generation.decoder import SEGMENT, Decoder
from megatron_slim.generation.greedy import Texts, read_text, read_text_mtp


@dataclass
class Drafted:
    """What was generated after a prompt.

    Attributes:
        tokens: the text.
        rounds: of every round, how many tokens there were before its drafts, and how many drafts were accepted.
    """

    tokens: list[int]
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def accepted(self, draft_tokens: int) -> list[int]:
        """Accepted drafts of the rounds whose drafts all lie within the text."""
        return [accepted for before, accepted in self.rounds if before + draft_tokens <= len(self.tokens)]


def draft(decoder: Decoder, hidden: Tensor, starts: Sequence[int], cache: KeyValueCache, count: int) -> Tensor:
    """Tokens that the MTP block expects [B, count].

    Args:
        decoder: the model.
        hidden: of the block at each sequence's last position [B, H].
        starts: the positions after that.
        cache: of the block; what is beyond those positions is overwritten.
        count: how many tokens.
    """
    hidden = hidden[:, None]
    found = [decoder.best(hidden)]
    for ahead in range(count - 1):
        hidden = decoder.read_mtp(hidden, found[-1], [start + ahead for start in starts], cache)
        found.append(decoder.best(hidden))
    return torch.cat(found, 1)


def count_accepted(drafts: Tensor, wanted: Tensor) -> Tensor:
    """How many tokens of each draft [.., k] come before the first that differs from what is wanted [.., k]."""
    return (drafts == wanted).cumprod(-1).sum(-1)


def speculative(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_tokens: int,
    eos: Collection[int] = (),
) -> list[Drafted]:
    """The texts of `greedy.greedy`, several tokens per pass through the trunk.

    Args:
        decoder: a model with an MTP block.
        prompts: token ids of each, at least one.
        max_new_tokens: tokens to generate.
        draft_tokens: tokens that are drafted in each round.
        eos: ids that a text ends with; with none of them it has ``max_new_tokens`` tokens.
    """
    rounds: list[list[tuple[int, int]]] = [[] for _ in prompts]
    with decoder.running(len(prompts)):
        texts = Texts(decoder, prompts, max_new_tokens, eos, ahead=draft_tokens + 1)
        while texts.active:
            active, before = texts.active, [len(text) for text in texts.tokens]
            for row, accepted in zip(active, _round(texts, draft_tokens), strict=True):
                rounds[row].append((before[row], accepted))
    return [Drafted(tokens, found) for tokens, found in zip(texts.tokens, rounds, strict=True)]


def _round(texts: Texts, count: int) -> list[int]:
    """Draft, verify and add what is accepted to each text; how many drafts that were."""
    decoder, cache = texts.decoder, texts.cache
    assert cache.mtp is not None and texts.drafting is not None
    starts = list(cache.lengths)
    drafts = draft(decoder, texts.drafting, starts, cache.mtp, count)
    hidden = decoder.read(torch.cat((texts.last, drafts), 1), cache)
    found = decoder.best(hidden)
    accepted = count_accepted(drafts, found[:, :-1])
    counts: list[int] = accepted.tolist()
    cache.keep([each + 1 for each in counts], count + 1)
    # Of other sequences positions behind the accepted ones are read too; later drafts and rounds overwrite them.
    width = max(counts) + 1
    reread = decoder.read_mtp(hidden[:, :width], found[:, :width], starts, cache.mtp)
    texts.drafting = reread[torch.arange(len(counts), device=decoder.device), accepted]
    texts.extend([row[: more + 1] for row, more in zip(found.tolist(), counts, strict=True)])
    return counts


def draft_everywhere(decoder: Decoder, prompt: Sequence[int], tokens: Sequence[int], draft_tokens: int) -> Tensor:
    """What the MTP block drafts after each of the tokens that follow a prompt, the text before given as it is.

    Returns:
        [len(tokens) - draft_tokens, draft_tokens]: row n has drafts for ``tokens[n + 1:]``, as many as fit.
    """
    with decoder.running(1):
        return _draft_everywhere(decoder, prompt, tokens, draft_tokens)


def _draft_everywhere(decoder: Decoder, prompt: Sequence[int], tokens: Sequence[int], draft_tokens: int) -> Tensor:
    text = torch.tensor([[*prompt, *tokens]], device=decoder.device)
    length, first = text.shape[1] - 1, len(prompt) - 1
    cache = decoder.new_cache(1, length + draft_tokens, drafting=True)
    assert cache.mtp is not None
    hidden = read_text(decoder, text[:, :-1], cache)
    states = read_text_mtp(decoder, hidden, text[:, 1:], cache)[0]
    found = [torch.empty(0, draft_tokens, dtype=torch.int64, device=decoder.device)]
    for at in torch.arange(first, length - draft_tokens, device=decoder.device).split(SEGMENT):
        # Each position with keys and values of its own, in which what follows it is overwritten before it is read.
        copies = cache.mtp.select(torch.zeros_like(at))
        found.append(draft(decoder, states[at], (at + 1).tolist(), copies, draft_tokens))
    return torch.cat(found)
