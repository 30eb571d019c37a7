"""Loss terms and their gradients against plain fp64 formulas, whole and sharded over ranks."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from megatron_slim.architecture.mtp_masks import shift
from megatron_slim.distillation import losses
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.testing import run_distributed
from tests.distillation.reference import _softmax, lm_and_kd_loss

V, PADDED, TOKENS = 37, 48, 11


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits [TOKENS, PADDED] with huge padding columns, labels, upstream gradients [2, TOKENS]."""
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(TOKENS, PADDED, generator=generator)
    teacher = 3 * torch.randn(TOKENS, PADDED, generator=generator)
    student[:, V:], teacher[:, V:] = 100.0, -50.0
    labels = torch.randint(0, V, (TOKENS,), generator=generator)
    return student, teacher, labels, torch.randn(2, TOKENS, generator=generator)


def reference(
    student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in fp64 by autograd: lm, kd, teacher lm, gradient of the student's logits."""
    wide = student.double().requires_grad_()
    log_s = wide[:, :V].log_softmax(-1)
    log_t = teacher.double()[:, :V].log_softmax(-1)
    lm = -log_s.gather(1, labels[:, None])[:, 0]
    kd = -(log_t.exp() * log_s).sum(-1)
    (gradient,) = torch.autograd.grad((upstream[0] * lm + upstream[1] * kd).sum(), wide)
    return lm.detach(), kd.detach(), -log_t.gather(1, labels[:, None])[:, 0], gradient


def ours(
    student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = student.clone().requires_grad_()
    lm, kd, teacher_lm = lm_and_kd_loss(student, teacher, labels, V, group)
    (upstream[0] * lm + upstream[1] * kd).sum().backward()
    assert student.grad is not None and not teacher_lm.requires_grad
    return lm.detach(), kd.detach(), teacher_lm, student.grad


def sharded(ranks: int) -> tuple[Tensor, ...]:
    """Body of one rank: its columns of the vocabulary; with three ranks the last holds nothing but padding."""
    student, teacher, labels, upstream = example()
    rank, columns = torch.distributed.get_rank(), PADDED // ranks
    mine = slice(rank * columns, (rank + 1) * columns)
    return ours(student[:, mine], teacher[:, mine], labels, upstream, torch.distributed.group.WORLD)


def assert_matches(found: tuple[Tensor, ...], gradient: Tensor) -> None:
    expected = reference(*example())
    for value, wanted in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected[3], rtol=2e-6, atol=2e-6)
    assert not gradient[:, V:].any()


def test_against_fp64() -> None:
    found = ours(*example(), None)
    assert_matches(found, found[3])


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shared_over_ranks(ranks: int) -> None:
    """4 ranks of 12 columns: the last one holds padding and one valid column; 37 = 3 * 12 + 1."""
    results = run_distributed(ranks, sharded, ranks)
    for result in results:
        for value, first in zip(result[:3], results[0][:3], strict=True):
            assert torch.equal(value, first)
    assert_matches(results[0], torch.cat([result[3] for result in results], dim=1))


def test_a_rank_with_padding_alone() -> None:
    shard = VocabShard.of(None, 16, 37)
    assert (shard.start, shard.valid) == (0, 16)
    valid, probabilities, _ = _softmax(torch.zeros(3, 16), VocabShard(48, 0, None))
    assert valid.shape == probabilities.shape == (3, 0)


def test_without_a_teacher_kd_is_zero_and_gradients_are_cross_entropys() -> None:
    student, _, labels, upstream = example()
    student.requires_grad_()
    lm, kd, _ = lm_and_kd_loss(student, None, labels, V)
    assert not kd.any()
    (lm * upstream[0]).sum().backward()
    wide = student.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide[:, :V], labels, reduction="none")
    (expected * upstream[0]).sum().backward()
    torch.testing.assert_close(lm.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-6, atol=2e-6)  # type: ignore[union-attr]


def test_kd_gradient_is_that_of_forward_kl() -> None:
    student, teacher, labels, _ = example(1)
    one = torch.stack([torch.zeros(TOKENS), torch.ones(TOKENS)])
    *_, gradient = ours(student, teacher, labels, one, None)
    wide = student.double().requires_grad_()
    log_t = teacher.double()[:, :V].log_softmax(-1)
    kl = torch.nn.functional.kl_div(wide[:, :V].log_softmax(-1), log_t, log_target=True, reduction="sum")
    kl.backward()
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=2e-6, atol=2e-6)


def test_bf16_logits_get_bf16_gradients_from_fp32_arithmetic() -> None:
    student, teacher, labels, upstream = example()
    *found, gradient = ours(student.bfloat16(), teacher.bfloat16(), labels, upstream, None)
    *expected, wanted = reference(student.bfloat16(), teacher.bfloat16(), labels, upstream)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8, atol=1e-6)


