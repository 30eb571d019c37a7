"""How files and messages name a number type."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, not ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
