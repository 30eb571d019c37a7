"""Terms of the loss from outside the package: values and gradients against fp64 formulas, and their place in it."""

from __future__ import annotations

import argparse
import doctest
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from torch import Tensor

from megatron_slim.distillation import terms
from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.functions import function_violations
from megatron_slim.distillation.fused import DistillationInputs, fused_losses
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine, gradients_of_total
from megatron_slim.distillation.model import _upstream
from megatron_slim.distillation.output_layer import OutputLayer
from megatron_slim.distillation.schedule import Schedule
from megatron_slim.distillation.terms import (
    CROSS_ENTROPY,
    DIVERGENCE,
    HIDDEN_STATES,
    KD_LAMBDA,
    LOSS_TERMS,
    MTP_BETA,
    TEACHER_CROSS_ENTROPY,
    LossTerm,
    LossWeight,
    TermInputs,
    check_terms,
    terms_of,
)
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.errors import SlimError
from megatron_slim.testing import run_distributed
from megatron_slim.training.slim_arguments import add_slim_arguments, schedule_of
from tests.distillation.test_fused import ROWS, Example, V, assert_same, kd_reference, targets


def z_loss(inputs: TermInputs) -> Tensor:
    """The square of log Z."""
    return inputs.shard.log_sum_exp(inputs.logits).square()


