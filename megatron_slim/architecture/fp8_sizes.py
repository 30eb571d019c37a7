"""Which sizes a model may have where Transformer Engine multiplies in FP8.

A layer multiplies [rows, inputs] by [outputs, inputs]^T, each rank its part. Tensor cores read FP8 in 16 bytes: the
dimension that is summed over must be a multiple of 16. Forward that is the inputs; backward the outputs (gradient of
the inputs) and the rows (gradient of the weight). A dimension that only counts results must be a multiple of 8, as
results have 2 bytes. ``mxfp8`` quantises 32 numbers at a time along both dimensions, and every tensor must consist of
whole blocks. ``blockwise`` pads its blocks of 128, so nothing but the 16 is required. (Transformer Engine 2.20:
``assert_dim_for_fp8_exec``, ``CanonicalizeGemmInput``, ``MXFP8Quantizer``.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron_slim.aliases import Keywords
from megatron_slim.architecture.family import MTP_SUBLAYERS
from megatron_slim.architecture.kinds import SUBLAYERS
from megatron_slim.architecture.parallelism import layout_violations
from megatron_slim.architecture.prunable import HIDDEN
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.sublayer_kind import Side

Version = tuple[int, int]
# What each needs of a GPU (Transformer Engine 2.20): compute capability from, below, and CUDA version from.
RECIPES: dict[str, tuple[Version, Version | None, Version | None]] = {
    "delayed": ((8, 9), None, None),
    "tensorwise": ((8, 9), None, None),
    "blockwise": ((9, 0), None, (12, 9)),
    "mxfp8": ((10, 0), (12, 0), None),
}
TEACHER_RECIPES = tuple(recipe for recipe in RECIPES if recipe != "delayed")
REACH = 2048  # how far from a size allowed ones are looked for


@dataclass(frozen=True)
class SharedSide(Side):
    """A side that is multiplied in FP8, and among how many ranks.

    Attributes:
        ways: ranks that share it.
    """

    ways: int

    def unit(self, recipe: str, *, trained: bool) -> int:
        """What each rank's part must be a multiple of."""
        if recipe == "mxfp8":
            return 32
        # Megatron asks 16 of in_proj's outputs before they are sharded, trained or not: not worth a case of its own.
        return 16 if self.inputs or trained or self.ways == 1 else 8

    def fits(self, recipe: str, *, trained: bool) -> bool:
        """Whether every rank's part is such a multiple."""
        return self.total % (self.ways * self.unit(recipe, trained=trained)) == 0

    def __str__(self) -> str:
        ranks = f" on each of {self.ways} ranks" if self.ways > 1 else ""
        return f"{self.layer} has {self.total / self.ways:g} {'inputs' if self.inputs else 'outputs'}{ranks}"


def fp8_sides(shape: ModelShape, *, tp: int = 1, etp: int = 1) -> Iterator[SharedSide]:
    """Every different dimension of a model's FP8 layers.

    Router, gate of the shared expert, embedding, output layer, norms, convolution and delta rule stay in bf16 or fp32.
    """
    yield SharedSide("every layer", HIDDEN.field, shape.hidden_size, inputs=True, ways=1)
    if shape.mtp_num_layers:
        yield SharedSide("eh_proj of the MTP block", HIDDEN.field, shape.hidden_size, inputs=False, ways=tp)
    blocks = (*shape.sublayers, *[MTP_SUBLAYERS] * shape.mtp_num_layers)
    present = {kind for sublayers in blocks for kind in sublayers}
    for kind in (kind for name, kind in SUBLAYERS.items() if name in present):
        yield from (SharedSide(**vars(side), ways=etp) for side in kind.expert_fp8_sides(shape))
        yield from (SharedSide(**vars(side), ways=tp) for side in kind.fp8_sides(shape))


def size_violations(shape: ModelShape, recipe: str, *, tp: int = 1, etp: int = 1, trained: bool = True) -> list[str]:
    """Everything that keeps a model from running in FP8, one sentence for each size, with the nearest allowed ones.

    Args:
        shape: sizes of the model.
        recipe: one of `RECIPES`.
        tp: tensor parallel size.
        etp: tensor parallel size inside an expert.
        trained: it has a backward pass.

    >>> from megatron_slim.testing import tiny_shape
    >>> for sentence in size_violations(tiny_shape(linear_num_value_heads=8, moe_ffn_hidden_size=40), "delayed"):
    ...     print(sentence)
    linear_fc2 of experts has 40 inputs, not a multiple of 16: moe_ffn_hidden_size 40 would have to be 32 or 48
    """
    known = {*shape.violations(), *layout_violations(shape, tp=tp, etp=etp)}

    def misfits(candidate: ModelShape, tp: int, etp: int) -> dict[str, list[SharedSide]]:
        found: dict[str, list[SharedSide]] = {}
        for side in fp8_sides(candidate, tp=tp, etp=etp):
            if not side.fits(recipe, trained=trained):
                found.setdefault(side.field, []).append(side)
        return found

    sentences, found = [], misfits(shape, tp, etp)
    divisors = [size for size in range(1, tp) if tp % size == 0]
    smaller = max((size for size in divisors if not misfits(shape, size, min(etp, size))), default=0)
    for field, sides in found.items():

        def allows(value: int, field: str = field) -> bool:
            change: Keywords = {field: value}
            candidate = dataclasses.replace(shape, **change)
            if field in misfits(candidate, tp, etp):
                return False
            return known >= {*candidate.violations(), *layout_violations(candidate, tp=tp, etp=etp)}

        value, what = getattr(shape, field), " and ".join(map(str, sides))
        unit = max(side.unit(recipe, trained=trained) for side in sides)
        fixes = [f"{field} {value} would have to be {near}"] if (near := _either(_nearest(value, allows))) else []
        fixes += [f"tensor parallel size {smaller} would do"] if smaller else []
        sentences.append(f"{what}, not a multiple of {unit}" + (f": {', or '.join(fixes)}" if fixes else ""))
    return sentences


def row_violations(
    seq_length: int, micro_batch_size: int, recipe: str, *, ranks: int = 1, trained: bool = True
) -> list[str]:
    """What keeps micro-batches from running in FP8; tokens of experts are padded by Megatron.

    Args:
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        recipe: one of `RECIPES`.
        ranks: tensor-parallel ranks that share a sequence (sequence parallelism); each quantises its own part.
        trained: there is a backward pass.

    >>> row_violations(100, 1, "mxfp8")
    ['a micro-batch of 100 tokens is not a multiple of 32: --seq-length 100 would have to be 96 or 128']
    >>> row_violations(100, 4, "delayed")
    []
    """
    whole = 32 if recipe == "mxfp8" else 16 if trained else 8
    unit = math.lcm(whole, ranks * (32 if recipe == "mxfp8" else 8))

    def allows(length: int) -> bool:
        return length * micro_batch_size % unit == 0

    if allows(seq_length):
        return []
    near = _either(_nearest(seq_length, allows))
    fix = f": --seq-length {seq_length} would have to be {near}" if near else ""
    return [f"a micro-batch of {seq_length * micro_batch_size} tokens is not a multiple of {unit}{fix}"]


def _nearest(value: int, allows: Callable[[int], bool]) -> Iterator[int]:
    """The next smaller and the next larger size that is allowed, as far as there is one within reach."""
    for candidates in (range(value - 1, max(0, value - REACH), -1), range(value + 1, value + REACH)):
        yield from itertools.islice(filter(allows, candidates), 1)


def _either(values: Iterable[int]) -> str:
    return " or ".join(map(str, values))
