"""transformers: logits, generation with its cache, the MTP block on its own, and loading and saving."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from common import DIFFERS, FP32, LOADS, SAME_LOGITS, SAME_TOKENS, Case, Result, both, main


def load(case: Case) -> Any:
    kind = getattr(transformers, case.config["architectures"][0])
    model, report = kind.from_pretrained(case.model, dtype=torch.float32, output_loading_info=True)
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
        hidden = model.get_decoder()(input_ids=text).last_hidden_state[:, :-1]
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


def picture(case: Case) -> Result:
    """What its vision tower makes of a picture enters the language model, and changes what comes after it."""
    model = load(case)
    pixels, grid = (torch.from_numpy(case.expected[name]) for name in ("pixels", "grid"))
    with torch.no_grad():
        seen = model.model.visual(pixels, grid_thw=grid).pooler_output.numpy()
        image, start, end = (case.config[f"{name}_token_id"] for name in ("image", "vision_start", "vision_end"))
        before, after = case.prompts[0][:4], case.prompts[0][4:]
        ids = torch.tensor([[*before, start, *[image] * len(seen), end, *after]])
        both_pictures = [
            model(
                input_ids=ids, pixel_values=values, image_grid_thw=grid, mm_token_type_ids=(ids == image).int()
            ).logits[0]
            for values in (pixels, pixels.flip(0))
        ]
    changes = (both_pictures[0] - both_pictures[1]).abs().amax(-1)
    wrong = float(np.abs(seen - case.expected["features"]).max())
    largest = float(changes[len(before) :].max())
    note = f"features differ by at most {wrong:.1g} from the model's before its pruning"
    right = wrong <= FP32 and float(changes[: len(before)].max()) <= FP32 and largest > 100 * FP32
    return (SAME_LOGITS if right else DIFFERS), f"{note}; another picture changes logits by {largest:.2g}"


main({"generate": generate, "mtp": mtp, "save": save, "picture": picture})
