"""The fused losses against fp64 formulas by autograd: values and gradients, whole and sharded over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_slim.distillation.divergences import KDLoss
from megatron_slim.distillation.fused import DistillationInputs, Target, fused_losses
from megatron_slim.distillation.loss_options import FORWARD_KL, JSD, KD_LOSSES, REVERSE_KL, TOP_K
from megatron_slim.distillation.output_layer import OutputLayer
from megatron_slim.distillation.vocabulary import VocabShard
from megatron_slim.testing import run_distributed
from tests.distillation.reference import lm_and_kd_loss

V, ROWS, WIDTH, TEACHER_WIDTH, K = 37, 11, 5, 7, 4
PADDED, TEACHER_PADDED = 48, 60
KINDS = [KDLoss(kind, temperature, K) for kind in KD_LOSSES for temperature in (1.0, 2.5)]
# fp32 arithmetic against fp64: a few units in the last of 24 bits, on sums of 37 terms of order one.
CLOSE: dict[str, Any] = {"rtol": 5e-6, "atol": 5e-6}


class Example:
    """A student of two heads, a teacher of two heads, and upstream gradients; the last token of each row is masked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        self.hidden = [random(ROWS, WIDTH) for _ in range(2)]
        self.teacher_hidden = [random(ROWS, TEACHER_WIDTH) for _ in range(2)]
        self.weight, self.teacher_weight = random(PADDED, WIDTH), random(TEACHER_PADDED, TEACHER_WIDTH)
        self.weight[V:], self.teacher_weight[V:] = 100.0, -50.0
        self.labels = torch.randint(0, V, (2, ROWS), generator=generator)
        self.upstream = torch.randn(2, 2, ROWS, generator=generator)
        self.upstream[:, 0, -1] = self.upstream[:, 1, -3:] = 0.0


def targets(example: Example, ahead: int | None) -> tuple[Target, ...]:
    """Each head its own teacher's, or both the main one's, the second ``ahead`` rows further on."""
    if ahead is None:
        return tuple(Target(hidden, ((head, 0),)) for head, hidden in enumerate(example.teacher_hidden))
    return (Target(example.teacher_hidden[0], ((0, 0), (1, ahead))),)


