"""What a run cannot do without a library or a GPU; `compat.libraries` stands in for some."""

from __future__ import annotations

import importlib.util
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
    """Arguments of Megatron's that it would take, and then fail in the middle of building or saving the model."""
    return _engine_violations(args) + _saving_violations(args)


def _engine_violations(args: Namespace) -> list[str]:
    if HAVE_TE:
        return []
    flags = [f"--{name.replace('_', '-')}" for name, value in _NEED_IT.items() if getattr(args, name, None) == value]
    if not flags:
        return []
    needs = "needs" if len(flags) == 1 else "need"
    return [
        f"{', '.join(flags)} {needs} Transformer Engine, which is not installed (megatron-slim doctor says what is)"
    ]


def _saving_violations(args: Namespace) -> list[str]:
    """A checkpoint that another process is to write, where there can be none."""
    if not args.async_save:
        return []
    found = []
    if not args.use_persistent_ckpt_worker:
        found.append("--async-save needs --use-persistent-ckpt-worker, without which Megatron ignores it")
    if not torch.cuda.is_available():
        found.append("--async-save needs a GPU: the process that writes ends without one, and the run waits for it")
    if args.async_strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        found.append("--async-save needs nvidia-resiliency-ext, which is not installed, or --async-strategy mcore")
    return found
