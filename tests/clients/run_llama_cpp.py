"""llama.cpp: its converter to GGUF in fp32, and its runtime (xllamacpp), plain and with drafts of the MTP block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from common import DIFFERS, LOADS, Case, Result, both, main

# The converter recognises a tokenizer by the hash of what it makes of a text, so it knows published ones alone. A tiny
# one is none of them; it has GPT-2's rules.
CONVERT = """
import runpy, sys
script = sys.argv.pop(1)
sys.path.insert(0, script.rpartition("/")[0])
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def to_gguf(case: Case, *flags: str) -> Path:
    (script,) = Path(sys.prefix).glob("src/*/vendor/llama.cpp/convert_hf_to_gguf.py")
    file = case.scratch / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(script), str(case.model), "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run([*command, *flags], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"converter: {lines[-1]}")
    return file


def complete(file: Path, case: Case, **settings: Any) -> list[dict[str, Any]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
    params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # the default is fp16
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 10  # answers have the ids of tokens
    if settings.get("mtp"):
        params.load_mtp = True
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = 1
        params.speculative.draft.n_min = 0
        params.speculative.draft.p_min = 0.0
    server = xllamacpp.Server(params)
    answers = []
    for row in case.prompts:
        request = {"prompt": row, "max_tokens": case.new_tokens, "temperature": 0.0, "return_tokens": True}
        answer = server.handle_completions(request | {"n_probs": 2, "cache_prompt": False, "ignore_eos": True})
        if "__verbose" not in answer:
            raise RuntimeError(f"runtime: {answer}")
        answers.append(answer["__verbose"])
    return answers


def margins(answers: list[dict[str, Any]]) -> list[list[float]]:
    """Log-probability of the chosen token less that of the second, of every token."""
    pairs = [[entry["top_logprobs"] for entry in answer["completion_probabilities"]] for answer in answers]
    return [[first["logprob"] - second["logprob"] for first, second in row] for row in pairs]


def convert(case: Case) -> Result:
    has_mtp = any(case.text.get(key) for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    flags = ("--no-mtp",) if case.hybrid and not has_mtp else ()
    answers = complete(to_gguf(case, *flags), case)
    result, note = both(
        case.compare_margins(margins(answers)), case.compare_tokens([answer["tokens"] for answer in answers])
    )
    return result, note + ("; converted with --no-mtp" if flags else "")


def mtp(case: Case) -> Result:
    """With Qwen3-Next, a rejected draft returns it to a copy of the recurrent state; the next token has no draft."""
    answers = complete(to_gguf(case), case, mtp=True)
    timings = [answer["timings"] for answer in answers]
    rounds, accepted = (sum(each.get(key, 0) for each in timings) for key in ("draft_n", "draft_n_accepted"))
    texts = case.compare_tokens([answer["tokens"] for answer in answers])
    return both(texts, case.compare_drafts(rounds, accepted, 2 if case.config["model_type"] == "qwen3_next" else 1))


def mmproj(case: Case) -> Result:
    """Its vision tower as a file of its own, whose last layer writes into the hidden dimensions that are left."""
    sys.path.insert(0, str(next(Path(sys.prefix).glob("src/*/vendor/llama.cpp/gguf-py"))))
    import gguf

    file = to_gguf(case, "--mmproj")
    shapes = [tuple(int(size) for size in tensor.shape) for tensor in gguf.GGUFReader(file).tensors]
    rows = [shape for shape in shapes if shape[-1] == case.text["hidden_size"] and len(shape) == 2]
    return (LOADS if rows else DIFFERS), f"{len(shapes)} tensors, of which one writes {case.text['hidden_size']} rows"


main({"convert": convert, "mtp": mtp, "mmproj": mmproj})
