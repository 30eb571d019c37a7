"""Operations counted from the table, against PyTorch's counter on the modules that run."""

from __future__ import annotations

from typing import Any

import megatron_slim.mcore

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_slim.architecture.backward import step_flops
from megatron_slim.architecture.flops import (
    FUSED,
    TORCH,
    Recompute,
    block_flops,
    head_flops,
    mtp_flops,
    student_flops,
    teacher_flops,
)
from megatron_slim.architecture.layer_specs import build_model, transformer_config
from megatron_slim.architecture.parts import TrainOnly
from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.compat import runtime
from megatron_slim.compat.linear_attention import chunk_gated_delta_rule
from megatron_slim.distillation.losses import LossWeights, TokenLosses, combine, gradients_of_total
from megatron_slim.distillation.model import DistillationModel, HiddenStatesModel
from megatron_slim.distillation.options import DistillationOptions
from megatron_slim.testing import tiny_shape
from megatron_slim.training.frozen import freeze

LENGTH, BATCH = 64, 2
SIZES = {"num_layers": 2, "layer_types": (LINEAR_ATTENTION, FULL_ATTENTION), "hidden_size": 128}
STUDENT = tiny_shape(**SIZES)
TEACHER = tiny_shape(**{**SIZES, "hidden_size": 160}, num_moe_experts=16, moe_router_topk=3)


def build(
    shape: ModelShape, model_class: type[HiddenStatesModel], *, own: dict[str, Any] | None = None, **fields: object
) -> HiddenStatesModel:
    """A model of a configuration with these fields; ``own`` are arguments of its class."""
    runtime.init_single_process()
    quiet = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    model = build_model(shape, transformer_config(shape, **quiet, **fields), model_class=model_class, **(own or {}))
    assert isinstance(model, HiddenStatesModel)
    return model


