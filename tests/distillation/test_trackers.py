"""What Megatron keeps for a whole process: no loss of one model, pass or mode gets into another's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch import Tensor

from megatron_slim.architecture.hidden_states import HiddenStatesModel
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.compat import runtime
from megatron_slim.distillation.model import DistillationModel
from megatron_slim.distillation.options import TEACHER_MAIN, TEACHER_MTP, DistillationOptions
from megatron_slim.testing import tiny_shape

KINDS = ("linear_attention", "full_attention")
LENGTH = 12
NAME = "global_load_balancing_loss"


@pytest.fixture(autouse=True)
def trackers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh ones for every test, and a scale of Megatron's own MTP loss as its schedules set it."""
    runtime.init_single_process()
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    monkeypatch.setattr(MTPLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    yield
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()


def build(model_class: type[GPTModel], layers: int, seed: int, stage: dict[str, Any], **fields: Any) -> Any:
    """A model of so many layers with random weights that the seed alone decides."""
    shape = tiny_shape(layer_types=(KINDS * layers)[:layers], vocab_size=128)
    torch.manual_seed(seed)
    if model_class is DistillationModel:
        stage = {"options": DistillationOptions(128), **stage}
    model = build_model(shape, transformer_config(shape, **fields), model_class=model_class, **stage)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
    return model


def tokens() -> tuple[Tensor, Tensor]:
    """Tokens and labels [b, s]."""
    stream = torch.randint(0, 128, (2, LENGTH + 1), generator=torch.Generator().manual_seed(7))
    return stream[:, :-1], stream[:, 1:]


PASSES: dict[str, tuple[type[GPTModel], dict[str, bool]]] = {
    "teacher, calibration": (HiddenStatesModel, {}),
    "first stage of a teacher": (HiddenStatesModel, {"post_process": False}),
    "first stage of a student": (DistillationModel, {"post_process": False}),
    "Megatron's own": (GPTModel, {}),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_without_labels_leaves_mtp_alone(name: str) -> None:
    """Megatron's model makes labels of the tokens then, and puts its MTP loss behind the hidden states."""
    model_class, stage = PASSES[name]

    def gradients(scale: float) -> dict[str, Tensor]:
        fields = {"mtp_loss_scaling_factor": scale, "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
        model = build(model_class, 2, 3, stage, **fields)
        output = model(tokens()[0], torch.arange(LENGTH)[None], None)
        main = output[:LENGTH] if model_class is not GPTModel else output
        (main * torch.linspace(-1, 1, main.shape[-1])).sum().backward()
        return {key: each.grad for key, each in model.named_parameters() if each.grad is not None}

    found, expected = gradients(0.1), gradients(0.0)
    same = all(torch.equal(gradient, expected[key]) for key, gradient in found.items())
    assert found and found.keys() == expected.keys() and same == (model_class is not GPTModel)
    if model_class is not GPTModel:
        assert not any(gradient.any() for key, gradient in found.items() if key.startswith("mtp."))
        assert not MTPLossLoggingHelper.tracker


@pytest.mark.parametrize("target", [TEACHER_MTP, TEACHER_MAIN])
@pytest.mark.parametrize("depth", [2, 7])
def test_teacher_and_student_of_different_depth_share_no_tracker(depth: int, target: str) -> None:
    """What is logged, counted and trained of load balancing is the student's alone; validation leaves none of it."""
    balanced = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01}

    def train(teacher: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        destroy_moe_metrics_tracker()
        distilled = {"options": DistillationOptions(128, mtp_kd_target=target), "teacher": teacher}
        student = build(DistillationModel, 4, 3, distilled, **balanced)
        inputs, labels = tokens()
        for training in (True, False, True, False):
            student.train(training)
            with torch.set_grad_enabled(training):
                terms = student(inputs, torch.arange(LENGTH)[None], None, labels)
            if training:
                (terms[0] if teacher is None else terms[0] + 0.0 * terms[1:].sum()).sum().backward()
        metrics = get_moe_metrics_tracker().metrics
        assert metrics.keys() == {NAME}
        gradients = {key: each.grad for key, each in student.named_parameters() if ".router." in key}
        counts = {key: each for key, each in student.named_buffers() if "global_tokens_per_expert" in key}
        return metrics[NAME].values.clone(), gradients, counts

    teacher = build(HiddenStatesModel, depth, 5, {}, **balanced)
    values, gradients, counts = train(teacher)
    own_values, own_gradients, own_counts = train(None)
    assert values.shape == (5,) and (values > 0).all() and torch.equal(values, own_values)  # the MTP block is the fifth
    assert len(counts) == 5 and all(torch.equal(count, own_counts[key]) for key, count in counts.items())
    assert all(torch.allclose(each, own_gradients[key], rtol=1e-5) for key, each in gradients.items())
    routers = [module for module in teacher.modules() if isinstance(module, TopKRouter)]
    assert len(routers) == depth + 1 and all(int(router.global_tokens_per_expert.sum()) == 0 for router in routers)
    assert not MTPLossLoggingHelper.tracker
