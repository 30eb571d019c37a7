"""Optimizers of matrices on single parameters: each matrix by itself, idle ones, other rows, what is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.axes import labelled_positions
from megatron_slim.architecture.matrices import Piece, hf_name, pieces_of
from megatron_slim.architecture.shape import FAMILIES, ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import HFTensor, Weight
from megatron_slim.checkpoint.layout import from_megatron
from megatron_slim.optimizers import MOMENTUM, OPTIMIZERS, SECOND_MOMENT, is_scale_invariant
from megatron_slim.testing import run_distributed, tiny_shape
from megatron_slim.training.aurora import aurora_step
from megatron_slim.training.matrix_optimizer import AdamW, MatrixOptimizer, Updates, aurora, muon_update
from megatron_slim.training.matrix_stacks import STACK_BYTES, WHOLE, Ranks, Row, places_of, stacks, through_whole

LR, DECAY = 0.02, 0.1
AURORA = aurora(2, 0.5, "fp32")


def optimizer(parameters: Sequence[Tensor], rows: Sequence[Row], shape: ModelShape, **changes: Any) -> MatrixOptimizer:
    """Of parameters that this process has whole."""
    known = {id(parameter): row for parameter, row in zip(parameters, rows, strict=True)}
    options = {
        "lr": LR,
        "momentum": 0.95,
        "weight_decay": DECAY,
        "nesterov": True,
        "update": AURORA,
        "places_of": lambda each, group: places_of(each, group, known[id(each)], shape, WHOLE, every=False),
        "adamw": AdamW(),
        "steps_idle": False,
        "updates": Updates(),
    }
    return MatrixOptimizer(list(parameters), **{**options, **changes})


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def part_of(tensor: Tensor, source: HFTensor, piece: Piece, shape: ModelShape) -> Tensor:
    """A Hugging Face tensor taken apart: queries and gates, parts of in_proj, halves of columns."""
    if piece.dim == 1:
        return tensor.chunk(2, dim=1)[int(piece.label == "state")]
    return tensor[labelled_positions(source.dims[0], shape.sizes)[piece.label]]


def two_dimensional(shape: ModelShape) -> list[Weight]:
    """The first row of each kind."""
    found: dict[str, Weight] = {}
    for weight in weights(shape):
        if len(weight.dims) == 2 and not weight.buffer:
            found.setdefault(weight.key.rpartition("layers.")[2].partition(".")[2], weight)
    return list(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hugging_face_matrix_is_updated_by_itself(family: str) -> None:
    """Two steps on a parameter of Megatron's are two on each of its Hugging Face tensors, label by label.

    The same products in stacks and alone, in sums of another order: 1e-7 is seen.
    """
    shape = tiny_shape(family)
    for weight in two_dimensional(shape):
        expert = 1 if weight.stacked else None
        parameter = torch.nn.Parameter(random(weight.shape(shape)[-2:], 1))
        gradients = [random(parameter.shape, seed) for seed in (2, 3)]
        before = from_megatron(weight, shape, parameter.detach().clone(), expert=expert)
        theirs = [from_megatron(weight, shape, each, expert=expert) for each in gradients]
        adam = optimizer([parameter], [Row(weight, expert)], shape)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            adam.step()
        after = from_megatron(weight, shape, parameter.detach(), expert=expert)
        for piece in (each for each in pieces_of(weight.dims) if not each.why):
            name = hf_name(weight, piece.label, expert)
            source = next(each for each, number in weight.hf_tensors(shape) if (each.name, number) == (name, expert))

            wanted = part_of(before[name], source, piece, shape).clone()
            momentum = torch.zeros_like(wanted)
            for each in theirs:
                aurora_step(wanted, part_of(each[name], source, piece, shape), momentum, LR, weight_decay=DECAY)
            assert part_of(after[name], source, piece, shape).sub(wanted).abs().max() <= 1e-6, (weight.key, piece.label)


def test_rows_that_are_none_are_updated_as_adamw_does() -> None:
    """Beta and alpha inside in_proj, and a whole router, against torch's AdamW, at their own learning rate."""
    shape = tiny_shape()
    rows = [
        each
        for each in weights(shape)
        if each.key.endswith(("layers.0.self_attention.in_proj.weight", "router.weight"))
    ]
    for weight in rows[:2]:
        parameter = torch.nn.Parameter(random(weight.shape(shape), 1))
        positions = labelled_positions(weight.dims[0], shape.sizes)
        places = {label: torch.from_numpy(at) for label, at in positions.items() if label in ("beta", "alpha", "")}
        twins = {label: torch.nn.Parameter(parameter.detach()[at].clone()) for label, at in places.items()}
        theirs = torch.optim.AdamW(twins.values(), lr=0.3 * LR, weight_decay=DECAY, betas=(0.8, 0.9), eps=1e-6)
        ours = optimizer([parameter], [Row(weight)], shape, adamw=AdamW(0.3, (0.8, 0.9), 1e-6))
        for seed in (2, 3, 4):
            parameter.grad = random(parameter.shape, seed)
            for label, at in places.items():
                twins[label].grad = parameter.grad[at]
            ours.step()
            theirs.step()
        for label, at in places.items():
            assert parameter.detach()[at].sub(twins[label]).abs().max() <= 1e-6, (weight.key, label)
        assert set(ours.state[parameter]) == {MOMENTUM, SECOND_MOMENT}


