"""transformers: logits, generation with its cache, the MTP block on its own, and loading and saving."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import DIFFERS, LOADS, SAME_TOKENS, Case, Result, both, main
from transformers import AutoModelForCausalLM


def load(case: Case) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise RuntimeError(f"{len(missing)} weights not found, such as {missing[0]}")
    return model.eval()


def _continue(model: Any, prompts: Any, case: Case, **settings: Any) -> list[list[int]]:
    """Greedy continuations with the model's cache."""
    length = {"min_new_tokens": case.new_tokens, "max_new_tokens": case.new_tokens}
    mask = torch.ones_like(prompts)
    text = model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **length, **settings)
    return text[:, prompts.shape[1] :].tolist()


def generate(case: Case) -> Result:
    model, prompts = load(case), torch.tensor(case.prompts)
    with torch.no_grad():
        logits = model(input_ids=prompts).logits
        text = _continue(model, prompts, case)
    return both(case.compare_logits(logits), case.compare_tokens(text))


def mtp(case: Case) -> Result:
    """Its MTP block, which it loads strictly, drafts at every position of the texts.

    Its own generation has no drafts for models with a recurrent state.
    """
    from transformers.modeling_layers import MtpModel

    model = load(case)
    block = MtpModel.from_pretrained(model).eval()
    text = torch.tensor(np.concatenate([case.expected["prompts"], case.expected["tokens"]], axis=1))
    with torch.no_grad():
        hidden = model.model(input_ids=text).last_hidden_state[:, :-1]
        positions = torch.arange(hidden.shape[1])[None]
        drafted = model.lm_head(block.forward_layer(0, hidden, positions, None, input_ids=text[:, 1:])).argmax(-1)
    agrees = (drafted[:, :-1] == text[:, 2:]).numpy()
    same = int((agrees == case.expected["agrees"]).sum())
    note = f"MtpModel: {same} of {agrees.size} drafts as expected, {int(agrees.sum())} of them right"
    return (SAME_TOKENS if same == agrees.size else DIFFERS), note


def save(case: Case) -> Result:
    """The saved directory is read by this package afterwards."""
    load(case).to(torch.bfloat16).save_pretrained(case.scratch / "saved")
    return LOADS, "saved"


main({"generate": generate, "mtp": mtp, "save": save})
