"""Hidden states as bytes: fp32, bf16, or FP8 with one power of two for every block of a row.

A row in FP8 is its numbers as e4m3 and then the exponents of its blocks, as the MX formats of OCP store them (E8M0: a
byte, the exponent + 127). A scale that is a power of two rounds nothing itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8, BLOCK = "fp8", 128
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, FP8: torch.float8_e4m3fn}
_BIAS, _MOST = 127, 448.0  # of E8M0; the largest number of e4m3


def row_bytes(kind: str, hidden_size: int) -> int:
    """Bytes of one row.

    >>> row_bytes("fp32", 2048), row_bytes("bf16", 2048), row_bytes("fp8", 2048)
    (8192, 4096, 2064)
    """
    return hidden_size * TYPES[kind].itemsize + (_blocks(hidden_size) if kind == FP8 else 0)


def encode(states: Tensor, kind: str) -> Tensor:
    """The bytes uint8 [..., `row_bytes`] of finite hidden states [..., hidden], on their device."""
    if kind != FP8:
        return states.to(TYPES[kind]).contiguous().view(torch.uint8)
    hidden_size = states.shape[-1]
    blocks = F.pad(states.float(), (0, -hidden_size % BLOCK)).unflatten(-1, (-1, BLOCK))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1) / _MOST)
    # mantissa 2^exponent with a mantissa in [0.5, 1): at 0.5 half of that is enough.
    exponent = (exponent - (mantissa == 0.5).int()).clamp_(1 - _BIAS, _BIAS)
    scaled = torch.ldexp(blocks, -exponent[..., None]).flatten(-2)[..., :hidden_size]
    return torch.cat([scaled.to(TYPES[FP8]).view(torch.uint8), (exponent + _BIAS).to(torch.uint8)], dim=-1)


def decode(content: Tensor, kind: str, hidden_size: int) -> Tensor:
    """Hidden states [..., hidden] of the bytes that `encode` gave: in their type, of FP8 in bf16, which holds them."""
    if kind != FP8:
        return content.view(TYPES[kind])
    numbers, exponents = content.split([hidden_size, _blocks(hidden_size)], dim=-1)
    values = numbers.contiguous().view(TYPES[FP8]).bfloat16()
    blocks = F.pad(values, (0, -hidden_size % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = (exponents.short() << 7).view(torch.bfloat16)  # the exponent's place in a bf16
    return (blocks * scales[..., None]).flatten(-2)[..., :hidden_size]


def _blocks(hidden_size: int) -> int:
    return -(-hidden_size // BLOCK)
