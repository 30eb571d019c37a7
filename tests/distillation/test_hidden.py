"""Hidden-state distillation in one model, against formulas in fp64 and a graph that was put together by hand."""

from __future__ import annotations

import argparse
import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.checkpoint.torch_dist_names import HIDDEN_KD
from megatron_slim.compat import runtime
from megatron_slim.distillation import layer_pairs
from megatron_slim.distillation.hidden import HiddenInputs, Projection
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine
from megatron_slim.distillation.model import DistillationModel, HiddenStatesModel
from megatron_slim.distillation.options import DistillationOptions
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.distillation.test_model import build, gradients

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "layer_types": ("linear_attention", "full_attention") * 2,
    "vocab_size": 101,
}
PAIRS = ((0, 2), (2, 1), (2, 3))  # two of them of one layer
WEIGHT, SCALE = 0.7, 4.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFCheckpoint]:
    runtime.init_single_process()
    root = tmp_path_factory.mktemp("hidden")
    shapes = {"teacher": tiny_shape(**SIZES), "student": tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4)}
    return {
        name: HFCheckpoint.open(write_tiny_checkpoint(Path(root / name), shape, seed=seed, dtype=torch.float32))
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    """Two micro-batches of other masks."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for masked in (5, 11):
        stream = torch.randint(0, 101, (2, 25), generator=generator)
        mask = torch.ones(2, 24)
        mask[1, :masked] = 0.0
        found.append({"tokens": stream[:, :-1], "labels": stream[:, 1:], "mask": mask})
    return found


def distilled(checkpoints: dict[str, HFCheckpoint], kind: str | None = None) -> DistillationModel:
    options = DistillationOptions(SIZES["vocab_size"])
    if kind is not None:
        options = replace(options, hidden_pairs=PAIRS, hidden_loss=kind, seed=5)
    teacher = build(checkpoints["teacher"], HiddenStatesModel)
    student = build(checkpoints["student"], DistillationModel, options=options, teacher=teacher)
    assert isinstance(student, DistillationModel)
    return student.train()


def run(model: DistillationModel, batch: dict[str, Tensor], inputs: HiddenInputs | None = None) -> Tensor:
    """The four terms, summed over tokens and multiplied by the loss scale, as Megatron's schedules do."""
    stacked = model(batch["tokens"], torch.arange(24)[None], None, batch["labels"], hidden_inputs=inputs)
    losses = TokenLosses.unstack(stacked, has_teacher=True)
    return combine(losses, batch["mask"], LossWeights(kd_lambda=0.8, mtp_beta=0.25))[0] * SCALE


def reference_losses(hidden: Tensor, weight: Tensor, target: Tensor, kind: str) -> Tensor:
    """[b, s] in fp64, from [s, b, H] and [s, b, Ht]."""
    projected, target = torch.einsum("sbh,th->bst", hidden.double(), weight.double()), target.double().transpose(0, 1)
    if kind == "mse":
        return ((projected - target) ** 2).sum(-1) / target.shape[-1]
    lengths = (projected**2).sum(-1).sqrt() * (target**2).sum(-1).sqrt()
    return 1 - (projected * target).sum(-1) / lengths


@pytest.mark.parametrize(("kind", "recompute"), [("cosine", None), ("mse", "uniform"), ("cosine", "block")])
def test_values_and_gradients_against_fp64(
    checkpoints: dict[str, HFCheckpoint],
    batches: list[dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    recompute: str | None,
) -> None:
    """Both micro-batches go forward before the first goes back, as in a pipeline; layers may be recomputed."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(SCALE))
    student, reference = distilled(checkpoints, kind), distilled(checkpoints)
    assert student.hidden_kd is not None and reference.teacher is not None
    weights = {
        pair: student.hidden_kd.projections[f"{pair[0]}-{pair[1]}"].weight.detach().clone().requires_grad_()
        for pair in PAIRS
    }
    states: dict[tuple[str, int], Tensor] = {}
    for name, model in (("student", reference), ("teacher", reference.teacher)):
        for layer, module in enumerate(model.decoder.layers):
            module.register_forward_hook(
                lambda module, args, output, at=(name, layer): states.__setitem__(at, output[0])
            )
    wanted, total = dict.fromkeys(PAIRS, 0.0), torch.zeros(())
    for batch in batches:
        total = total + run(reference, batch)
        for pair in PAIRS:
            own, target = states["student", pair[0]], states["teacher", pair[1]].detach()
            loss = (reference_losses(own, weights[pair], target, kind) * batch["mask"]).sum()
            wanted[pair] += loss.item()
            total = total + SCALE * WEIGHT / len(PAIRS) * loss
    total.backward()

    if recompute is not None:
        own = student.decoder.config
        own.recompute_granularity, own.recompute_method, own.recompute_num_layers = "full", recompute, 1
    forward = [run(student, batch, HiddenInputs(batch["mask"], WEIGHT)) for batch in batches]
    for part in forward:
        part.backward()
    for pair in PAIRS:
        assert student.hidden_kd.sums[pair].item() == pytest.approx(wanted[pair], rel=1e-6)
        found = student.hidden_kd.projections[f"{pair[0]}-{pair[1]}"].weight.grad
        torch.testing.assert_close(found, weights[pair].grad, rtol=1e-4, atol=1e-6)
    found_gradients = gradients(student)
    for name, gradient in gradients(reference).items():
        # Sums over tokens times a loss scale: some hundred times the gradients of a mean.
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_validation_and_the_teacher_check_pass_by(
    checkpoints: dict[str, HFCheckpoint], batches: list[dict[str, Tensor]]
) -> None:
    student, plain = distilled(checkpoints, "cosine").eval(), distilled(checkpoints).eval()
    assert student.hidden_kd is not None
    with torch.no_grad():
        assert torch.equal(run(student, batches[0]), run(plain, batches[0]))
    assert not student.hidden_kd.sums and student.hidden_kd._now is None


def test_projections_are_trained_saved_and_not_part_of_the_model(checkpoints: dict[str, HFCheckpoint]) -> None:
    student, plain = distilled(checkpoints, "cosine"), distilled(checkpoints)
    extra = {f"{HIDDEN_KD}projections.{own}-{other}.weight" for own, other in PAIRS}
    assert dict(student.named_parameters()).keys() - dict(plain.named_parameters()).keys() == extra
    assert {key for key in student.sharded_state_dict() if key.startswith(HIDDEN_KD)} == extra
    before = [parameter.clone() for parameter in student.hidden_kd.parameters()]  # type: ignore[union-attr]
    load_hf_weights(student, checkpoints["student"])
    assert all(map(torch.equal, before, student.hidden_kd.parameters()))  # type: ignore[union-attr]


def test_the_start_of_a_projection(checkpoints: dict[str, HFCheckpoint]) -> None:
    """The same for a seed wherever random numbers have come from; it keeps lengths; equal widths start as one."""
    teacher, student = (
        build(checkpoints["teacher"], HiddenStatesModel),
        build(checkpoints["student"], DistillationModel),
    )
    first = Projection(student, teacher, 1).weight
    torch.rand(3)
    assert torch.equal(first, Projection(student, teacher, 1).weight)
    assert not torch.equal(first, Projection(student, teacher, 2).weight)
    vectors = torch.randn(1000, 48, generator=torch.Generator().manual_seed(0))
    lengths = (vectors @ first.T).norm(dim=1) / vectors.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1.0, abs=0.05)  # 64 x 48 numbers: 1 / sqrt(3072) is 0.02
    assert torch.equal(Projection(teacher, teacher, 1).weight, torch.eye(64))


def test_pairs_on_the_command_line() -> None:
    assert doctest.testmod(layer_pairs).failed == 0
    for text in ("", "1", "1:2,", "1:2:3", "a:1", "-1:2", "1:1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="as in 2:5"):
            layer_pairs.parse_layer_pairs(text)
