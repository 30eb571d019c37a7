"""vLLM on a CPU: log-probabilities of the prompts and greedy generation, and drafts of the MTP block.

Gated DeltaNet on a CPU is in bf16 there; Qwen3-MoE is run in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import BF16, DIFFERS, FP32, SAME_LOGITS, Case, Result, both, main


def _start(case: Case, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(case.model),
        dtype="bfloat16" if case.hybrid else "float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        max_logprobs=case.text["vocab_size"],
        **settings,
    )


def _greedy(engine: Any, case: Case, **settings: Any) -> list[Any]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=case.new_tokens, ignore_eos=True, **settings)
    return engine.generate([{"prompt_token_ids": row} for row in case.prompts], wanted, use_tqdm=False)


def _tolerance(case: Case) -> float:
    return BF16 if case.hybrid else FP32


def generate(case: Case) -> Result:
    size = case.text["vocab_size"]
    answers = _greedy(_start(case), case, prompt_logprobs=size)
    logits = case.expected["logits"]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.zeros_like(logs[:, 1:])
    for i, answer in enumerate(answers):
        for j, entry in enumerate(answer.prompt_logprobs[1:]):
            for token in range(size):
                found[i, j, token] = entry[token].logprob
    largest = float(np.abs(found - logs[:, :-1]).max())
    tolerance = _tolerance(case)
    first = (SAME_LOGITS if largest <= tolerance else DIFFERS), f"log-probabilities differ by at most {largest:.1g}"
    return both(first, case.compare_tokens([answer.outputs[0].token_ids for answer in answers], tolerance))


def mtp(case: Case) -> Result:
    engine = _start(case, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    answers = _greedy(engine, case)
    counts = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    rounds, accepted = (counts[f"vllm:spec_decode_num_{what}"] for what in ("draft_tokens", "accepted_tokens"))
    texts = case.compare_tokens([answer.outputs[0].token_ids for answer in answers], _tolerance(case))
    return both(texts, case.compare_drafts(int(rounds), int(accepted)))


def picture(case: Case) -> Result:
    """A text around a picture: log-probabilities are those of this environment's transformers, in fp32."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    seen = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in range(2)]
    images = [Image.fromarray(values) for values in seen]
    text = "The model is <|vision_start|><|image_pad|><|vision_end|> pruned, and one file of weights"
    processor = AutoProcessor.from_pretrained(case.model)
    whole = AutoModelForImageTextToText.from_pretrained(case.model, dtype=torch.float32).eval()
    inputs = [processor(text=[text], images=[image], return_tensors="pt") for image in images]
    with torch.no_grad():
        expected, other = (whole(**each).logits[0, :-1].log_softmax(-1).numpy() for each in inputs)
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=case.text["vocab_size"])
    (answer,) = _start(case).generate([{"prompt": text, "multi_modal_data": {"image": images[0]}}], wanted)
    entries = answer.prompt_logprobs[1:]
    found = np.array([[entry[token].logprob for token in range(expected.shape[1])] for entry in entries])
    largest, effect = (float(np.abs(each - expected).max()) for each in (found, other))
    note = f"log-probabilities differ by at most {largest:.1g}, with another picture by {effect:.2g}"
    return (SAME_LOGITS if largest <= BF16 and effect > 5 * BF16 else DIFFERS), note


main({"generate": generate, "mtp": mtp, "picture": picture})
