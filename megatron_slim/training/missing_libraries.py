"""What a run on a GPU does without Transformer Engine; `compat.libraries` sees to the others."""

from __future__ import annotations

from argparse import Namespace

import megatron_slim.mcore

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

NOTE = (
    "note: Transformer Engine is not installed: Megatron's own layers run, experts one after the other and with whole "
    "matrices of attention scores (megatron-slim doctor)"
)
# Arguments that need it, in addition to those of FP8, and the value with which they do.
_NEED_IT = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True, "use_precision_aware_optimizer": True}


def library_note() -> str | None:
    """One line where a GPU runs slower layers than it could."""
    return NOTE if torch.cuda.is_available() and not HAVE_TE else None


def library_violations(args: Namespace) -> list[str]:
    """Arguments of Megatron's that it would take, and then fail in the middle of building the model."""
    if HAVE_TE:
        return []
    flags = [f"--{name.replace('_', '-')}" for name, value in _NEED_IT.items() if getattr(args, name, None) == value]
    if not flags:
        return []
    needs = "needs" if len(flags) == 1 else "need"
    return [
        f"{', '.join(flags)} {needs} Transformer Engine, which is not installed (megatron-slim doctor says what is)"
    ]
