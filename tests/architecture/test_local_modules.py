"""What runs without Transformer Engine, against Megatron's own modules and autograd in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.local_attention import LocalAttention
from megatron_slim.architecture.local_experts import LocalExperts
from megatron_slim.architecture.local_modules import rms_norm
from megatron_slim.compat import runtime
from megatron_slim.testing import tiny_shape

SIZES = {"num_layers": 2, "layer_types": ("linear_attention", "full_attention"), "moe_router_topk": 3}
# Sums in another order; bf16 has three decimal digits, and an element is rounded a few times on its way.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


def layer(dtype: torch.dtype = torch.float32) -> Any:
    """The second layer: full attention and experts."""
    runtime.init_single_process()
    torch.manual_seed(0)
    shape = tiny_shape(**SIZES)
    narrow = dtype == torch.bfloat16
    model = build_model(shape, transformer_config(shape, params_dtype=dtype, bf16=narrow, pipeline_dtype=dtype))
    return model.to(dtype).decoder.layers[1]


def run(function: Any, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its product with fixed numbers."""
    inputs = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
    output = function(*inputs)
    weights = random(*output.shape, seed=9).to(output.dtype)
    wanted = [each for each in [*inputs, *parameters] if each.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, weights)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [(5, 0, 40, 1), (0, 0, 46, 0)], ids=str)
def test_experts_are_megatrons(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Megatron's own forward pass over the same parameters: output, and gradients of pairs, gates and weights."""
    experts = layer(dtype).mlp.experts
    assert isinstance(experts, LocalExperts)
    counts = torch.tensor(rows + (0,) * (experts.num_local_experts - len(rows)))
    pairs, gates = random(46, experts.config.hidden_size).to(dtype), random(46, seed=1).sigmoid()
    parameters = list(experts.parameters())

    def theirs(pairs: Tensor, gates: Tensor) -> Tensor:
        return super(LocalExperts, experts).forward(pairs, counts, gates)[0]

    def ours(pairs: Tensor, gates: Tensor) -> Tensor:
        return experts(pairs, counts, gates)[0]

    for found, wanted in zip(*(run(each, [pairs, gates], parameters) for each in (ours, theirs)), strict=True):
        assert found.dtype == wanted.dtype
        assert error(found, wanted) < TOLERANCE[dtype] if wanted.any() else not found.any()


def test_gates_on_the_input_are_megatrons_too() -> None:
    experts = layer().mlp.experts
    experts.config = copy.copy(experts.config)
    experts.config.moe_apply_probs_on_input, experts.config.moe_router_topk = True, 1
    counts = torch.tensor([46] + [0] * (experts.num_local_experts - 1))
    pairs, gates = random(46, experts.config.hidden_size), random(46, seed=1).sigmoid()
    alone = experts.local_experts[0](pairs * gates[:, None])[0]
    torch.testing.assert_close(experts(pairs, counts, gates)[0], alone)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_megatrons(dtype: torch.dtype, masked: bool) -> None:
    attention = layer(dtype).self_attention.core_attention
    assert isinstance(attention, LocalAttention)
    heads, groups, size = (
        attention.num_attention_heads_per_partition,
        attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head,
    )
    assert heads > groups
    query = random(40, 3, heads, size).to(dtype)
    key, value = (random(40, 3, groups, size, seed=seed).to(dtype) for seed in (1, 2))
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    hidden[20:, :20] |= masked  # a document begins at position 20

    def theirs(*states: Tensor) -> Tensor:
        return super(LocalAttention, attention).forward(*states, hidden[None, None])

    def ours(*states: Tensor) -> Tensor:
        return attention(*states, hidden if masked else None)

    states = [query, key, value]
    for found, wanted in zip(*(run(each, states, []) for each in (ours, theirs)), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("size", [(6, 2, 48), (6, 2, 3, 16)], ids=str)
def test_norm_and_its_gradients(size: tuple[int, ...], zero_centered: bool) -> None:
    hidden, weight = random(*size) * 3, random(size[-1], seed=1)

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight + 1 if zero_centered else weight, 1e-6)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight, 1e-6, zero_centered=zero_centered)

    wanted = run(lambda *inputs: exact(*inputs), [hidden.double(), weight.double()], [])
    for found, reference in zip(run(ours, [hidden, weight], []), wanted, strict=True):
        assert found.dtype == torch.float32 and error(found, reference) < 1e-6
    narrow = rms_norm(hidden.bfloat16(), weight.bfloat16(), 1e-6, zero_centered=zero_centered)
    assert narrow.dtype == torch.bfloat16 and error(narrow, wanted[0]) < 2e-2
