"""Decoding without caches, as slow as it is plain: what caches are compared with, over models that we did not write.

Every draft is made from the whole text: the trunk reads it, then the MTP block reads the trunk's hidden states and the
next tokens, and for each further draft it reads all of that again with what it gave last at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from tests.mtp_oracle import load_mtp


class Model(Protocol):
    """Trunk, output layer and MTP block as functions of whole texts; positions count from 0."""

    def trunk(self, tokens: Tensor) -> Tensor:
        """Hidden states [n, H] of tokens [n], after the final norm."""
        ...

    def best(self, hidden: Tensor) -> int:
        """The most probable token after a hidden state [H]."""
        ...

    def mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The block's hidden states [n, H], after its norm, of hidden states [n, H] and next tokens [n]."""
        ...


class Transformers:
    """transformers' model, and its own MTP block."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        # Grouped products of experts, its default, know no fp64.
        options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
        self.block = load_mtp(self.model) if open_checkpoint(directory).shape.mtp_num_layers else None

    def generate(self, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
        """Its own greedy decoding, with its caches."""
        ids = torch.tensor([prompt])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **options
        )
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return tokens

    def trunk(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model.model(tokens[None], use_cache=False).last_hidden_state[0]
        return hidden

    def best(self, hidden: Tensor) -> int:
        return int(self.model.lm_head(hidden).argmax())

    def mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        assert self.block is not None
        positions = torch.arange(len(tokens))[None]
        return self.block.forward_layer(0, hidden[None], positions, None, input_ids=tokens[None])[0]


class Megatron:
    """The modules that training builds, of whichever format of checkpoint."""

    def __init__(self, directory: Path) -> None:
        from megatron_slim.compat import runtime

        runtime.init_single_process()
        from megatron_slim.architecture.hidden_states import HiddenStatesModel
        from megatron_slim.architecture.layer_specs import build_model, transformer_config

        checkpoint = open_checkpoint(directory)
        config = transformer_config(checkpoint.shape, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0)
        self.model: Any = build_model(checkpoint.shape, config, model_class=HiddenStatesModel).eval()
        load_hf_weights(self.model, checkpoint)

    def trunk(self, tokens: Tensor) -> Tensor:
        self.model.runs_mtp = False
        hidden: Tensor = self.model(tokens[None], torch.arange(len(tokens))[None], None)[:, 0]
        return hidden

    def best(self, hidden: Tensor) -> int:
        logits, _ = self.model.output_layer(hidden[None, None])
        return int(logits[0, 0].argmax())

    def mtp(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Megatron's block shifts the tokens itself; what it has at the last position is left out, here and there."""
        length = len(tokens) + 1
        states = torch.cat((hidden, hidden[-1:]))[:, None]
        both = self.model.mtp(
            input_ids=torch.cat((tokens[:1], tokens))[None],
            position_ids=torch.arange(length)[None],
            hidden_states=states,
            attention_mask=None,
            rotary_pos_emb=self.model.rotary_pos_emb(length),
            embedding=self.model.embedding,
        )
        found: Tensor = both.chunk(2)[1][:-1, 0]
        return found


@torch.no_grad()
def greedy(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """A token after the other, everything read again for each."""
    text = list(prompt)
    for _ in range(count):
        text.append(model.best(model.trunk(torch.tensor(text))[-1]))
    return text[len(prompt) :]


@torch.no_grad()
def draft(model: Model, text: Sequence[int], count: int) -> list[int]:
    """What the MTP block expects after a text, whose last token the trunk has not read."""
    tokens = torch.tensor(text[1:])
    hidden, found = model.trunk(torch.tensor(text[:-1])), list[int]()
    for _ in range(count):
        given = model.mtp(hidden, tokens)[-1]
        found.append(model.best(given))
        hidden, tokens = torch.cat((hidden, given[None])), torch.cat((tokens, torch.tensor(found[-1:])))
    return found


def rounds(model: Model, prompt: Sequence[int], tokens: Sequence[int], count: int) -> list[tuple[int, int]]:
    """The rounds of speculative decoding of a text: tokens before the drafts, and accepted drafts."""
    found, before = list[tuple[int, int]](), 1
    while before < len(tokens):
        drafts, wanted = draft(model, [*prompt, *tokens[:before]], count), tokens[before:]
        accepted = next((n for n, (own, true) in enumerate(zip(drafts, wanted, strict=False)) if own != true), None)
        if accepted is None:  # what came after the text is not known
            accepted = min(count, len(wanted))
        found.append((before, accepted))
        before += accepted + 1
    return found
