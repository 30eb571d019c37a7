"""What a run does without the libraries that belong on a GPU: Transformer Engine, apex, flash-linear-attention.

It trains without any of them, on Megatron's own layers, slower and with more memory; what cannot be done without is
refused before anything is built.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.ssm.gated_delta_net import gdn
from megatron.core.tensor_parallel import layers

from megatron_slim import linear_attention

NO_GRADIENT_FUSION = "--no-gradient-accumulation-fusion"
# What Megatron turns on by default and its own layers cannot do without kernels of Transformer Engine or apex.
LOCAL_FLAGS = (
    "--transformer-impl=local",
    NO_GRADIENT_FUSION,
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
)
# A CPU has no NCCL, and no cores to spare for processes that load data.
CPU_FLAGS = ("--distributed-backend=gloo", "--num-workers=0")
# Arguments that need Transformer Engine, and the values with which they do.
_ENGINE_ARGUMENTS = {
    "transformer_impl": ("transformer_engine",),
    "moe_grouped_gemm": (True,),
    "fp8": ("e4m3", "hybrid"),
    "fp4": ("e2m1",),
    "use_precision_aware_optimizer": (True,),
}
_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def kernel_flags() -> list[str]:
    """Megatron's flags that fit what is installed; the command line may override them."""
    if not torch.cuda.is_available():
        return [*LOCAL_FLAGS, *CPU_FLAGS]
    if not HAVE_TE:
        return list(LOCAL_FLAGS)
    # Megatron's own output layer wants apex for it, and refuses to be built with the fusion on.
    return ["--moe-grouped-gemm", *([] if layers._grad_accum_fusion_available else [NO_GRADIENT_FUSION])]


def missing_libraries() -> list[str]:
    """One line for each library that a GPU run goes without: what that costs, and where to get it."""
    if not torch.cuda.is_available():
        return []
    found = []
    if not HAVE_TE:
        found.append(
            "no Transformer Engine: Megatron's own layers, experts one after the other, whole matrices of attention "
            "scores, no FP8; it comes with NVIDIA's PyTorch image"
        )
    if HAVE_TE and not layers._grad_accum_fusion_available:
        found.append("no apex: gradients are added to main_grad by themselves; it comes with NVIDIA's PyTorch image")
    if gdn.chunk_gated_delta_rule is linear_attention.chunk_gated_delta_rule:
        found.append(
            "no flash-linear-attention: the gated delta rule in PyTorch, many times slower; pip install "
            "flash-linear-attention==0.6.0"
        )
    return found


def library_violations(args: Any) -> list[str]:
    """What these arguments of Megatron's ask for and cannot have here."""
    if HAVE_TE:
        return []
    asked = [
        _FLAGS.get(name, f"--{name.replace('_', '-')}")
        for name, values in _ENGINE_ARGUMENTS.items()
        if getattr(args, name, None) in values
    ]
    needs = "needs" if len(asked) == 1 else "need"
    return [f"{', '.join(asked)} {needs} Transformer Engine, which is not installed"] if asked else []
