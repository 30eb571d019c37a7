"""The model on Megatron-Core against transformers': logits and gradients of trunk and MTP head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_slim.architecture.rope import Yarn
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.architecture.table import weights
from megatron_slim.architecture.weight import Weight
from megatron_slim.checkpoint.huggingface import HFCheckpoint
from megatron_slim.checkpoint.layout import from_megatron
from megatron_slim.checkpoint.loading import load_hf_weights
from megatron_slim.compat import runtime
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.mtp_oracle import load_mtp, mtp_hidden, named
from tests.sizes import ODD

MTP_LOSS_SCALE = 0.3
# Largest logits are about 2; fp32 sums of different order over up to 6 layers differ by a few 1e-6.
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # relative to the gradient's norm, per tensor

SHAPES = {
    **{family: tiny_shape(family) for family in FAMILIES},
    "odd and aperiodic, grouped heads, unnormalised gates": tiny_shape(**ODD),
    "one layer of each, one key-value head, odd experts": tiny_shape(
        num_layers=3,
        layer_types=(LINEAR_ATTENTION, LINEAR_ATTENTION, FULL_ATTENTION),
        vocab_size=151,
        num_query_groups=1,
        kv_channels=32,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=3,
        num_moe_experts=7,
        moe_router_topk=3,
        moe_shared_expert_intermediate_size=80,
        rotary_base=1e7,
    ),
    # 98 positions are three times the original length; eight frequencies, of which some are left alone, some not.
    "YaRN, half of the head rotates": tiny_shape(rotary_percent=0.5, kv_channels=32, rope_scaling=Yarn(4.0, 32, 1.3)),
    "no MTP block": tiny_shape(num_layers=1, layer_types=(FULL_ATTENTION,), mtp_num_layers=0, vocab_size=130),
    "Qwen3.5-MoE, odd and aperiodic, grouped heads": tiny_shape(
        "qwen3_5_moe_text", **{key: value for key, value in ODD.items() if key != "norm_topk_prob"}
    ),
    "Qwen3-MoE, odd, one key-value head, unnormalised gates": tiny_shape(
        "qwen3_moe",
        num_layers=3,
        hidden_size=48,
        vocab_size=101,
        num_attention_heads=6,
        num_query_groups=1,
        kv_channels=24,
        num_moe_experts=7,
        moe_router_topk=3,
        rotary_base=1e6,
        norm_topk_prob=False,
    ),
    "GLM-4.5, two dense layers, groups of experts, plain heads": tiny_shape(
        "glm4_moe",
        num_layers=5,
        num_dense_layers=2,
        vocab_size=137,
        num_query_groups=1,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_shared_expert_intermediate_size=64,
        qk_layernorm=False,
        moe_router_topk_scaling_factor=2.5,
    ),
    "GLM-4.5 without biases of attention": tiny_shape("glm4_moe", add_qkv_bias=False, rotary_percent=0.5),
    "Qwen3-MoE, YaRN": tiny_shape("qwen3_moe", rope_scaling=Yarn(8.0, 32, 1.2, 4.0, 0.5, truncate=False)),
}


def _fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' in-memory names: the experts of a layer in two tensors."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        count = sum(name.startswith(f"{prefix}.experts.") for name in tensors) // 3
        experts = [
            {part: tensors[f"{prefix}.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            for e in range(count)
        ]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in experts])
        fused[f"{prefix}.experts.down_proj"] = torch.stack([e["down"] for e in experts])
    return fused


@dataclass
class Results:
    """What one implementation computed: logits by head, the loss, gradients under transformers' names."""

    logits: dict[str, Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]


def _reference(directory: Path, tokens: Tensor) -> Results:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    hidden = model.model(tokens[:, :-1]).last_hidden_state
    logits, block = {"main": model.lm_head(hidden)}, dict[str, Tensor]()
    shape = HFCheckpoint.open(directory).shape
    if shape.mtp_num_layers:
        mtp = load_mtp(model)
        logits["mtp"] = model.lm_head(mtp_hidden(mtp, hidden, tokens[:, :-1]))
        block = named(mtp.named_parameters(), shape)
    loss = _loss(logits, tokens)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in [*model.named_parameters(), *block.items()]}
    return Results(logits, loss, gradients)  # type: ignore[arg-type]


