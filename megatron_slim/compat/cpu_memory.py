"""Memory that tensors free, kept by the C library for those that come next."""

from __future__ import annotations

import ctypes
import platform

import torch

# Of malloc.h. What is kept: for the blocks of a streaming pass the most that glibc itself would come to keep; for a
# training step, whose logits and gradients are larger, enough for all of them.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
STREAMING, TRAINING = (16 << 20, 64 << 20), (64 << 20, 1 << 30)


def keep_freed_memory(kept: tuple[int, int]) -> None:
    """Have the C library keep what tensors free for those that come next; by itself glibc returns it to the system,
    and every tensor waits for its pages again.

    Args:
        kept: bytes of the largest block that is kept, and of all.
    """
    if platform.libc_ver()[0] == "glibc" and not torch.cuda.is_available():
        for option, size in zip((_MMAP_THRESHOLD, _TRIM_THRESHOLD), kept, strict=True):
            ctypes.CDLL(None).mallopt(option, size)
