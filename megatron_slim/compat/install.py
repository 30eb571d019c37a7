"""Everything that is changed before a process uses Megatron; importing `megatron_slim.mcore` does it."""

from __future__ import annotations

import sys

import torch

from megatron_slim.compat import cpu_device, cpu_kernels, cpu_megatron, cpu_tensors, libraries
from megatron_slim.compat.table import FIXES
from megatron_slim.errors import SlimError
from megatron_slim.garbage import without_collection

_installed = False


def install() -> None:
    """Make this process able to run Megatron-Core.

    Idempotent. Where CUDA is available only Megatron's bugs and what is not installed are touched.

    Raises:
        SlimError: there is no CUDA, and Megatron was imported already: it has bound what had to be replaced.
    """
    global _installed
    if _installed:
        return
    if not torch.cuda.is_available() and "megatron.core" in sys.modules:
        raise SlimError(
            "megatron was imported first, and can no longer be prepared for a machine without CUDA",
            fix="import megatron_slim.mcore before megatron",
        )
    _installed = True
    with without_collection():  # most of it is importing Megatron
        if torch.cuda.is_available():
            libraries.fill_in()
        else:
            _prepare_cpu()
        for fix in FIXES:
            fix.apply()


def _prepare_cpu() -> None:
    """Torch first: Megatron binds some of it as it is imported."""
    cpu_tensors.disable_compilation()
    cpu_tensors.redirect()
    cpu_device.answer()
    libraries.DELTA_RULE.apply()
    libraries.ADAM.apply()
    cpu_megatron.prepare()
    for patch in cpu_kernels.PATCHES:
        patch.apply()