class ZLoss(torch.autograd.Function):
    """The same, its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shard: VocabShard) -> Tensor:
        log_z = shard.log_sum_exp(logits)
        ctx.save_for_backward(logits, log_z)
        return log_z.square()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, log_z = ctx.saved_tensors
        return (logits - log_z[:, None]).exp() * (2 * upstream * log_z)[:, None], None


def gap(inputs: TermInputs) -> Tensor:
    """How far the label's log-probability is from the teacher's, squared."""
    assert inputs.teacher is not None
    shard = inputs.shard
    own, theirs = (
        shard.sum(shard.at_labels(logits, inputs.labels)[0]) - shard.log_sum_exp(logits)
        for logits in (inputs.logits, inputs.teacher)
    )
    return (own - theirs).square()


def spread(inputs: TermInputs) -> Tensor:
    """The sum of squared logits, of which nothing is minimised."""
    return inputs.shard.sum(inputs.logits.square().sum(-1))


Z_WEIGHT = LossWeight("z weight", Schedule("constant", 0.25, 0.25), "the weight of the z-loss")
GAP_WEIGHT = LossWeight("gap weight", Schedule("linear", 0.5, 0.0), "the weight of the gap")
OWN = {
    "z": LossTerm("z loss", z_loss, Z_WEIGHT),
    "gap": LossTerm("gap loss", gap, GAP_WEIGHT, needs_teacher=True),
    "mtp_gap": LossTerm("mtp gap loss", gap, GAP_WEIGHT, mtp=True, needs_teacher=True),
    "mtp_z": LossTerm("mtp z loss", lambda inputs: ZLoss.apply(inputs.logits, inputs.shard), Z_WEIGHT, mtp=True),
    "spread": LossTerm("spread loss", spread),
}
SIZE = 2 + len(OWN)


def upstream_of_all() -> Tensor:
    """Gradients [terms, heads, T] of lm, kd and our own; zeros where a term is not of a head, or not minimised."""
    found = torch.randn(SIZE, 2, ROWS, generator=torch.Generator().manual_seed(5))
    for number, term in enumerate(OWN.values(), start=2):
        found[number, int(not term.mtp)] = 0.0
    found[-1] = 0.0
    return found


def reference(example: Example, kd: KDLoss, ahead: int | None) -> dict[str, Tensor]:
    """All in fp64, by autograd over whole logits."""
    hidden = [each.double().requires_grad_() for each in example.hidden]
    weight = example.weight.double().requires_grad_()
    student = torch.stack(hidden) @ weight[:V].T
    teacher = torch.stack([each.double() @ example.teacher_weight[:V].double().T for each in example.teacher_hidden])
    keep = torch.ones(2, ROWS)
    if ahead is not None:
        teacher[1, : ROWS - ahead] = teacher[0, ahead:].clone()
        keep[1, ROWS - ahead :] = 0.0
    log_q, log_p = (
        (logits.log_softmax(-1).gather(-1, example.labels[..., None])[..., 0]) for logits in (student, teacher)
    )
    z, far = student.exp().sum(-1).log() ** 2, (log_q - log_p) ** 2
    main, mtp = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    own = [z * main, far * main, far * mtp, z * mtp, (student**2).sum(-1) * main]
    values = torch.stack([-log_q, kd_reference(kd, student, teacher), *own]) * keep
    (upstream_of_all() * values).sum().backward()
    assert weight.grad is not None
    found = {f"term{number}": value.detach() for number, value in enumerate(values)}
    return (
        found
        | {"weight": weight.grad}
        | {f"hidden{i}": each.grad for i, each in enumerate(hidden) if each.grad is not None}
    )


def ours(kd: KDLoss, ahead: int | None, *, chunk: int = 4, announced: bool = True) -> dict[str, Tensor]:
    """The same in chunks, on this rank's rows of the weights."""
    example = Example()
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if group else (1, 0)
    columns = len(example.weight) // ranks
    layers = [
        OutputLayer(each[rank * columns :][:columns].clone().requires_grad_(), VocabShard.of(group, columns, V))
        for each in (example.weight, example.teacher_weight)
    ]
    hidden = [each.clone().requires_grad_() for each in example.hidden]
    inputs = DistillationInputs(example.labels, targets(example, ahead), layers[1], kd, chunk, tuple(OWN.values()))
    upstream = upstream_of_all()
    lm, loss, _, *own = fused_losses(layers[0], hidden, inputs, tuple(upstream) if announced else None)
    values = torch.stack([lm, loss, *own])
    (upstream * values).sum().backward()
    found = {f"term{number}": value.detach() for number, value in enumerate(values)}
    found["weight"] = layers[0].weight.grad if layers[0].weight.grad is not None else torch.zeros(0)
    return found | {f"hidden{i}": each.grad for i, each in enumerate(hidden) if each.grad is not None}


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("ahead", [None, 2])
@pytest.mark.parametrize("kd", [KDLoss(), KDLoss("jsd", 2.0)], ids=lambda kd: kd.kind)
def test_against_fp64(kd: KDLoss, ahead: int | None, announced: bool) -> None:
    """Squares of numbers near ten: an absolute rounding of theirs, on top of that of the others."""
    assert_same(ours(kd, ahead, announced=announced), reference(Example(), kd, ahead), rtol=5e-6, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_chunks_end_anywhere(chunk: int) -> None:
    assert_same(ours(KDLoss(), 2, chunk=chunk), reference(Example(), KDLoss(), 2), rtol=5e-6, atol=2e-5)


def on_a_rank() -> dict[str, Tensor]:
    return ours(KDLoss(), 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shared_over_ranks(ranks: int) -> None:
    of_ranks = run_distributed(ranks, on_a_rank)
    merged = dict(of_ranks[0], weight=torch.cat([each["weight"] for each in of_ranks]))
    merged |= {name: sum(each[name] for each in of_ranks) for name in ("hidden0", "hidden1")}
    assert_same(merged, reference(Example(), KDLoss(), 2), rtol=5e-6, atol=2e-5)


def padding_alone() -> tuple[Tensor, Tensor]:
    """Body of one of two ranks, the second of which has no column that counts: log Z of 0, 1, ... and its gradient."""
    rank = torch.distributed.get_rank()
    shard = VocabShard.of(torch.distributed.group.WORLD, V, V)
    logits = torch.arange(float(V))[None, : V * (1 - rank)].requires_grad_()
    value = shard.log_sum_exp(logits)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def test_a_rank_with_padding_alone() -> None:
    (value, gradient), (same, nothing) = run_distributed(2, padding_alone)
    expected = torch.arange(float(V)).double()
    assert torch.equal(value, same) and nothing.shape == (1, 0)
    torch.testing.assert_close(value.double(), expected.logsumexp(0)[None], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), expected.softmax(0)[None], rtol=1e-5, atol=1e-12)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, term in OWN.items():
        monkeypatch.setitem(LOSS_TERMS, key, term)


def test_place_in_the_sum(registered: None) -> None:
    """Two tokens and one MTP depth, whose one token of two counts twice."""
    keys = list(terms_of(has_teacher=True, has_mtp=True))
    losses = TokenLosses({key: (torch.tensor([[1.0, 2.0]]) * 10**number,) for number, key in enumerate(keys)})
    values = LossWeights(kd_lambda=0.75, mtp_beta=0.5, z_weight=0.25, gap_weight=0.125)
    total, _, report = combine(losses, torch.ones(1, 2), values)
    assert keys == ["lm", "kd", "teacher_lm", "mtp_lm", "mtp_kd", "z", "gap", "mtp_gap", "mtp_z", "spread"]
    main = 0.25 * 3 + 0.75 * 30 + 0.25 * 3e5 + 0.125 * 3e6
    mtp = 2 * (0.25 * 1e3 + 0.75 * 1e4 + 0.125 * 1e7 + 0.25 * 1e8)
    assert float(total) == pytest.approx(main + 0.5 * mtp, rel=1e-6)
    assert float(report["z loss"][0] / report["z loss"][1]) == pytest.approx(1.5e5)
    assert float(report["mtp gap loss"][0]) == 1e7 and float(report["spread loss"][0]) == 3e9
    assert {name: float(report[name][0]) for name in ("z weight", "gap weight")} == {
        "z weight": 0.25,
        "gap weight": 0.125,
    }
    gradient = gradients_of_total(torch.ones(1, 2), values, 1, has_teacher=True)
    assert gradient["z"][0].tolist() == [[0.25, 0.25]] and gradient["mtp_z"][0].tolist() == [[0.25, 0.0]]
    assert not gradient["spread"][0].any()


def test_without_a_teacher_what_needs_one_is_left_out(registered: None) -> None:
    found = terms_of(has_teacher=False, has_mtp=True)
    assert list(found) == ["lm", "mtp_lm", "z", "mtp_z", "spread"]
    values = LossWeights(kd_lambda=0.75, mtp_beta=0.5, z_weight=0.25, gap_weight=0.125)
    report = combine(TokenLosses({key: (torch.ones(1, 2),) for key in found}), torch.ones(1, 2), values)[2]
    assert [name for name in report if "loss" not in name] == ["mtp beta", "z weight"]


def test_two_terms_of_one_closed_form_add_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_TERMS, "again", LossTerm("second lm loss", CROSS_ENTROPY, Z_WEIGHT))
    found = terms_of(has_teacher=False, has_mtp=True)
    values = LossWeights(kd_lambda=0.75, mtp_beta=0.5, z_weight=0.25)
    expected = gradients_of_total(torch.ones(1, 4), values, 2, has_teacher=False)
    lm, kd = _upstream(expected, found, 3)
    assert lm[0].tolist() == [1.25] * 4 and torch.equal(lm[1:], torch.cat(expected["mtp_lm"])) and not kd.any()


