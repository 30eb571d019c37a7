"""Tiny models to decode with: random ones, and ones whose MTP block is right by construction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.huggingface_writer import specs_of, write_hf_checkpoint
from megatron_slim.testing import random_tensors, tiny_hf_config, tiny_shape

SIZE = 64  # of vocabulary and hidden state


def cycle_shape() -> ModelShape:
    """A layer of each kind."""
    return tiny_shape(
        num_layers=2, layer_types=("linear_attention", "full_attention"), vocab_size=SIZE, hidden_size=SIZE
    )


def write_cycle(directory: Path, *, reads: str, exchanged: bool = False) -> list[int]:
    """Write a model that runs through a cycle of all tokens, with an MTP block that drafts it.

    Embeddings are unit vectors and no sublayer adds anything, so that the output layer alone says what follows a token.

    Args:
        directory: a new one.
        reads: ``embedding``: the block passes on the embedding of the next token; ``hidden``: it makes that of the
            next token from the hidden state, so that every draft stands on the one before.
        exchanged: the halves of the block's first matrix stand in the wrong order.

    Returns:
        by token, the one that follows it.
    """
    shape, one = cycle_shape(), torch.eye(SIZE)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    follower = torch.empty(SIZE, dtype=torch.int64)
    follower[order] = order.roll(-1)
    to_follower = one[follower].t()  # times the unit vector of a token: that of its follower
    first, second = (one, torch.zeros_like(one)) if reads == "embedding" else (torch.zeros_like(one), to_follower)
    tensors = random_tensors(shape, dtype=torch.float32)
    silent = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "norm.weight")  # norms multiply by 1 + weight
    for name in tensors:
        if name.endswith(silent) or "pre_fc_norm" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    tensors["model.embed_tokens.weight"] = one
    tensors["lm_head.weight"] = to_follower.contiguous()
    tensors["mtp.fc.weight"] = torch.cat((second, first) if exchanged else (first, second), 1)
    write(directory, shape, tensors)
    return follower.tolist()


def write(directory: Path, shape: ModelShape, tensors: dict[str, Tensor]) -> Path:
    """Write a Hugging Face checkpoint in fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_hf_config(shape) | {"torch_dtype": "float32"}
    specs = specs_of(shape, {name: tensor.dtype for name, tensor in tensors.items()})
    ordered = ((spec.name, tensors[spec.name].contiguous()) for spec in specs)
    write_hf_checkpoint(directory, config, specs, ordered, max_shard_bytes=1 << 30)
    return directory


def prompts(vocab_size: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