def experts(shape: ModelShape, count: int = 3) -> tuple[list[torch.nn.Parameter], list[Row]]:
    weight = next(each for each in weights(shape) if each.key.endswith("experts.linear_fc1.weight") and each.stacked)
    found = [torch.nn.Parameter(random(weight.shape(shape)[-2:], seed)) for seed in range(count)]
    return found, [Row(weight, number) for number in range(count)]


def test_an_expert_without_tokens_does_not_move() -> None:
    """Nor does its momentum; nor, in one with tokens, a half without gradient, as where all gates are shut."""
    shape = tiny_shape()
    parameters, rows = experts(shape)
    ours = optimizer(parameters, rows, shape)
    for parameter in parameters:
        parameter.grad = random(parameter.shape, 7)
    ours.step()
    neurons = shape.moe_ffn_hidden_size
    parameters[1].grad = torch.zeros_like(parameters[1])
    assert parameters[2].grad is not None
    parameters[2].grad[:neurons] = 0
    before = [each.detach().clone() for each in parameters]
    means = [ours.state[each][MOMENTUM].clone() for each in parameters]
    ours.updates.clear()
    ours.step()
    assert torch.equal(parameters[1], before[1]) and torch.equal(ours.state[parameters[1]][MOMENTUM], means[1])
    assert torch.equal(parameters[2][:neurons], before[2][:neurons])
    assert not torch.equal(parameters[2][neurons:], before[2][neurons:])
    assert not torch.equal(parameters[0], before[0])
    assert ours.updates.idle == 3


def test_as_published_it_moves_on() -> None:
    """By as much as with a gradient: its update has one size."""
    shape = tiny_shape()
    parameters, rows = experts(shape, 1)
    ours = optimizer(parameters, rows, shape, steps_idle=True, weight_decay=0.0)
    moved = []
    for gradient in (random(parameters[0].shape, 7), torch.zeros_like(parameters[0])):
        before = parameters[0].detach().clone()
        parameters[0].grad = gradient
        ours.step()
        moved.append(float((parameters[0].detach() - before).norm()))
    assert moved[1] == pytest.approx(moved[0], rel=1e-3)


