"""Of the model that sees pictures: what its files have beside a language model, and what it makes of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from megatron_slim.architecture.shape import FAMILIES, ModelShape
from tests.vlm import config, files_tensors, picture_and_text

TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
# The tower's patches are 4 pixels wide, and the smallest picture has 4 by 4 of them.
PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessorFast", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSOR |= {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
FILES: dict[str, dict[str, Any]] = {
    "preprocessor_config.json": PROCESSOR
    | {"processor_class": "Qwen3VLProcessor", "size": {"shortest_edge": 256, "longest_edge": 1024}},
    "video_preprocessor_config.json": PROCESSOR
    | {"processor_class": "Qwen3VLProcessor", "size": {"shortest_edge": 512, "longest_edge": 2048}}
    | {"image_processor_type": None, "video_processor_type": "Qwen3VLVideoProcessor"},
}


def language_config(shape: ModelShape) -> dict[str, Any]:
    """config.json of the language model alone, as transformers saves it."""
    own = {"architectures": [shape.family.architecture], "tie_word_embeddings": False, "dtype": "bfloat16"}
    return {**config(shape)["text_config"], **own, "bos_token_id": 0, "eos_token_id": 0}


def pictures_config(shape: ModelShape) -> dict[str, Any]:
    """config.json of the whole; the last tokens of the vocabulary are those of pictures."""
    found = config(shape, shape.vocab_size - len(TOKENS))
    found["text_config"] |= {"dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0}
    return found | {"dtype": "bfloat16"}


def fused(language: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """The language model's tensors as published: experts of the trunk as one tensor, those of the MTP block apart."""
    tensors = dict(language)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{i}.{part}_proj.weight") for i in range(shape.num_moe_experts)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return tensors


def with_tower(language: dict[str, Tensor], shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the whole as published, of its language model's and a random vision tower."""
    wrapper = FAMILIES["qwen3_5_moe_text"].wrapper
    assert wrapper is not None
    tensors = {wrapper.file_name(name): tensor for name, tensor in language.items()}
    torch.manual_seed(seed)
    whole = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**pictures_config(shape)))
    for name, parameter in whole.named_parameters():
        if wrapper.is_other(name):
            # transformers starts with 0.02: a picture would hardly show.
            tensors[name] = (parameter.detach().float() + 0.1 * torch.randn(parameter.shape)).to(torch.bfloat16)
    return tensors


def add_picture_tokens(directory: Path) -> None:
    """Give a tokenizer the tokens of pictures, and write how pictures are cut into patches."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    first = len(content["model"]["vocab"])
    like = content["added_tokens"][0]
    content["added_tokens"] += [like | {"id": first + i, "content": token} for i, token in enumerate(TOKENS)]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name, values in FILES.items():
        (directory / name).write_text(json.dumps(values, indent=2))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)


def leave_tower_out(model: Path, files: Path) -> None:
    """A copy without the tensors of the vision tower, which is a language model alone."""
    files.mkdir()
    tensors = {name: tensor for name, tensor in files_tensors(model).items() if ".visual." not in name}
    save_file(tensors, files / "model.safetensors", metadata={"format": "pt"})
    (files / "config.json").write_bytes((model / "config.json").read_bytes())


def picture_arrays(source: Path, model: Path) -> dict[str, Tensor]:
    """A picture, and what the tower of the model before its pruning makes of it.

    Returns:
        ``pixels`` [patches, values] and ``grid`` [1, 3] as its tower takes them; ``features`` [tokens, hidden size]:
        what enters the language model, of the hidden dimensions that the pruned one kept.
    """
    whole = Qwen3_5MoeForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    inputs = picture_and_text()
    with torch.no_grad():
        seen = whole.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    name = "model.language_model.embed_tokens.weight"
    before, after = load_file(source / "model.safetensors")[name], files_tensors(model)[name]
    kept = [int((before == column[:, None]).all(0).nonzero()) for column in after.T]
    return {"pixels": inputs["pixel_values"], "grid": inputs["image_grid_thw"], "features": seen[:, kept]}
