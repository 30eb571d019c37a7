"""A tiny model of text and pictures, Qwen3.5-MoE as published: made by transformers, with an MTP block of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.testing import random_tensors, tiny_shape

# Sections of the grids interleave: 4 frequencies, of which the third grid has one.
SHAPE = tiny_shape("qwen3_5_moe_text", rotary_percent=0.5)
IMAGE, GRID = 120, (1, 4, 4)  # a picture of 4 x 4 patches, which are merged 2 x 2


def config(shape: ModelShape = SHAPE, image: int = IMAGE) -> dict[str, Any]:
    """config.json as the published ones are; tokens of pictures and films begin with ``image``."""
    pairs = int(shape.kv_channels * shape.rotary_percent) // 2
    text = {
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "float32",
        "eos_token_id": 1,
        "full_attention_interval": 4,
        "head_dim": shape.kv_channels,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "layer_types": list(shape.layer_types),
        "linear_conv_kernel_dim": shape.linear_conv_kernel_dim,
        "linear_key_head_dim": shape.linear_key_head_dim,
        "linear_num_key_heads": shape.linear_num_key_heads,
        "linear_num_value_heads": shape.linear_num_value_heads,
        "linear_value_head_dim": shape.linear_value_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": shape.max_position_embeddings,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        "mtp_num_hidden_layers": shape.mtp_num_layers,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts": shape.num_moe_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [(pairs + 2 - grid) // 3 for grid in range(3)],  # as interleaving gives them
            "partial_rotary_factor": shape.rotary_percent,
            "rope_theta": shape.rotary_base,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
        "vocab_size": shape.vocab_size,
    }
    vision = {
        "model_type": "qwen3_5_moe_vision",
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": shape.hidden_size,
        "patch_size": 4,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": image,
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
        "video_token_id": image + 1,
        "vision_config": vision,
        "vision_end_token_id": image + 3,
        "vision_start_token_id": image + 2,
    }


def write_vlm(path: Path, shape: ModelShape = SHAPE, seed: int = 0) -> Path:
    """Write it in fp32: experts of the trunk as one tensor for each layer, those of the MTP block one by one."""
    torch.manual_seed(seed)
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**config(shape))).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)  # transformers starts norms and biases all alike
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    own = random_tensors(shape, seed, torch.float32)
    tensors |= {name: tensor for name, tensor in own.items() if name.startswith("mtp.")}
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config(shape)))
    return path


def load_vlm(path: Path) -> Any:
    """Have transformers load it, nothing missing and nothing left."""
    model, info = Qwen3_5MoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def picture_and_text(seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a forward pass: text around one picture."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 100, (1, 9), generator=generator)
    ids = torch.cat([text[:, :4], torch.tensor([[122, *[IMAGE] * 4, 123]]), text[:, 4:]], dim=1)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([GRID]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def files_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor in the files of a directory."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
