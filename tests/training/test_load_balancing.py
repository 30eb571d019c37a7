"""Megatron's load-balancing loss against transformers' ``load_balancing_loss_func``: values, gradients, the factor."""

from __future__ import annotations

from pathlib import Path

import megatron_slim.mcore

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint, torch_dist_to_hf
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.files import read_json, to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint
from megatron_slim.training.arguments import complete_argv, load_balancing_note

TOP_K, EXPERTS, LAYERS, TOKENS, COEFFICIENT = 2, 8, 4, 12, 0.7
BATCH, LENGTH = 2, 24


def preferring(*pairs: tuple[int, int]) -> Tensor:
    """Logits [token, expert]: every token prefers one of the pairs, in turn, and has opinions on the others."""
    logits = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    for token in range(TOKENS):
        logits[token, list(pairs[token % len(pairs)])] += 5.0
    return logits


def transformers_own(layers: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """Value and gradients by layer."""
    layers = tuple(each.clone().requires_grad_() for each in layers)
    value = load_balancing_loss_func(layers, EXPERTS, TOP_K)
    assert isinstance(value, Tensor)
    return value.item(), list(torch.autograd.grad(value, layers))


def megatrons(layers: tuple[Tensor, ...], kind: str) -> tuple[float, list[Tensor]]:
    """Its value as it is logged, the mean over layers, and gradients by layer; both without the coefficient."""
    runtime.init_single_process()
    shape = tiny_shape(num_layers=LAYERS, mtp_num_layers=0, moe_router_topk=TOP_K, num_moe_experts=EXPERTS)
    config = transformer_config(shape, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=COEFFICIENT)
    groups, tracker = ProcessGroupCollection.use_mpu_process_groups(), get_moe_metrics_tracker()
    gradients = []
    tracker.clear()
    for number, logits in enumerate(layers):
        router, own = TopKRouter(config, groups), logits.clone().requires_grad_()
        router.set_layer_number(number + 1)
        probabilities, _ = router.routing(own)
        (0.0 * probabilities.sum()).backward()
        assert own.grad is not None
        gradients.append(own.grad / COEFFICIENT)
    (entry,) = (each for each in tracker.metrics.values() if each.values.any())
    value = entry.values.mean().item()
    tracker.clear()
    return value, gradients


@pytest.mark.parametrize("kind", ["global_aux_loss", "aux_loss"])
def test_layers_in_the_same_balance_differ_by_two_factors(kind: str) -> None:
    """Megatron's value is transformers' over the top-k; its gradient transformers' times layers over top-k."""
    layers = (preferring((0, 1), (0, 2), (3, 4)),) * LAYERS
    value, gradients = megatrons(layers, kind)
    reference, expected = transformers_own(layers)
    assert value > 1.5  # 1 is balance
    assert value == pytest.approx(reference / TOP_K, rel=1e-6)
    for gradient, each in zip(gradients, expected, strict=True):
        assert (gradient - each * LAYERS / TOP_K).norm() < 1e-5 * gradient.norm()


def test_transformers_does_not_see_collapse_that_differs_by_layer() -> None:
    """Every layer uses two experts alone, another two each: balance to transformers, collapse to Megatron."""
    layers = tuple(preferring((2 * layer, 2 * layer + 1)) for layer in range(LAYERS))
    value, gradients = megatrons(layers, "global_aux_loss")
    reference, blind = transformers_own(layers)
    assert reference == pytest.approx(TOP_K, rel=1e-6)  # as if every expert had its share
    assert value > 0.9 * EXPERTS / TOP_K  # the worst there is, which all layers being like the first is to both
    assert transformers_own(layers[:1] * LAYERS)[0] == pytest.approx(TOP_K * value, rel=0.02)
    assert max(float(each.norm()) for each in blind) < 1e-6 < 1e-3 < min(float(each.norm()) for each in gradients)


def routers_of(model: GPTModel) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def gradients_in_a_model(directory: Path, kind: str, *, per_token: bool) -> dict[str, Tensor]:
    """Gradients of all parameters by load balancing alone: Megatron's, or without it (none) of our formula.

    The formula is transformers' function of each layer alone, over the top-k, added up, the MTP block's included.
    """
    runtime.init_single_process()
    checkpoint = open_checkpoint(directory)
    shape = checkpoint.shape
    coefficient = 0.0 if kind == "none" else COEFFICIENT
    config = transformer_config(
        shape,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=coefficient,
        mtp_loss_scaling_factor=0.0,
        calculate_per_token_loss=per_token,
    )
    model, logits = build_model(shape, config), []
    load_hf_weights(model, checkpoint)
    for router in routers_of(model):
        gating = router.gating
        router.gating = lambda inputs, gating=gating: logits.append(gating(inputs)) or logits[-1]
    tokens = torch.randint(0, shape.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    output = model(tokens, torch.arange(LENGTH)[None].expand(BATCH, -1), None)
    loss = 0.0 * output.sum()
    if kind == "none":
        assert len(logits) == shape.num_layers + 1
        each = (load_balancing_loss_func((own.flatten(0, -2),), EXPERTS, shape.moe_router_topk) for own in logits)
        loss = loss + sum(each) * COEFFICIENT / shape.moe_router_topk
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("per_token", [False, True])
def test_in_a_whole_model_it_is_transformers_loss_of_every_layer_alone(tmp_path: Path, per_token: bool) -> None:
    """The MTP block's layer is one of them. Per token, Megatron divides by the tokens later."""
    shape = tiny_shape(num_layers=2, layer_types=("linear_attention", "full_attention"), moe_router_topk=3)
    directory = write_tiny_checkpoint(tmp_path / "hf", shape, dtype=torch.float32)
    ours = gradients_in_a_model(directory, "global_aux_loss", per_token=per_token)
    expected = gradients_in_a_model(directory, "none", per_token=per_token)
    moved = [name for name, gradient in expected.items() if gradient.norm() > 1e-6]
    assert len([name for name in moved if "router" in name]) == 3 and len(moved) > 20
    for name in moved:
        reference = expected[name] * (BATCH * LENGTH if per_token else 1)
        torch.testing.assert_close(ours[name], reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()), msg=name)


def test_the_coefficient_of_config_json_is_taken_as_it_is_and_printed(tmp_path: Path) -> None:
    shape = tiny_shape(num_layers=8, router_aux_loss_coef=0.003)
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(shape)))
    given = ["--hf-config", str(tmp_path)]
    assert "--moe-aux-loss-coeff=0.003" in complete_argv(given)[0]
    note = load_balancing_note(shape, given, "global_aux_loss")
    assert note is not None and "--moe-aux-loss-coeff 0.003" in note and "4 times" in note and "0.00075" in note
    assert load_balancing_note(shape, [*given, "--moe-aux-loss-coeff=0.1"], "aux_loss") is None
    assert load_balancing_note(shape, [*given, "--moe-aux-loss-coeff", "0.1"], ["aux_loss"]) is None
    assert load_balancing_note(shape, given, "none") is None
    assert load_balancing_note(shape.replace(router_aux_loss_coef=0.0), given, "aux_loss") is None
    argv, _ = complete_argv([*given, "--moe-aux-loss-coeff", "0.1"])
    assert not [word for word in argv if word.startswith("--moe-aux-loss-coeff")]


def test_the_coefficient_survives_conversion(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(num_layers=4, router_aux_loss_coef=0.003))
    hf_to_torch_dist(source, tmp_path / "dist")
    torch_dist_to_hf(tmp_path / "dist", tmp_path / "back")
    assert read_json(tmp_path / "back" / "config.json")["router_aux_loss_coef"] == 0.003


def test_a_run_says_it_once(workplace, reference) -> None:  # type: ignore[no-untyped-def]
    assert reference["lm loss"]
    text = [line for line in workplace.log("one").read_text().splitlines() if line.startswith("load balancing: ")]
    assert text == [load_balancing_note(read_shape(workplace.student), [], "global_aux_loss")]