def kd_reference(kd: KDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """The distillation loss of logits [..., V], from its definition."""
    log_q = (student / kd.temperature).log_softmax(-1)
    log_p = (teacher / kd.temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kd.kind == FORWARD_KL:
        value = -(p * log_q).sum(-1)
    elif kd.kind == REVERSE_KL:
        value = (q * (log_q - log_p)).sum(-1)
    elif kd.kind == JSD:
        log_m = ((p + q) / 2).log()
        value = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
    else:
        top = torch.zeros_like(p).scatter_(-1, p.topk(kd.top_k).indices, 1.0).bool()
        value = -(p * log_q * top).sum(-1) - (p * ~top).sum(-1) * (q * ~top).sum(-1).log()
    return value * kd.temperature**2


def reference(example: Example, kd: KDLoss, ahead: int | None) -> dict[str, Tensor]:
    """lm, kd, teacher lm and gradients in fp64, by autograd."""
    hidden = [each.double().requires_grad_() for each in example.hidden]
    weight = example.weight.double().requires_grad_()
    student = torch.stack(hidden) @ weight[:V].T
    teacher = torch.stack([each.double() @ example.teacher_weight[:V].double().T for each in example.teacher_hidden])
    if ahead is not None:
        teacher[1, : ROWS - ahead] = teacher[0, ahead:].clone()
    lm = -student.log_softmax(-1).gather(-1, example.labels[..., None])[..., 0]
    loss = kd_reference(kd, student, teacher)
    if ahead:
        keep = torch.arange(ROWS) < ROWS - ahead
        lm, loss = (torch.stack([term[0], term[1] * keep]) for term in (lm, loss))
    (example.upstream[0] * lm + example.upstream[1] * loss).sum().backward()
    teacher_lm = -teacher[0].log_softmax(-1).gather(-1, example.labels[0][:, None])[:, 0]
    found = {"lm": lm, "kd": loss, "teacher_lm": teacher_lm, "weight": weight.grad}
    found |= {f"hidden{i}": each.grad for i, each in enumerate(hidden)}
    return {name: value.detach() for name, value in found.items() if value is not None}


def ours(
    example: Example, kd: KDLoss, ahead: int | None, *, chunk: int = 4, announced: bool = True, main_grad: bool = False
) -> dict[str, Tensor]:
    """The same by the fused losses, on this rank's rows of the weights."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks = torch.distributed.get_world_size() if group else 1
    rank = torch.distributed.get_rank() if group else 0
    layers = []
    for weight in (example.weight, example.teacher_weight if ranks == 1 else example.teacher_weight[:PADDED]):
        part = weight.chunk(ranks)[rank].clone()
        layers.append(OutputLayer(part.requires_grad_(), VocabShard.of(group, len(part), V)))
    hidden = [each.clone().requires_grad_() for each in example.hidden]
    weight, parameter = layers[0].weight, layers[0].weight
    if main_grad:
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones_like(weight, dtype=torch.float32), False  # type: ignore[attr-defined]
    inputs = DistillationInputs(example.labels, targets(example, ahead), layers[1], kd, chunk)
    upstream = (example.upstream[0], example.upstream[1])
    lm, loss, teacher_lm = fused_losses(layers[0], hidden, inputs, upstream if announced else None)
    (upstream[0] * lm + upstream[1] * loss).sum().backward()
    assert layers[1].weight.grad is None and not teacher_lm.requires_grad
    found = {"lm": lm, "kd": loss, "teacher_lm": teacher_lm, "weight": weight.grad}
    if main_grad:
        assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        found["weight"] = parameter.main_grad - 1.0  # type: ignore[attr-defined]
    found |= {f"hidden{i}": each.grad for i, each in enumerate(hidden)}
    return {name: value.detach() for name, value in found.items() if value is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name].double(), wanted, **(tolerance or CLOSE), msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("kd", KINDS, ids=lambda kd: f"{kd.kind}-{kd.temperature}")
@pytest.mark.parametrize("announced", [True, False])
def test_against_fp64(kd: KDLoss, announced: bool) -> None:
    """Padding of 11 and 23 columns, of huge logits; chunks of 4, 4 and 3 rows."""
    assert_same(ours(Example(), kd, None, announced=announced), reference(Example(), kd, None))


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_one_teacher_head_for_two(chunk: int, ahead: int) -> None:
    """Rows further on supervise the second head, across chunks; nothing supervises its last rows."""
    kd = KDLoss()
    assert_same(ours(Example(), kd, ahead, chunk=chunk), reference(Example(), kd, ahead))


def on_ranks() -> list[dict[str, Tensor]]:
    """Body of one rank: every loss, and each target."""
    found = [ours(Example(), kd, None, main_grad=kd.temperature == 1.0) for kd in KINDS]
    return [*found, ours(Example(), KDLoss(), 2, announced=False)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shared_over_ranks(ranks: int) -> None:
    """With 4 ranks of 12 columns the last one holds a single column that counts; gradients of inputs are summed."""
    results = run_distributed(ranks, on_ranks)
    cases = [(kd, None) for kd in KINDS] + [(KDLoss(), 2)]
    for case, (kd, ahead) in enumerate(cases):
        of_ranks = [result[case] for result in results]
        for name in ("lm", "kd", "teacher_lm"):
            assert all(torch.equal(each[name], of_ranks[0][name]) for each in of_ranks)
        merged = dict(of_ranks[0], weight=torch.cat([each["weight"] for each in of_ranks]))
        merged |= {name: sum(each[name] for each in of_ranks) for name in ("hidden0", "hidden1")}  # type: ignore[misc]
        assert_same(merged, reference(Example(), kd, ahead))


def test_a_rank_with_padding_alone() -> None:
    """Its columns count nowhere, and nothing it does with none of them fails."""
    example, nothing = Example(), VocabShard(V, 0, None)
    for kd in KINDS:
        layer, teacher = (
            OutputLayer(example.weight.requires_grad_(), nothing),
            OutputLayer(example.teacher_weight, nothing),
        )
        hidden = [each.clone().requires_grad_() for each in example.hidden]
        inputs = DistillationInputs(example.labels, targets(example, None), teacher, kd, 4)
        fused_losses(layer, hidden, inputs, (example.upstream[0], example.upstream[1]))


@pytest.mark.parametrize("announced", [True, False])
def test_the_weights_gradient_is_added_to_main_grad(announced: bool) -> None:
    kd = KDLoss()
    assert_same(ours(Example(), kd, None, announced=announced, main_grad=True), reference(Example(), kd, None))


@pytest.mark.parametrize("tied", [True, False])
def test_what_ddp_gets_in_place_of_a_gradient(tied: bool) -> None:
    """Something to fire its hook, and zero where it is added nevertheless."""
    weight = torch.nn.Parameter(torch.randn(PADDED, WIDTH))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(PADDED, WIDTH), False  # type: ignore[attr-defined]
    weight.zero_out_wgrad = tied  # type: ignore[attr-defined]
    example, fired = Example(), []
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad))
    inputs = DistillationInputs(example.labels, (Target(None, ((0, 0), (1, 0))),), None, KDLoss(), 4)
    lm, _, _ = fused_losses(OutputLayer(weight, VocabShard.of(None, PADDED, V)), example.hidden, inputs)
    lm.sum().backward()
    assert len(fired) == 1 and fired[0].shape == weight.shape
    assert weight.main_grad.any() and (not tied or not fired[0].any())  # type: ignore[attr-defined]


def test_backward_refuses_another_gradient_than_was_announced() -> None:
    example = Example()
    hidden = [each.requires_grad_() for each in example.hidden]
    inputs = DistillationInputs(example.labels, (Target(None, ((0, 0), (1, 0))),), None, KDLoss(), 4)
    ones, zeros = torch.ones(2, ROWS), torch.zeros(2, ROWS)
    layer = OutputLayer(example.weight, VocabShard.of(None, PADDED, V))
    lm, _, _ = fused_losses(layer, hidden, inputs, (ones, zeros))
    with pytest.raises(RuntimeError, match="another gradient"):
        (lm.sum() * 1.001).backward()


@pytest.mark.parametrize("kd", KINDS[::2], ids=lambda kd: kd.kind)
@pytest.mark.parametrize("main_grad", [True, False])
def test_bf16(kd: KDLoss, main_grad: bool) -> None:
    """Logits are rounded to bf16, as Megatron's are, so references see rounded logits; losses are sums in fp32."""
    example = Example(torch.bfloat16)
    found = ours(example, kd, None, main_grad=main_grad)
    assert found["lm"].dtype == found["kd"].dtype == torch.float32 and found["hidden0"].dtype == torch.bfloat16
    # Logits near 10 are good to 2**-8 of that: 0.03; gradients of order one are as well.
    assert_same(found, reference(example, kd, None), rtol=2**-5, atol=0.08)


def test_bf16_losses_are_those_of_the_rounded_logits() -> None:
    example = Example(torch.bfloat16)
    found = ours(example, KDLoss(), None)
    student = torch.stack([hidden @ example.weight.T for hidden in example.hidden])[..., :V]
    teacher = torch.stack([hidden @ example.teacher_weight.T for hidden in example.teacher_hidden])[..., :V]
    lm, kd, _ = lm_and_kd_loss(student, teacher, example.labels, V)
    torch.testing.assert_close(found["lm"], lm, **CLOSE)
    torch.testing.assert_close(found["kd"], kd, **CLOSE)


def test_top_k_of_all_tokens_is_forward_kl_and_of_one_is_two_events() -> None:
    whole, forward = (ours(Example(), kd, None) for kd in (KDLoss(TOP_K, 1.0, V), KDLoss()))
    for name, value in forward.items():
        torch.testing.assert_close(whole[name], value, **CLOSE, msg=name)
    one = ours(Example(), KDLoss(TOP_K, 1.0, 1), None)
    assert bool((one["kd"] < forward["kd"]).all())


def test_the_rest_of_a_confident_student_keeps_its_digits() -> None:
    """Nearly all probability on the teacher's top tokens: one minus their sum would be rounding error."""
    from megatron_slim.distillation.divergences import top_k

    logits = torch.tensor([[30.0, 29.0, 0.0, -1.0, 1.0]])
    logs, probabilities = logits.log_softmax(-1), logits.softmax(-1)
    value, _ = top_k(logs.clone(), logs, VocabShard(0, 5, None), probabilities, probabilities, k=2)
    p = logits.double().softmax(-1)[0]
    rest = p[2:].sum()
    expected = -(p[:2] * p[:2].log()).sum() - rest * rest.log()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6) and math.isfinite(value.item())


def test_evaluation_makes_no_gradients() -> None:
    example = Example()
    with torch.no_grad():
        found = ours_without_backward(example)
    assert not found[0].requires_grad


def ours_without_backward(example: Example) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.nn.Parameter(example.weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(PADDED, WIDTH), False  # type: ignore[attr-defined]
    inputs = DistillationInputs(example.labels, (Target(None, ((0, 0), (1, 0))),), None, KDLoss(), 4)
    layer = OutputLayer(weight, VocabShard.of(None, PADDED, V))
    found = fused_losses(layer, example.hidden, inputs, (example.upstream[0], example.upstream[1]))
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
    return found


def _most_probable_of_ties(ranks: int) -> list[list[int]]:
    """On a rank: which columns of the whole vocabulary it holds of those that count."""
    from megatron_slim.distillation.divergences import _most_probable

    columns = TIED.shape[1] // ranks
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    shard = VocabShard(rank * columns, columns, torch.distributed.group.WORLD if ranks > 1 else None)
    found, mine = _most_probable(TIED[:, shard.start : shard.start + columns].clone(), 6, shard)
    return [sorted((shard.start + row[chosen]).tolist()) for row, chosen in zip(found, mine, strict=True)]


# All 512 equal; few values, so that many are equal at the least that counts; all different.
_few = torch.randint(0, 12, (1, 512), generator=torch.Generator().manual_seed(0)).float()
TIED = torch.cat([torch.zeros(1, 512), _few, torch.randperm(512, generator=torch.Generator().manual_seed(1))[None]])


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_equally_probable_tokens_the_first_count(ranks: int) -> None:
    expected = [sorted(range(512), key=lambda column, row=row: (-row[column], column))[:6] for row in TIED.tolist()]
    of_ranks = [_most_probable_of_ties(1)] if ranks == 1 else run_distributed(ranks, _most_probable_of_ties, ranks)
    found = [sorted(column for row in rows for column in row) for rows in zip(*of_ranks, strict=True)]
    assert found == [sorted(row) for row in expected]
