"""Makes the models that clients are tried with: tiny, random, and pruned by this package's own commands.

Each case becomes a directory with ``model/``, an export, ``fp8/``, the same in block-scaled FP8, and what is expected
of the former in ``expected.npz``. The
expectation is transformers' in fp32, without a cache, from the same files (`expected.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 320
# Sizes that clients have kernels for: head sizes of 64, widths that are multiples of 64.
SIZES: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 128,
    "vocab_size": VOCAB,
    "kv_channels": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_moe_experts": 16,
    "moe_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}
NEXT, MOE = "qwen3_next", "qwen3_moe"
_SIZES = {
    NEXT: SIZES,
    MOE: {key: size for key, size in SIZES.items() if not key.startswith("linear_") and "shared" not in key},
}


@dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        name: of its directory, and in the table.
        what: is particular about it.
        model_type: family of the source.
        target: sizes of the recipe.
        method: of reducing experts.
        flags: of ``megatron-slim prune``.
        without_mtp: the export leaves the MTP block out.
    """

    name: str
    what: str
    model_type: str = NEXT
    target: Mapping[str, int] = field(default_factory=dict)
    method: str = "prune"
    flags: tuple[str, ...] = ()
    without_mtp: bool = False

    @property
    def has_mtp(self) -> bool:
        """There is an MTP block in the export."""
        return self.model_type == NEXT and not self.without_mtp


CASES = (
    Case("depth-7", "7 of 8 layers: the last one is Gated DeltaNet", target={"num_layers": 7}),
    Case("experts-9", "9 of 16 experts, 4 layers", target={"num_layers": 4, "num_moe_experts": 9}),
    Case(
        "merged",
        "experts merged 16 to 8, hidden size 128 to 64, 4 layers",
        target={"num_layers": 4, "hidden_size": 64, "num_moe_experts": 8},
        method="partial_preservation",
    ),
    Case(
        "fused",
        "the same sizes, experts in fused tensors",
        target={"num_layers": 4, "num_moe_experts": 8},
        flags=("--expert-storage", "fused"),
    ),
    Case("no-mtp", "exported without its MTP block", target={"num_layers": 4}, without_mtp=True),
    Case("qwen3-moe", "Qwen3-MoE, 3 of 8 layers, 9 of 16 experts", MOE, {"num_layers": 3, "num_moe_experts": 9}),
)


def run(*words: str | Path) -> None:
    """Run a command of this package, quietly.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()[-2000:]}")


def ascii_tokens(tokenizer: Path) -> Tensor:
    """Which tokens are ASCII text, [vocabulary]: llama.cpp gives no probabilities of parts of a character."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    found = torch.zeros(VOCAB, dtype=torch.bool)
    for token, number in vocabulary.items():
        # Of a byte-level vocabulary: the signs for a space and for the end of a line.
        found[number] = token.replace("\u0120", "").replace("\u010a", "").isascii() and number != 0
    return found


def source_tensors(shape: ModelShape, possible: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with which the next token depends mostly on the last one, and partly on those before.

    So a draft of the MTP block, which sees the last token's embedding, is accepted more often than never and less
    often than always; with weights that are random throughout, no draft would be. Only ``possible`` tokens follow.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tensors = random_tensors(shape, seed, torch.float32)
    hidden = shape.hidden_size
    embedding = noise(VOCAB, hidden)
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = 0.1 * (
        0.3 * embedding[torch.randperm(VOCAB, generator=generator)] + noise(VOCAB, hidden)
    )
    tensors["lm_head.weight"][~possible] = 0  # logits of 0 are far below the largest
    for name in tensors:
        if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            tensors[name] *= 4  # routers decide clearly: rounding to bf16 seldom changes the choice
    if "mtp.fc.weight" in tensors:
        eye = torch.eye(hidden)
        tensors["mtp.fc.weight"] = torch.cat([eye, 0.3 * eye], dim=1) + 0.02 * noise(hidden, 2 * hidden)
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def write_tokenizer(work: Path) -> Path:
    """A byte-level BPE tokenizer of `VOCAB` tokens, trained on this project's documentation by the demo's tool."""
    text, tokenizer = work / "text.jsonl", work / "tokenizer"
    pages = sorted((ROOT / "docs").glob("*.md"))
    text.write_text("".join(json.dumps({"text": page.read_text(encoding="utf-8")}) + "\n" for page in pages))
    run(
        ROOT / "examples/slimqwen/train_tokenizer.py",
        "--input",
        text,
        "--output",
        tokenizer,
        "--vocab-size",
        str(VOCAB),
    )
    return tokenizer


def write_source(work: Path, model_type: str) -> Path:
    """A model to prune, with the tokenizer next to its weights."""
    shape = tiny_shape(model_type, **_SIZES[model_type])
    source = work / model_type
    source.mkdir()
    save_file(
        source_tensors(shape, ascii_tokens(work / "tokenizer")), source / "model.safetensors", metadata={"format": "pt"}
    )
    config = tiny_hf_config(shape) | {"bos_token_id": 0, "eos_token_id": 0}
    (source / "config.json").write_text(json.dumps(config, indent=2))
    for file in (work / "tokenizer").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    return source


def write_case(work: Path, case: Case, source: Path) -> Path:
    """Prune, and export what was pruned; returns the directory of the case."""
    directory = work / "cases" / case.name
    directory.mkdir(parents=True)
    recipe = {
        "version": 1,
        "target": dict(case.target),
        "depth": {"method": "last"},
        "experts": {"method": case.method, "importance": "soft_logits"},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pruned = directory / ("pruned" if case.without_mtp else "model")
    run(
        *("-m", "megatron_slim", "prune", "--load", source, "--save", pruned, "--recipe", directory / "recipe.yaml"),
        *("--calibration-data", work / "calibration.npy", *case.flags),
    )
    if case.without_mtp:
        convert = ("-m", "megatron_slim", "convert", "--without-mtp", "--to", "hf")
        run(*convert, "--load", pruned, "--save", directory / "model")
    quantize = ("-m", "megatron_slim", "convert", "--to", "hf", "--quantize", "fp8")
    run(*quantize, "--load", directory / "model", "--save", directory / "fp8")
    return directory


def write_cases(work: Path, cases: tuple[Case, ...] = CASES) -> None:
    """All cases, below ``work / "cases"``; ``work`` is created."""
    work.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(1, VOCAB, (8, 64))
    np.save(work / "calibration.npy", tokens)
    write_tokenizer(work)
    sources = {model_type: write_source(work, model_type) for model_type in {case.model_type for case in cases}}
    for case in cases:
        write_case(work, case, sources[case.model_type])