def test_muon_is_that_of_the_package_on_each_matrix() -> None:
    """Of emerging_optimizers, given gate and up apart."""
    from emerging_optimizers.orthogonalized_optimizers import Muon

    shape = tiny_shape()
    parameters, rows = experts(shape)
    halves = [torch.nn.Parameter(half.clone()) for each in parameters for half in each.detach().chunk(2)]
    options: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": DECAY, "nesterov": False}
    theirs = Muon(halves, **options, fp32_matmul_prec="highest", scale_mode="shape_scaling", extra_scale_factor=0.5)
    ours = optimizer(parameters, rows, shape, **options, update=muon_update(5, "quintic", "shape_scaling", 0.5, "fp32"))
    for seed in (5, 6):
        for number, parameter in enumerate(parameters):
            parameter.grad = random(parameter.shape, seed + number)
            for half, gradient in zip(halves[2 * number :], parameter.grad.chunk(2), strict=False):
                half.grad = gradient.clone()
        ours.step()
        theirs.step()
    found = torch.cat([each.detach() for each in parameters])
    assert found.sub(torch.cat([half.detach() for half in halves])).abs().max() <= 1e-6


def test_muon_in_bf16_is_another_precision() -> None:
    matrix = random((2, 24, 48), 1)
    exact, narrow = (muon_update(5, "quintic", "shape_scaling", 1.0, kind)(matrix) for kind in ("fp32", "bf16"))
    assert 1e-4 < float((exact - narrow).abs().max()) < 0.1 and narrow.dtype == torch.float32


def test_an_update_that_is_not_finite_is_named() -> None:
    """By the Hugging Face tensor; nothing is read back before it is asked for."""
    shape = tiny_shape()
    parameters, rows = experts(shape)

    def update(stack: Tensor) -> Tensor:
        found = AURORA(stack)
        found[-1, 0, 0] = torch.inf
        return found

    ours = optimizer(parameters, rows, shape, update=update)
    for parameter in parameters:
        parameter.grad = random(parameter.shape, 7)
    ours.step()
    assert float(ours.updates.any_not_finite("cpu")) == 1.0
    assert ours.updates.not_finite() == ["model.layers.0.mlp.experts.2.up_proj.weight"]
    ours.updates.clear()
    assert float(ours.updates.any_not_finite("cpu")) == 0.0


def test_what_is_trained_next_to_the_model_is_adamws() -> None:
    parameter = torch.nn.Parameter(random((4, 6), 1))
    ours = optimizer([parameter], [Row(None)], tiny_shape())
    parameter.grad = random((4, 6), 2)
    ours.step()
    assert SECOND_MOMENT in ours.state[parameter]


def test_a_stack_is_no_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiny_shape()
    parameters, rows = experts(shape)
    places = [
        place
        for each, row in zip(parameters, rows, strict=True)
        for place in places_of(each, 0, row, shape, WHOLE, every=False)
    ]
    assert [len(stack) for stack in stacks(places)] == [6]
    monkeypatch.setitem(STACK_BYTES, "cpu", 4 * 4 * 32 * 64)
    assert [len(stack) for stack in stacks(places)] == [4, 2]


def exchanged(dim: int, count: int) -> bool:
    """Body of one of two ranks: whole matrices come together and apart again, each seen by one rank."""
    rank = torch.distributed.get_rank()
    whole = random((count, 6, 8), 1)
    ranks = Ranks(torch.distributed.group.WORLD, 2, dim)
    seen: list[int] = []

    def compute(found: Tensor, numbers: range) -> Tensor:
        assert torch.equal(found, whole[numbers.start : numbers.stop])
        seen.extend(numbers)
        return found * 2

    found = through_whole(whole.chunk(2, dim=1 + dim)[rank].contiguous(), ranks, compute)
    everywhere: list[list[int]] = [[], []]
    torch.distributed.all_gather_object(everywhere, seen)
    assert sorted(everywhere[0] + everywhere[1]) == list(range(count))
    return torch.equal(found, 2 * whole.chunk(2, dim=1 + dim)[rank])


@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("dim", [0, 1])
def test_each_rank_computes_some_of_the_matrices(dim: int, count: int) -> None:
    assert run_distributed(2, exchanged, dim, count) == [True, True]


def test_what_others_ask_of_an_optimizer() -> None:
    assert {name: is_scale_invariant(name) for name in OPTIMIZERS} == {"adam": False, "muon": True, "aurora": True}
