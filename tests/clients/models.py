"""Makes the models that clients are tried with: tiny, random, and pruned by this package's own commands.

Each case becomes a directory with ``model/``, an export, ``fp8/``, the same in block-scaled FP8, and what is expected
of the former in ``expected.npz``. The expectation is transformers' in fp32, without a cache, from the same files
(`expected.py`). Of a model that sees pictures it is that of its language model, exported alone into ``text/``.
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
from tests.clients.pictures import (
    TOKENS,
    add_picture_tokens,
    fused,
    language_config,
    leave_tower_out,
    pictures_config,
    with_tower,
)

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
NEXT, MOE, TEXT, PICTURES = "qwen3_next", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe"
_SIZES = {
    NEXT: SIZES,
    TEXT: SIZES,
    PICTURES: SIZES | {"vocab_size": VOCAB + len(TOKENS)},
    MOE: {key: size for key, size in SIZES.items() if not key.startswith("linear_") and "shared" not in key},
}
_FAMILY = {PICTURES: TEXT}
_CONVERT = ("-m", "megatron_slim", "convert", "--to", "hf")


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
        return self.model_type != MOE and not self.without_mtp


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
    Case(
        "qwen3.5",
        "Qwen3.5-MoE alone, 6 of 8 layers, 9 of 16 experts, fused",
        TEXT,
        {"num_layers": 6, "num_moe_experts": 9},
    ),
    Case(
        "qwen3.5-vlm",
        "the same that sees pictures, 4 layers, hidden size 128 to 64",
        PICTURES,
        {"num_layers": 4, "hidden_size": 64, "num_moe_experts": 9},
    ),
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


def ascii_tokens(tokenizer: Path, size: int) -> Tensor:
    """Which tokens are ASCII text, [vocabulary]: llama.cpp gives no probabilities of parts of a character."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    found = torch.zeros(size, dtype=torch.bool)
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
    hidden, tokens = shape.hidden_size, shape.vocab_size
    embedding = noise(tokens, hidden)
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = 0.1 * (
        0.3 * embedding[torch.randperm(tokens, generator=generator)] + noise(tokens, hidden)
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
    tool = ROOT / "examples/slimqwen/train_tokenizer.py"
    run(tool, "--input", text, "--output", tokenizer, "--vocab-size", str(VOCAB))
    return tokenizer


def write_source(work: Path, model_type: str) -> Path:
    """A model to prune, with the tokenizer next to its weights."""
    source = work / model_type
    source.mkdir()
    for file in (work / "tokenizer").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    shape = tiny_shape(_FAMILY.get(model_type, model_type), **_SIZES[model_type])
    tensors = source_tensors(shape, ascii_tokens(work / "tokenizer", shape.vocab_size))
    config = tiny_hf_config(shape) | {"bos_token_id": 0, "eos_token_id": 0}
    if model_type == TEXT:
        tensors, config = fused(tensors, shape), language_config(shape)
    elif model_type == PICTURES:
        tensors, config = with_tower(fused(tensors, shape), shape), pictures_config(shape)
        add_picture_tokens(source)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config, indent=2))
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
        run(*_CONVERT, "--without-mtp", "--load", pruned, "--save", directory / "model")
    if case.model_type == PICTURES:
        leave_tower_out(directory / "model", directory / "language")
        run(*_CONVERT, "--load", directory / "language", "--save", directory / "text")
    run(*_CONVERT, "--quantize", "fp8", "--load", directory / "model", "--save", directory / "fp8")
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
