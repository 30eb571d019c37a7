"""llm-compressor: quantizes to FP8 and saves; transformers loads the result, and the MTP block is in it unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import DIFFERS, LOADS, Case, Result, main
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def _tensors(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            found |= {name: tensors.get_tensor(name) for name in names if name.startswith(prefix)}
    return found


def fp8(case: Case) -> Result:
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.bfloat16)
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*linear_attn.*"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignore))
    out = case.scratch / "quantized"
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(case.model).save_pretrained(out)
    scales = [name for name in _tensors(out, "model.") if name.endswith("weight_scale")]
    before, after = _tensors(case.model, "mtp."), _tensors(out, "mtp.")
    same = before.keys() == after.keys() and all(torch.equal(after[name], weight) for name, weight in before.items())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor(case.prompts)).logits.float().numpy()
    expected = case.expected["logits"]
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    note = f"{len(scales)} weights in FP8, logits {100 * error:.1f}% off"
    note += f", {len(after)} of {len(before)} weights of MTP as they were"
    return (LOADS if same and scales and error < 0.2 else DIFFERS), note


main({"fp8": fp8})
