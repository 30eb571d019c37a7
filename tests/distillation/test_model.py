"""Teacher and student in one model, against Megatron's own losses and an fp64 four-term reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_slim.mcore

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    roll_tensor,
)
from torch import Tensor

from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.mtp_masks import shift
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine
from megatron_slim.distillation.model import (
    TEACHER_MAIN,
    TEACHER_MTP,
    DistillationModel,
    DistillationOptions,
    HiddenStatesModel,
)
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

TEACHER = {"num_layers": 2, "layer_types": ("linear_attention", "full_attention"), "vocab_size": 101}
STUDENT = {**TEACHER, "hidden_size": 48, "num_moe_experts": 4}
PADDED = 128


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFCheckpoint]:
    runtime.init_single_process()
    root = tmp_path_factory.mktemp("distillation")
    found = {}
    for seed, (name, sizes) in enumerate({"teacher": TEACHER, "student": STUDENT}.items()):
        path = write_tiny_checkpoint(Path(root / name), tiny_shape(**sizes), seed=seed, dtype=torch.float32)
        found[name] = HFCheckpoint.open(path)
    return found


def build(
    checkpoint: HFCheckpoint, model_class: type[GPTModel], padded_vocab_size: int = PADDED, **stage: Any
) -> GPTModel:
    """A model with its weights; of a student, ``options`` and ``teacher`` are its own."""
    if model_class is DistillationModel:
        stage = {"options": DistillationOptions(checkpoint.shape.vocab_size), **stage}
    # No load balancing: its loss is attached to the graph behind the back of a comparison.
    config = transformer_config(checkpoint.shape, moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0)
    model = build_model(checkpoint.shape, config, padded_vocab_size=padded_vocab_size, model_class=model_class, **stage)
    if model.post_process:  # a stage by itself is not all of the checkpoint, and keeps its random weights
        load_hf_weights(model, checkpoint)
    return model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    stream = torch.randint(0, 101, (2, 25), generator=generator)
    mask = torch.ones(2, 24)
    mask[1, 20:] = 0.0
    return {"tokens": stream[:, :-1], "labels": stream[:, 1:], "mask": mask, "position_ids": torch.arange(24)[None]}


def gradients(model: GPTModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_lm_and_mtp_losses_and_gradients_are_megatrons(
    checkpoints: dict[str, HFCheckpoint], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's model has no padding columns: its own cross entropy would count them."""
    beta, checkpoint = 0.3, checkpoints["student"]
    theirs = build(checkpoint, GPTModel, padded_vocab_size=checkpoint.shape.vocab_size)
    # Megatron's factor for the fewer tokens of the MTP head comes from this mask (44 tokens, 42), ours does not.
    theirs.config.mtp_loss_scaling_factor = beta * (24 / 23) / (44 / 42)
    monkeypatch.setattr(MTPLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    MTPLossLoggingHelper.tracker.clear()
    per_token = theirs(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["mask"])
    lm = (per_token * batch["mask"]).sum() / batch["mask"].sum()
    lm.backward()

    ours = build(checkpoint, DistillationModel)
    stacked = ours(batch["tokens"], batch["position_ids"], None, batch["labels"])
    losses = TokenLosses.unstack(stacked, has_teacher=False)
    total, tokens, report = combine(losses, batch["mask"], LossWeights(kd_lambda=1.0, mtp_beta=beta))
    (total / tokens).backward()
    assert float(report["lm loss"][0] / tokens) == pytest.approx(lm.item(), rel=1e-6)
    mtp = MTPLossLoggingHelper.tracker["loss_values"][0].item()
    assert float(report["mtp lm loss"][0] / report["mtp lm loss"][1]) == pytest.approx(mtp, rel=1e-6)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        unpadded = found[name][: gradient.shape[0]]
        assert not found[name][gradient.shape[0] :].any()
        torch.testing.assert_close(unpadded, gradient, rtol=1e-4, atol=1e-7, msg=name)


def logits_of(model: GPTModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """fp64 logits [b, s, V] of every head of a model."""
    hidden = model(batch["tokens"], batch["position_ids"], None)
    return [model.output_layer(head)[0].transpose(0, 1).double()[..., :101] for head in model.heads(hidden)]


def cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    return -(target * log_p).sum(-1)


@pytest.mark.parametrize("target", [TEACHER_MTP, TEACHER_MAIN])
def test_four_terms_against_fp64(checkpoints: dict[str, HFCheckpoint], batch: dict[str, Tensor], target: str) -> None:
    weights = LossWeights(kd_lambda=0.8, mtp_beta=0.25)
    teacher = build(checkpoints["teacher"], HiddenStatesModel).eval()
    reference = build(checkpoints["student"], HiddenStatesModel)
    with torch.no_grad():
        teacher_main, teacher_mtp = (logits.softmax(-1) for logits in logits_of(teacher, batch))
    if target == TEACHER_MAIN:
        # What the teacher's main head says one position further on.
        teacher_mtp = torch.cat([teacher_main[:, 1:], torch.full_like(teacher_main[:, :1], torch.nan)], dim=1)
    main, mtp = (logits.log_softmax(-1) for logits in logits_of(reference, batch))
    mask, far_mask = batch["mask"].bool(), shift(batch["mask"], 1).bool()
    far_labels = roll_tensor(batch["labels"].clone())[0]
    terms = [
        -main.gather(-1, batch["labels"][..., None])[..., 0][mask].mean(),
        cross_entropy(main, teacher_main)[mask].mean(),
        -mtp.gather(-1, far_labels[..., None])[..., 0][far_mask].mean(),
        cross_entropy(mtp, teacher_mtp.nan_to_num())[far_mask].mean(),
    ]
    fewer = (24 / 23) / (44 / 42)  # MTP tokens count as 24/23 each, over the 44 of the main head; there are 42
    expected = 0.2 * terms[0] + 0.8 * terms[1] + 0.25 * fewer * (0.2 * terms[2] + 0.8 * terms[3])
    expected.backward()

    options = DistillationOptions(checkpoints["student"].shape.vocab_size, mtp_kd_target=target)
    student = build(checkpoints["student"], DistillationModel, options=options, teacher=teacher)
    stacked = student(batch["tokens"], batch["position_ids"], None, batch["labels"])
    total, tokens, report = combine(TokenLosses.unstack(stacked, has_teacher=True), batch["mask"], weights)
    (total / tokens).backward()
    names = ("lm loss", "logits distillation loss", "mtp lm loss", "mtp distillation loss")
    for name, wanted in zip(names, terms, strict=True):
        assert float(report[name][0] / report[name][1]) == pytest.approx(wanted.item(), rel=2e-6), name
    assert (total / tokens).item() == pytest.approx(expected.item(), rel=2e-6)
    found, wanted_gradients = gradients(student), gradients(reference)
    assert found.keys() == wanted_gradients.keys()
    for name, wanted in wanted_gradients.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_no_part_of_the_student(checkpoints: dict[str, HFCheckpoint]) -> None:
    plain = build(checkpoints["student"], DistillationModel)
    alone = {name for name, _ in plain.named_parameters()}, plain.sharded_state_dict().keys()
    teacher = build(checkpoints["teacher"], HiddenStatesModel)
    hidden_size = plain.config.hidden_size
    student = build(checkpoints["student"], DistillationModel, teacher=teacher).train()
    assert ({name for name, _ in student.named_parameters()}, student.sharded_state_dict().keys()) == alone
    assert student.config.hidden_size == hidden_size + teacher.config.hidden_size
    assert student.decoder.config.hidden_size == hidden_size
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def side_by_side(checkpoints: dict[str, HFCheckpoint], *, ahead: bool = False, **stage: Any) -> DistillationModel:
    """Student and teacher; as ``post_process=False`` has it, a stage that ends before the heads."""
    teacher = build(checkpoints["teacher"], HiddenStatesModel, **stage)
    options = DistillationOptions(checkpoints["student"].shape.vocab_size, teacher_ahead=ahead)
    student = build(checkpoints["student"], DistillationModel, options=options, teacher=teacher, **stage)
    assert isinstance(student, DistillationModel)
    return student


def saved_for_backward(model: DistillationModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """What a stage ends with, and how many bytes autograd keeps."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch["tokens"], batch["position_ids"], None)
    return output, sum(sizes.values())


def test_a_teacher_leaves_nothing_for_backward(checkpoints: dict[str, HFCheckpoint], batch: dict[str, Tensor]) -> None:
    """No tensor of its forward pass is kept, and what comes back in its place between stages is not computed with."""
    both = side_by_side(checkpoints, post_process=False)
    alone = build(checkpoints["student"], DistillationModel, post_process=False)
    assert isinstance(alone, DistillationModel)
    alone.load_state_dict(both.state_dict())
    (hidden, kept), (joined, kept_colocated) = (saved_for_backward(model, batch) for model in (alone, both))
    assert kept_colocated == kept > 0
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    hidden.backward(upstream)
    joined.backward(torch.cat([upstream, torch.full_like(joined[..., hidden.shape[-1] :], torch.nan)], dim=-1))
    found, wanted = gradients(both), gradients(alone)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    # What a later stage sends back for the teacher: zeros, without anything having been computed.
    received = joined.detach().requires_grad_()
    states = both.states_between_stages(received)
    assert not states["teacher"].requires_grad and states["teacher"].grad_fn is None
    states["student"].sum().backward()
    assert received.grad is not None and not received.grad[..., hidden.shape[-1] :].any()


def test_a_teacher_that_computed_ahead(checkpoints: dict[str, HFCheckpoint], batch: dict[str, Tensor]) -> None:
    """Training, the student has the pipeline to itself and the same losses; in evaluation it is as ever."""
    inputs = (batch["tokens"], batch["position_ids"], None, batch["labels"])
    colocated, ahead = side_by_side(checkpoints), side_by_side(checkpoints, ahead=True)
    joint = colocated.config.hidden_size
    assert ahead.config.hidden_size == ahead.decoder.config.hidden_size == joint - 64
    teacher = ahead.teacher
    assert teacher is not None
    weights = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    with torch.no_grad():
        states = teacher(*inputs[:3])
    wanted = colocated(*inputs)
    ahead.offload_teacher()
    away = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    assert torch.equal(ahead(*inputs, teacher_hidden=states), wanted)
    with pytest.raises(AssertionError):
        ahead(*inputs)
    ahead.eval()
    assert ahead.config.hidden_size == joint and torch.equal(ahead(*inputs), wanted)
    here = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    assert {name for name in away if away[name] == here[name]} == {"output_layer.weight"}
    ahead.train()
    assert ahead.config.hidden_size == joint - 64
    assert {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()} == away
    assert all(torch.equal(parameter, weights[name]) for name, parameter in teacher.named_parameters())


def test_a_checkpoint_holds_weights_alone(checkpoints: dict[str, HFCheckpoint]) -> None:
    state = build(checkpoints["student"], DistillationModel).sharded_state_dict()
    extra = {type(value) for key, value in state.items() if "_extra_state" in key}
    assert extra == {LocalNonpersistentObject}