def tokens() -> dict[str, torch.Tensor]:
    stream = torch.randint(0, 120, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(LENGTH)[None].expand(BATCH, -1)
    return {"input_ids": stream[:, :-1], "labels": stream[:, 1:], "position_ids": position_ids}


def per_token(counter: FlopCounterMode, name: str = "Global") -> float:
    return sum(counter.get_flop_counts()[name].values()) / (BATCH * LENGTH)


def counting() -> FlopCounterMode:
    """PyTorch's counter, and what it does not know: in-place and oneDNN's products, fused attention on a CPU.

    Attention is counted as half of all pairs of positions, the part that a causal mask leaves.
    """

    def added(total: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    def linear(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * rows[0] * rows[1] * weight[0]

    def attention(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
        batch, heads, length, size = query
        return 4 * batch * heads * length * key[2] * size // 2

    def attention_backward(d_output: torch.Size, query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
        return 2 * attention(query, key)  # without the scores, which it computes again

    aten = torch.ops.aten
    known = {
        aten.addmm_: added,
        torch.ops.mkldnn._linear_pointwise: linear,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


@pytest.fixture(scope="module")
def forward() -> FlopCounterMode:
    """One forward pass of the student, both heads."""
    model, batch = build(STUDENT, HiddenStatesModel), tokens()
    with counting() as counter:
        hidden = model(batch["input_ids"], batch["position_ids"], None)
        for head in model.heads(hidden):
            model.output_layer(head)
    return counter


def test_full_attention_is_counted_exactly(forward: FlopCounterMode) -> None:
    found = block_flops(STUDENT, STUDENT.sublayers[1], LENGTH, TORCH)
    assert per_token(forward, "HiddenStatesModel.decoder.layers.1") == sum(found.values())
    attention = per_token(forward, "HiddenStatesModel.decoder.layers.1.self_attention.core_attention")
    assert attention == found["core_attn"] == block_flops(STUDENT, STUDENT.sublayers[1], LENGTH, FUSED)["core_attn"]


@pytest.mark.parametrize("layer", [0, 1])
def test_experts_are_counted_exactly(forward: FlopCounterMode, layer: int) -> None:
    found = block_flops(STUDENT, STUDENT.sublayers[layer], LENGTH, TORCH)
    at = f"HiddenStatesModel.decoder.layers.{layer}.mlp"
    for name in ("router", "experts", "shared_experts"):
        assert per_token(forward, f"{at}.{name}") == found[name] > 0, name


def test_gated_delta_net(forward: FlopCounterMode) -> None:
    found = block_flops(STUDENT, STUDENT.sublayers[0], LENGTH, TORCH)
    counted = per_token(forward, "HiddenStatesModel.decoder.layers.0.self_attention")
    assert counted == found["projections"] + found["delta_rule"]


def test_the_delta_rule_alone() -> None:
    """With the chunk of the kernel that runs; other head counts and sizes of keys and values."""
    shape = tiny_shape(linear_num_value_heads=6, linear_key_head_dim=32, linear_value_head_dim=48)
    made = [torch.randn(BATCH, LENGTH, 6, size) for size in (32, 32, 48)]
    decay, write = torch.rand(2, BATCH, LENGTH, 6)
    with counting() as counter:
        chunk_gated_delta_rule(*made, -decay, write)
    # The inverse of a chunk's triangle is not a product.
    assert per_token(counter) == block_flops(shape, (LINEAR_ATTENTION,), LENGTH, TORCH)["delta_rule"]


def test_heads_and_mtp_block(forward: FlopCounterMode) -> None:
    assert per_token(forward, "HiddenStatesModel.output_layer") == 2 * head_flops(STUDENT)
    block = block_flops(STUDENT, STUDENT.sublayers[1], LENGTH, TORCH)
    assert per_token(forward, "HiddenStatesModel.mtp") == mtp_flops(STUDENT) + sum(block.values())


def test_the_table_of_a_family_without_delta_net_and_shared_experts() -> None:
    shape = tiny_shape("qwen3_moe", num_layers=2)
    model, batch = build(shape, HiddenStatesModel), tokens()
    with counting() as counter:
        model.output_layer(model(batch["input_ids"], batch["position_ids"], None))
    assert per_token(counter) == teacher_flops(shape, LENGTH, TORCH, runs_mtp=True).total


RECOMPUTE = {
    "none": {},
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.filterwarnings("ignore:recompute_method == 'block'")
@pytest.mark.parametrize("name", RECOMPUTE)
def test_a_training_step_of_teacher_and_student(name: str) -> None:
    """Forward, backward and recomputation of the student, and the teacher's forward pass."""
    fields, batch = RECOMPUTE[name], tokens()
    own = {"options": DistillationOptions(STUDENT.vocab_size), "teacher": build(TEACHER, HiddenStatesModel)}
    student = build(STUDENT, DistillationModel, own=own, **fields)
    mask, weights = torch.ones(BATCH, LENGTH), LossWeights(kd_lambda=0.8, mtp_beta=0.3)
    expected = gradients_of_total(mask, weights, STUDENT.mtp_num_layers, has_teacher=True)
    with counting() as counter:
        stacked = student(batch["input_ids"], batch["position_ids"], None, batch["labels"], expected)
        losses = TokenLosses.unstack(stacked, has_teacher=True)
        combine(losses, mask, weights)[0].backward()
    recompute = Recompute(
        granularity=fields.get("recompute_granularity"),
        method=fields.get("recompute_method"),
        num_layers=fields.get("recompute_num_layers", 1),
        modules=tuple(fields.get("recompute_modules", ())),
    )
    flops = student_flops(STUDENT, LENGTH, TORCH, recompute)
    whole = flops.of_stage(0, 2) + flops.last + teacher_flops(TEACHER, LENGTH, TORCH, runs_mtp=True).total
    assert per_token(counter) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", ["none", "experts", "full"])
@pytest.mark.parametrize(
    "words", ["experts", "router@1", "attention", "delta-net", "norms@1", "output", "mtp", "embedding"]
)
def test_a_step_that_trains_some_parts(words: str, name: str) -> None:
    """What is frozen has no gradient of weights, and nothing goes on to where nothing needs it."""
    fields, batch, only = RECOMPUTE[name], tokens(), TrainOnly.of(words)
    # Before an MTP block Megatron gives hidden states a gradient, whether or not anything needs it.
    shape = STUDENT.replace(mtp_num_layers=0) if words == "output" else STUDENT
    own = {"options": DistillationOptions(shape.vocab_size)}
    student = build(shape, DistillationModel, own=own, **fields)
    freeze(student, shape, only)
    mask, weights = torch.ones(BATCH, LENGTH), LossWeights(kd_lambda=0.8, mtp_beta=0.3)
    expected = gradients_of_total(mask, weights, shape.mtp_num_layers, has_teacher=False)
    with counting() as counter:
        stacked = student(batch["input_ids"], batch["position_ids"], None, batch["labels"], expected)
        combine(TokenLosses.unstack(stacked, has_teacher=False), mask, weights)[0].backward()
    modules = tuple(fields.get("recompute_modules", ()))
    recompute = Recompute(fields.get("recompute_granularity"), fields.get("recompute_method"), modules=modules)
    flops = step_flops(shape, LENGTH, TORCH, recompute, only)
    # Megatron's function for a router's product computes the gradient of the weight even if it is frozen.
    frozen = [key for key, parameter in student.named_parameters() if "router" in key and not parameter.requires_grad]
    wasted = block_flops(shape, shape.sublayers[1], LENGTH, TORCH)["router"]
    assert per_token(counter) - flops.total in [wasted * count for count in range(1 + len(frozen))]
    assert flops.total < student_flops(shape, LENGTH, TORCH, recompute).total


def test_all_parts_are_all() -> None:
    for shape in (STUDENT, TEACHER, tiny_shape("glm4_moe")):
        parts = "embedding,blocks,norms,output" + (",mtp" if shape.mtp_num_layers else "")
        whole = student_flops(shape, LENGTH)
        assert step_flops(shape, LENGTH, only=TrainOnly.of(parts)).total == pytest.approx(whole.total, rel=1e-12)
        assert step_flops(shape, LENGTH) == whole