def test_flags(registered: None) -> None:
    parser = argparse.ArgumentParser()
    add_slim_arguments(parser)
    args = parser.parse_args(["--z-weight-start", "3", "--gap-weight-schedule", "cosine"])
    assert schedule_of(Z_WEIGHT, args) == Schedule("constant", 3.0, 0.25)
    assert schedule_of(GAP_WEIGHT, args) == Schedule("cosine", 0.5, 0.0)
    assert schedule_of(KD_LAMBDA, args) == KD_LAMBDA.default
    help_text = " ".join(parser.format_help().split())
    assert "Schedule of the weight of the gap. Default: linear." in help_text


@pytest.mark.parametrize(
    ("key", "term", "message"),
    [
        ("z", LossTerm("lm loss", z_loss), r"LOSS_TERMS\['z'\]: two terms are called 'lm loss'"),
        ("z", LossTerm("log Z squared", z_loss), r"LOSS_TERMS\['z'\]: the name 'log Z squared' must end in ' loss'"),
        ("z loss", LossTerm("z loss", z_loss), "a short name is made of letters, digits and _"),
        ("z", LossTerm("z loss", "z"), "nothing is known to compute 'z'"),
        ("z", LossTerm("z loss", DIVERGENCE), "the divergence needs a teacher"),
        ("z", LossTerm("z loss", TEACHER_CROSS_ENTROPY, mtp=True, needs_teacher=True), "is of its main head alone"),
        ("z", LossTerm("z loss", z_loss, LossWeight("kd lambda", MTP_BETA.default, "")), "two weights of losses are"),
        (
            "z",
            LossTerm("z loss", z_loss, LossWeight("hidden kd weight", MTP_BETA.default, "")),
            "two weights of losses",
        ),
        ("z", LossTerm("z loss", HIDDEN_STATES, Z_WEIGHT), "the distance of hidden states needs a teacher"),
        ("z", LossTerm("z loss", HIDDEN_STATES, Z_WEIGHT, needs_teacher=True), "is what 'hidden' is of, and no other"),
        ("hidden", LossTerm("z loss", z_loss, Z_WEIGHT), "is what 'hidden' is of, and no other"),
        ("hidden", LossTerm("far loss", HIDDEN_STATES, needs_teacher=True), "has a weight of its own and no heads"),
        ("hidden", LossTerm("far loss", HIDDEN_STATES, Z_WEIGHT, mtp=True, needs_teacher=True), "and no heads"),
    ],
)
def test_what_cannot_be_told_apart(key: str, term: LossTerm, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_TERMS, key, term)
    with pytest.raises(SlimError, match=message):
        add_slim_arguments(argparse.ArgumentParser())


def test_flags_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_TERMS, "z", LossTerm("z loss", z_loss, Z_WEIGHT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--z-weight-end")
    with pytest.raises(SlimError, match=r"the weight 'z weight' of a loss: .*conflicting option"):
        add_slim_arguments(parser)


def test_functions_are_tried_before_anything_is_built() -> None:
    check_terms()
    assert function_violations(LOSS_TERMS | OWN, V) == []
    broken = {
        "a": LossTerm("mean loss", lambda inputs: z_loss(inputs).mean(), Z_WEIGHT),
        "b": LossTerm("flat loss", lambda inputs: inputs.labels.float(), Z_WEIGHT),
        "c": LossTerm("watched loss", lambda inputs: inputs.labels.float()),
    }
    assert function_violations(broken, V) == [
        "the function of 'mean loss' gives [] for 3 tokens; it must give [3]",
        "the function of 'flat loss' has no gradient; give the term no weight, to log it alone",
    ]


def test_worked_examples() -> None:
    assert doctest.testmod(terms).failed == 0