def _parameter(model: nn.Module, weight: Weight, shape: ModelShape) -> Iterator[Tensor]:
    named = dict(model.named_parameters())
    key = weight.key.replace(".transformer_layer.", ".mtp_model_layer.")
    for expert in range(shape.num_moe_experts) if weight.stacked else [0]:
        yield named[key.replace(".experts.experts.", f".experts.local_experts.{expert}.")]


def _megatron(directory: Path, tokens: Tensor, padded_vocab_size: int) -> Results:
    from megatron_slim.architecture.layer_specs import build_model, transformer_config

    checkpoint = HFCheckpoint.open(directory)
    shape = checkpoint.shape
    # Without labels GPTModel derives them and attaches an MTP loss of its own: its scale must be zero here.
    config = transformer_config(shape, moe_aux_loss_coeff=0.0, mtp_loss_scaling_factor=0.0)
    model = build_model(shape, config, padded_vocab_size=padded_vocab_size)
    load_hf_weights(model, checkpoint)
    # The output layer runs on the MTP block's hidden states first. Megatron's cross entropy works in place: clone.
    seen: list[Tensor] = []
    model.output_layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].clone()))
    length = tokens.shape[1] - 1
    model(tokens[:, :-1], torch.arange(length)[None].expand(len(tokens), -1), None)
    *heads, main = (output.transpose(0, 1)[..., : shape.vocab_size] for output in seen)
    logits = {"main": main}
    if heads:
        logits["mtp"] = heads[0][:, :-1]
    loss = _loss(logits, tokens)
    loss.backward()
    return Results(logits, loss, _gradients(model, shape))


def _loss(logits: dict[str, Tensor], tokens: Tensor) -> Tensor:
    loss = F.cross_entropy(logits["main"].flatten(0, 1), tokens[:, 1:].flatten())
    if "mtp" in logits:
        loss = loss + MTP_LOSS_SCALE * F.cross_entropy(logits["mtp"].flatten(0, 1), tokens[:, 2:].flatten())
    return loss


def _gradients(model: nn.Module, shape: ModelShape) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for weight in (weight for weight in weights(shape) if not weight.buffer):
        parts = [parameter.grad for parameter in _parameter(model, weight, shape)]
        gradient = torch.stack(parts) if weight.stacked else parts[0]  # type: ignore[arg-type]
        assert gradient is not None, weight.key
        found |= from_megatron(weight, shape, gradient[: weight.shape(shape)[0]])
    return _fuse_experts(found)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """Reference and Megatron on the same checkpoint and tokens; 98 positions are 3 chunks and a bit."""
    runtime.init_single_process()
    shape = SHAPES[request.param]
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), shape, seed=7, dtype=torch.float32)
    tokens = torch.randint(0, shape.vocab_size, (2, 99), generator=torch.Generator().manual_seed(1))
    padded = -(-shape.vocab_size // 64) * 64
    return _reference(directory, tokens), _megatron(directory, tokens, padded)


def test_logits(results: tuple[Results, Results]) -> None:
    reference, ours = results
    assert ours.logits.keys() == reference.logits.keys()
    for head, logits in reference.logits.items():
        assert float(logits.detach().abs().max()) > 1.0
        difference = float((ours.logits[head] - logits).detach().abs().max())
        assert difference <= LOGIT_TOLERANCE, (head, difference)


def test_loss_and_gradients(results: tuple[Results, Results]) -> None:
    reference, ours = results
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-6, atol=0)
    assert ours.gradients.keys() == reference.gradients.keys()
    for name, gradient in reference.gradients.items():
        difference = float((ours.gradients[name] - gradient).norm() / gradient.norm())
        # Both decay parameters sum over all tokens with cancellation, in fp32 in either kernel.
        limit = 5 * GRADIENT_TOLERANCE if name.endswith(("A_log", "dt_bias")) else GRADIENT_TOLERANCE
        assert difference <= limit, (name, difference)


def test_padding_of_the_vocabulary_changes_nothing(tmp_path: Path) -> None:
    runtime.init_single_process()
    shape = tiny_shape(num_layers=1, layer_types=(FULL_ATTENTION,), vocab_size=100)
    write_tiny_checkpoint(tmp_path, shape, dtype=torch.float32)
    tokens = torch.arange(40).reshape(2, 20)
    unpadded, padded = _megatron(tmp_path, tokens, 100), _megatron(tmp_path, tokens, 256)
    for head in ("main", "mtp"):
        torch.testing.assert_close(padded.logits[head], unpadded.logits[head], rtol=0, atol=1e-6)
