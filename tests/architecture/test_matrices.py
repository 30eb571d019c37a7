"""The matrices in a parameter: which there are, and which rows of it they are in any layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_slim.architecture.axes import labelled_positions
from megatron_slim.architecture.matrices import hf_name, local_positions, outer_axes, pieces_of, polar_flops
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.architecture.table import hf_tensors, weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.layout import from_megatron
from megatron_slim.testing import tiny_shape

# Qwen3-Next: the label of every matrix, and of what is none, by the end of the key.
QWEN3_NEXT = {
    "word_embeddings.weight": ([], [""]),
    "output_layer.weight": ([], [""]),
    "linear_qkv.weight": (["query", "gate", "key", "value"], []),
    "linear_proj.weight": ([""], []),
    "in_proj.weight": (["query", "key", "value", "z"], ["beta", "alpha"]),
    "out_proj.weight": ([""], []),
    "linear_fc1.weight": (["gate", "up"], []),
    "linear_fc2.weight": ([""], []),
    "router.weight": ([], [""]),
    "shared_experts.gate_weight": ([], [""]),
    "eh_proj.weight": (["embedding", "state"], []),
    "conv1d.weight": ([], []),
    "A_log": ([], []),
    "layernorm.weight": ([], []),
}


def test_matrices_of_qwen3_next() -> None:
    seen = set()
    for weight in weights(tiny_shape()):
        for end in (each for each in QWEN3_NEXT if weight.key.endswith(each)):
            pieces = pieces_of(weight.dims)
            found = [p.label for p in pieces if not p.why], [p.label for p in pieces if p.why]
            assert found == QWEN3_NEXT[end], weight.key
            seen.add(end)
    assert seen == QWEN3_NEXT.keys()


def of_family(family: str) -> ModelShape:
    return tiny_shape(family, num_query_groups=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_is_part_of_one_hugging_face_tensor(family: str) -> None:
    """Numbers of rows, taken apart as a conversion does it, are those of the positions of a label."""
    shape = of_family(family)
    for weight in (each for each in weights(shape) if len(each.dims) == 2):
        rows, columns = weight.shape(shape)[-2:]
        tensor = torch.arange(rows * columns).view(rows, columns)
        expert = 0 if weight.stacked else None
        for piece in pieces_of(weight.dims):
            positions = labelled_positions(weight.dims[piece.dim], shape.sizes)[piece.label]
            part = tensor.index_select(piece.dim, torch.from_numpy(positions))
            assert tuple(part.shape) == piece.shape(shape.sizes)
            theirs = from_megatron(weight, shape, tensor, expert=expert)[hf_name(weight, piece.label, expert)]
            assert np.isin(part.numpy(), theirs.numpy()).all(), (weight.key, piece.label)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hugging_face_matrix_has_a_piece(family: str) -> None:
    shape = of_family(family)
    named = set()
    for weight in weights(shape):
        for piece in pieces_of(weight.dims):
            named |= {hf_name(weight, piece.label, expert) for expert in weight.experts(shape)}
    assert named == {name for name, tensor in hf_tensors(shape).items() if len(tensor.dims) == 2}


def shard(weight: Weight, shape: ModelShape, rank: int, ways: int) -> torch.Tensor:
    """Numbers of the positions that a tensor-parallel rank has of the split dimension."""
    assert weight.tp_dim is not None
    dim = weight.dims[weight.tp_dim]
    whole = torch.arange(weight.shape(shape)[-2:][weight.tp_dim])
    if not weight.split and len(weight.sources) != 2:
        return whole.chunk(ways)[rank]
    # As Megatron has them: parts one after the other on every rank.
    parts = labelled_positions(dim, shape.sizes).values()
    return torch.cat([torch.from_numpy(part).chunk(ways)[rank] for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_has_the_same_share_of_every_matrix(family: str) -> None:
    shape = of_family(family)
    for weight in (each for each in weights(shape) if len(each.dims) == 2 and each.tp_dim is not None):
        dim = weight.tp_dim
        local = local_positions(weight.dims, dim, shape.sizes, dim, 2)
        whole = labelled_positions(weight.dims[dim], shape.sizes)
        ranks = [shard(weight, shape, rank, 2) for rank in range(2)]
        for label, positions in local.items():
            found = torch.cat([numbers[torch.from_numpy(positions)] for numbers in ranks])
            assert found.tolist() == whole[label].tolist(), (weight.key, label)


def test_what_ranks_divide() -> None:
    weight = next(each for each in weights(tiny_shape()) if each.key.endswith("in_proj.weight"))
    assert outer_axes(weight.dims[0]) == {"gdn_key_head"}


def test_operations_of_a_step() -> None:
    """4 n^2 c + 2 n^3 of each of [gate; up], n = 32 neurons and c = 64 channels; a router has none."""
    shape = tiny_shape()
    found = {each.key.rpartition(".mlp.")[2]: polar_flops(each, shape.sizes) for each in weights(shape)}
    assert found["experts.experts.linear_fc1.weight"] == 2 * (4 * 32**2 * 64 + 2 * 32**3)
    assert found["router.weight"] == 0
