"""What is expected of a model: transformers in fp32, without a cache, from the files that the client gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.clients.models import VOCAB
from tests.clients.pictures import picture_arrays
from tests.mtp_oracle import load_mtp, mtp_hidden

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 32


def write_expected(directory: Path, has_mtp: bool, source: Path | None = None) -> None:
    """Write ``expected.npz`` next to ``model/``.

    Its arrays: ``prompts`` [prompts, tokens]; ``logits`` [prompts, tokens, vocabulary], fp32, of the prompts alone;
    ``tokens`` [prompts, new tokens], the greedy continuations; ``margins`` of the same size, logit of the chosen token
    less that of the second; and with an MTP block ``agrees`` [prompts, prompt and new tokens - 2], whether the block's
    draft at position i is the token at i + 2. Of a model that sees pictures they are its language model's alone, in
    ``text/``, and there are those of `picture_arrays`; ``source`` is that model before its pruning.
    """
    own = directory / ("text" if source else "model")
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(1, VOCAB, (PROMPTS, PROMPT_TOKENS), generator=generator)
    with torch.no_grad():
        text, margins = _continue(model, prompts)
        arrays = {
            "prompts": prompts,
            "logits": model(input_ids=prompts).logits,
            "tokens": text[:, PROMPT_TOKENS:],
            "margins": margins,
        }
        if has_mtp:
            arrays["agrees"] = _draft_agrees(model, text)
        if source:
            arrays |= picture_arrays(source, directory / "model")
    np.savez(directory / "expected.npz", **{name: array.numpy() for name, array in arrays.items()})


def _continue(model: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    margins = []
    for _ in range(NEW_TOKENS):
        best = model(input_ids=text).logits[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        text = torch.cat([text, best.indices[:, :1]], dim=1)
    return text, torch.stack(margins, dim=1)


def _draft_agrees(model: Any, text: Tensor) -> Tensor:
    hidden = model.model(input_ids=text).last_hidden_state
    drafted = model.lm_head(mtp_hidden(load_mtp(model), hidden, text)).argmax(-1)
    return drafted[:, :-1] == text[:, 2:]
