"""Hidden states as bytes: exact in their type, and in FP8 no further off than e4m3 under a scale for every block."""

from __future__ import annotations

import doctest

import pytest
import torch

from megatron_slim.teacher_cache import stored_states
from megatron_slim.teacher_cache.stored_states import BLOCK, FP8, TYPES, decode, encode, row_bytes


def states(*extents: int) -> torch.Tensor:
    """Rows of very different sizes, with a few large numbers, zeros, and powers of two, where a scale changes."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(*extents, generator=generator) * torch.randn(*extents[:-1], 1, generator=generator).exp()
    found[..., ::37] *= 50
    found[0, 0] = 0
    found[0, 1] = 448.0 * 2.0 ** torch.arange(extents[-1]).remainder(3)
    found[0, 2] = 1e-30
    found[0, 3] *= 1e30
    return found


def test_examples() -> None:
    assert doctest.testmod(stored_states).failed == 0


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_type_keeps_what_it_holds(kind: str) -> None:
    given = states(2, 5, 96).to(TYPES[kind])
    content = encode(given, kind)
    assert content.dtype == torch.uint8 and content.shape == (2, 5, row_bytes(kind, 96))
    assert torch.equal(decode(content, kind, 96), given)


@pytest.mark.parametrize("hidden", [BLOCK, 3 * BLOCK, 192, 40])
def test_fp8_against_fp64(hidden: int) -> None:
    """e4m3 has 3 bits of mantissa: half a unit is 2^-4 of a number, or of 2^-6, its smallest normal one, of a block.

    A scale that is a power of two leaves a block's largest number above 224, so that smallest one is at most
    2^-6 / 224 of it.
    """
    given = states(2, 5, hidden)
    content = encode(given, FP8)
    assert content.shape[-1] == row_bytes(FP8, hidden)
    found = decode(content, FP8, hidden)
    assert found.dtype == torch.bfloat16 and found.shape == given.shape
    for start in range(0, hidden, BLOCK):
        exact, rounded = (each[..., start : start + BLOCK].double() for each in (given, found))
        largest = exact.abs().amax(-1, keepdim=True)
        allowed = 2.0**-4 * torch.maximum(exact.abs(), largest * 2.0**-6 / 224)
        assert ((exact - rounded).abs() <= allowed).all()


def test_fp8_is_exact_for_what_it_holds() -> None:
    """Every number of e4m3, under the largest scale and the smallest: decoded, and encoded again."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    row = every[every.isfinite()][:BLOCK]
    row[0] = 448.0
    for exponent in (-100, -1, 0, 1, 100):
        given = (row * 2.0**exponent)[None]
        assert torch.equal(decode(encode(given, FP8), FP8, BLOCK).float(), given)


def test_bytes_are_those_of_the_standard() -> None:
    """A block whose largest number is 448 x 2^3 has the scale 2^3, in E8M0 130, behind its numbers."""
    given = torch.zeros(1, BLOCK)
    given[0, 0], given[0, 1] = 448.0 * 8, -8.0
    content = encode(given, FP8)
    assert content[0, BLOCK:].tolist() == [130]
    assert content[0, :2].tolist() == [0b0_1111_110, 0b1_0111_000]