def test_combine_by_hand() -> None:
    """Two sequences of three tokens, the last token of the second masked; one MTP depth."""
    lm = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 600.0]])
    token_losses = TokenLosses(lm=(lm,), kd=(10 * lm,), teacher_lm=(lm / 2,), mtp_lm=(lm,), mtp_kd=(100 * lm,))
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    total, tokens, report = combine(token_losses, mask, LossWeights(kd_lambda=0.75, mtp_beta=0.3))
    # Main head: 1+2+3+4+5 = 15 over 5 tokens. MTP: positions 0, 1 of the first sequence and 0 of the second, whose
    # next-but-one token counts: 1+2+4 = 7, times 3/2 because depth 1 predicts 2 of 3 positions.
    mtp = 7 * 3 / 2
    assert float(tokens) == 5
    expected = 0.25 * 15 + 0.75 * 150 + 0.3 * (0.25 * mtp + 0.75 * 100 * mtp)
    assert float(total) == pytest.approx(expected, rel=1e-6)
    means = {name: float(value / count) for name, (value, count) in report.items()}
    assert means == pytest.approx(
        {
            "lm loss": 3.0,
            "logits distillation loss": 30.0,
            "teacher lm loss": 1.5,
            "mtp lm loss": 7 / 3,
            "mtp distillation loss": 700 / 3,
            "kd lambda": 0.75,
            "mtp beta": 0.3,
        },
        rel=1e-6,
    )


def test_a_batch_weighs_the_same_however_it_is_cut() -> None:
    """Masks as uneven as they come, one micro-batch without a token: sums of parts are the sums of the whole, in fp64.

    What is logged is then the plain mean over tokens, of every head its own.
    """
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(6, 4, 9, generator=generator, dtype=torch.float64)
    lm, kd, teacher_lm, *mtp = terms
    mask = torch.rand(4, 9, generator=generator) < torch.tensor([0.9, 0.5, 0.1, 0.0])[:, None]
    weights = LossWeights(kd_lambda=0.75, mtp_beta=0.3)

    def of(rows: slice) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        heads = [head[rows] for head in (lm, kd, teacher_lm, *mtp[:2], mtp[2], mtp[2])]
        of_main = dict(zip(("lm", "kd", "teacher_lm"), ((head,) for head in heads[:3]), strict=True))
        losses = TokenLosses(of_main, mtp_lm=tuple(heads[3:5]), mtp_kd=tuple(heads[5:]))
        return combine(losses, mask[rows].float(), weights)

    whole, parts = of(slice(None)), [of(slice(row, row + 1)) for row in range(4)]
    for found, wanted in ((sum(part[i] for part in parts), whole[i]) for i in (0, 1)):
        assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    for name, (value, count) in whole[2].items():
        summed = [sum(part[2][name][i] for part in parts) for i in (0, 1)]
        assert float(summed[0] / summed[1]) == pytest.approx(float(value / count), rel=1e-6), name
    # A depth counts where the main head does at this position and at all on the way (`mtp_mask`).
    ahead = [mask, *(torch.nn.functional.pad(mask, (0, depth))[:, depth:] for depth in (1, 2))]
    far = [ahead[0] & ahead[1], ahead[0] & ahead[1] & ahead[2]]
    plain = {"lm loss": lm[mask].mean(), "logits distillation loss": kd[mask].mean()}
    plain["mtp lm loss"] = torch.cat([mtp[0][far[0]], mtp[1][far[1]]]).mean()
    for name, value in plain.items():
        assert float(whole[2][name][0] / whole[2][name][1]) == pytest.approx(float(value), rel=1e-6), name


def test_without_a_teacher_lambda_is_zero() -> None:
    lm = torch.ones(1, 4)
    total, _, report = combine(
        TokenLosses(lm=(lm,), mtp_lm=(lm,)), torch.ones(1, 4), LossWeights(kd_lambda=1.0, mtp_beta=0.5)
    )
    assert float(total) == pytest.approx(4 + 0.5 * 4)  # three tokens of four positions, times 4/3
    assert "kd lambda" not in report and "logits distillation loss" not in report


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_stack_and_back(depths: int, has_teacher: bool) -> None:
    values = torch.randn(10, 2, 3)
    given = TokenLosses(lm=(values[0],))
    given |= {"kd": (values[1],), "teacher_lm": (values[2],)} if has_teacher else {}
    given |= {"mtp_lm": tuple(values[3 : 3 + depths])} if depths else {}
    given |= {"mtp_kd": tuple(values[6 : 6 + depths])} if depths and has_teacher else {}
    back = TokenLosses.unstack(given.stack(), has_teacher=has_teacher)
    assert torch.equal(back.stack(), given.stack())
    assert {key: len(heads) for key, heads in back.items()} == {key: len(heads) for key, heads in given.items()}


def test_worked_examples() -> None:
    assert doctest.testmod(losses, extraglobs={"torch": torch}).failed == 0
    assert shift(torch.ones(1, 3), 2).tolist() == [[1.0, 0.0, 0.0]]
