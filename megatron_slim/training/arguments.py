"""Command line of training: Megatron's own arguments plus a small group of ours.

The model's shape is not typed in: it is read from the config.json that travels with every checkpoint, and handed to
Megatron as the flags that it stands for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from megatron_slim.architecture.shape import FULL_ATTENTION, LINEAR_ATTENTION, ModelShape, shape_from_hf_config
from megatron_slim.checkpoint.distributed_writer import HF_DIR
from megatron_slim.checkpoint.huggingface import CONFIG, INDEX, SINGLE, HFCheckpoint, read_config
from megatron_slim.cli import ToolParser
from megatron_slim.errors import SlimError

VOCAB_MULTIPLE = 128  # one padded vocabulary for every tensor parallel size that divides it


def padded_vocab_size(shape: ModelShape) -> int:
    """Rows of embedding and output layer in training, the same under every tensor parallel size up to 128."""
    return -(-shape.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def shape_directory(argv: list[str]) -> Path:
    """Directory whose config.json describes the student.

    Raises:
        SlimError: no argument names one.
    """
    early = ToolParser(add_help=False, allow_abbrev=False)
    for name in ("--hf-config", "--load", "--pretrained-checkpoint"):
        early.add_argument(name, type=Path)
    known, _ = early.parse_known_args(argv)
    if known.hf_config is not None:
        return Path(known.hf_config)
    for directory in (known.load, known.pretrained_checkpoint):
        if directory is not None and (directory / HF_DIR).is_dir():
            return Path(directory / HF_DIR)
    if known.pretrained_checkpoint is not None:
        return Path(known.pretrained_checkpoint)
    raise SlimError("no model shape", fix="give --hf-config, --pretrained-checkpoint or --load with a checkpoint in it")


def read_shape(directory: Path) -> ModelShape:
    """Shape of the model that a config.json describes.

    Where tensors lie beside it their names tell whether there is an MTP block, because published files do not say.
    """
    if any((directory / name).exists() for name in (INDEX, SINGLE)):
        return HFCheckpoint.open(directory).shape
    config = read_config(directory)
    depth = config.get("num_nextn_predict_layers", 0)
    return shape_from_hf_config(config, mtp_num_layers=depth, where=str(directory / CONFIG))


def model_flags(shape: ModelShape) -> list[str]:
    """A model's shape as Megatron's command line flags."""
    # Megatron's FLOP count, the only reader of this flag besides the config, wants the MTP blocks in the pattern.
    kinds = [*shape.layer_types, *[FULL_ATTENTION] * shape.mtp_num_layers]
    pattern = ",".join(str(int(kind == LINEAR_ATTENTION)) for kind in kinds)
    values: dict[str, Any] = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--ffn-hidden-size": shape.moe_ffn_hidden_size,
        "--num-attention-heads": shape.num_attention_heads,
        "--num-query-groups": shape.num_query_groups,
        "--kv-channels": shape.kv_channels,
        "--max-position-embeddings": shape.max_position_embeddings,
        "--position-embedding-type": "rope",
        "--rotary-base": int(shape.rotary_base),
        "--rotary-percent": shape.rotary_percent,
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.layernorm_epsilon,
        "--experimental-attention-variant": "gated_delta_net",
        "--linear-attention-freq": f"[{pattern}]",
        "--linear-conv-kernel-dim": shape.linear_conv_kernel_dim,
        "--linear-key-head-dim": shape.linear_key_head_dim,
        "--linear-value-head-dim": shape.linear_value_head_dim,
        "--linear-num-key-heads": shape.linear_num_key_heads,
        "--linear-num-value-heads": shape.linear_num_value_heads,
        "--num-experts": shape.num_moe_experts,
        "--moe-router-topk": shape.moe_router_topk,
        "--moe-ffn-hidden-size": shape.moe_ffn_hidden_size,
        "--moe-shared-expert-intermediate-size": shape.moe_shared_expert_intermediate_size,
        "--vocab-size": shape.vocab_size,
        "--make-vocab-size-divisible-by": 1,
        "--tokenizer-type": "NullTokenizer",
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
    }
    if shape.mtp_num_layers:
        values["--mtp-num-layers"] = shape.mtp_num_layers
    switches = (
        "--group-query-attention",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--qk-layernorm",
        "--apply-layernorm-1p",
        "--attention-output-gate",
        "--moe-shared-expert-gate",
    )
    return [str(word) for flag in values.items() for word in flag] + list(switches)


# What Megatron turns on by default and a CPU lacks, or (loader processes) has no cores to spare for.
CPU_FLAGS = (
    "--transformer-impl=local",
    "--distributed-backend=gloo",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--num-workers=0",
)


def default_flags() -> list[str]:
    """Flags that this kind of model wants and the command line may override by naming them itself."""
    flags = ["--moe-router-load-balancing-type=global_aux_loss", "--moe-token-dispatcher-type=alltoall"]
    flags += ["--moe-router-dtype=fp32", "--ckpt-format=torch_dist"]
    return [*flags, *CPU_FLAGS] if not torch.cuda.is_available() else [*flags, "--moe-grouped-gemm"]


def complete_argv(argv: list[str]) -> tuple[list[str], ModelShape]:
    """The command line that Megatron parses, and the student's shape.

    Raises:
        SlimError: a flag contradicts the shape, which config.json alone decides.
    """
    shape = read_shape(shape_directory(argv))
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    fixed = model_flags(shape)
    if clash := sorted(given & {word for word in fixed if word.startswith("--")}):
        raise SlimError(f"{', '.join(clash)} cannot be given", fix="the model's shape comes from its config.json")
    defaults = [*default_flags(), f"--moe-aux-loss-coeff={shape.router_aux_loss_coef}"]
    return [*(flag for flag in defaults if flag.split("=")[0] not in given), *fixed], shape


def install_argv(argv: list[str]) -> ModelShape:
    """Replace ``sys.argv``, which is what Megatron parses, by the completed command line."""
    flags, shape = complete_argv(argv)
    sys.argv[1:] = [*flags, *argv]
    return shape
