"""Greedy decoding: a batch of prompts of any lengths, every one as it would be alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_slim.generation.cache import Cache, join
from megatron_slim.generation.decoder import SEGMENT, Decoder


class Texts:
    """Prompts and what has been generated after them; those that have ended leave the batch.

    Attributes:
        decoder: the model.
        cache: of the sequences that have not ended; it has read all of their tokens but the last.
        drafting: hidden states of the MTP block at the last token read [B, H]; None where nothing drafts.
        active: which of the prompts the sequences are.
        tokens: generated so far, of all prompts.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], limit: int, eos: Collection[int], *, ahead: int = 0
    ) -> None:
        """Read the prompts and generate a token after each.

        Args:
            decoder: the model.
            prompts: token ids, at least one of each.
            limit: tokens to generate of each.
            eos: ids that end a text, which keeps them.
            ahead: tokens beyond the limit that may be read; more than 0 where the MTP block drafts.
        """
        self.decoder, self._limit, self._eos = decoder, limit, eos
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.active = list(range(len(prompts)))
        places = max(map(len, prompts)) + limit + ahead
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(number)
        order = [number for numbers in by_length.values() for number in numbers]
        found = [self._read([prompts[n] for n in numbers], places, ahead > 0) for numbers in by_length.values()]
        caches, first, drafting = zip(*found, strict=True)
        back = sorted(range(len(order)), key=order.__getitem__)
        self.cache = join(caches).select(back)
        self.drafting: Tensor | None = torch.cat(drafting)[back] if ahead else None
        self.extend([[token] for token in torch.cat(first)[back].tolist()])

    def _read(self, prompts: list[Sequence[int]], places: int, drafts: bool) -> tuple[Cache, Tensor, Tensor | None]:
        """Read prompts of one length: their cache, the next token of each, and the MTP block's last hidden states."""
        tokens = torch.tensor(prompts, device=self.decoder.device)
        cache = self.decoder.new_cache(len(prompts), places, drafting=drafts)
        hidden = read_text(self.decoder, tokens, cache)
        first = self.decoder.best(hidden[:, -1])
        if not drafts:
            return cache, first, None
        following = torch.cat((tokens[:, 1:], first[:, None]), 1)
        return cache, first, read_text_mtp(self.decoder, hidden, following, cache)[:, -1]

    @property
    def last(self) -> Tensor:
        """The last token of every sequence [B, 1], which has not been read."""
        return torch.tensor([self.tokens[row][-1:] for row in self.active], device=self.decoder.device)

    def extend(self, found: Sequence[Sequence[int]]) -> None:
        """Add tokens to every sequence, and part with those that end: at an end of text, or where they are complete."""
        kept = []
        for place, (row, new) in enumerate(zip(self.active, found, strict=True)):
            text = self.tokens[row]
            for token in new[: self._limit - len(text)]:
                text.append(token)
                if token in self._eos:
                    break
            if len(text) < self._limit and text[-1] not in self._eos:
                kept.append(place)
        if len(kept) < len(self.active):
            self.active = [self.active[place] for place in kept]
            if kept:
                self.cache = self.cache.select(kept)
                self.drafting = None if self.drafting is None else self.drafting[kept]


def read_text(decoder: Decoder, tokens: Tensor, cache: Cache) -> Tensor:
    """Hidden states [B, T, H] of texts of one length [B, T], a segment at a time."""
    found = []
    for segment in tokens.split(SEGMENT, 1):
        found.append(decoder.read(segment, cache))
        cache.keep(None, segment.shape[1])
    return torch.cat(found, 1)


def read_text_mtp(decoder: Decoder, hidden: Tensor, following: Tensor, cache: Cache) -> Tensor:
    """The MTP block's hidden states [B, T, H], from the trunk's and the token after each [B, T], from position 0 on."""
    assert cache.mtp is not None
    found, start = [], 0
    for states, tokens in zip(hidden.split(SEGMENT, 1), following.split(SEGMENT, 1), strict=True):
        found.append(decoder.read_mtp(states, tokens, [start] * len(tokens), cache.mtp))
        start += tokens.shape[1]
    return torch.cat(found, 1)


def greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos: Collection[int] = ()
) -> list[list[int]]:
    """The most probable token after the other.

    Args:
        decoder: the model.
        prompts: token ids of each, at least one.
        max_new_tokens: tokens to generate.
        eos: ids that a text ends with; with none of them it has ``max_new_tokens`` tokens.

    Returns:
        What follows each prompt.
    """
    with decoder.running(len(prompts)):
        texts = Texts(decoder, prompts, max_new_tokens, eos)
        while texts.active:
            hidden = decoder.read(texts.last, texts.cache)
            texts.cache.keep(None, 1)
            texts.extend(decoder.best(hidden).tolist())
    return texts.tokens
