"""Parameters that a rank holds, counted from the architecture table (no torch).

`build` counts those of the modules themselves; this is for the many layouts that are looked at on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache

from megatron_slim.architecture.family import LAYERS, MTP_SUBLAYERS
from megatron_slim.architecture.matrices import has_rest, polar_flops
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.architecture.parts import EMBEDDING, MTP_PART, NORMS, OUTPUT, Place, TrainOnly, parts_of_kind
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import rows_of
from megatron_slim.architecture.weight import Weight

FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Count:
    """Elements of parameters on one rank: ``expert`` ones have data-parallel groups of their own.

    Attributes:
        dense: of all but routed experts.
        expert: of these.
        rest: of dense parameters that are not, or not only, matrices of an optimizer of matrices.
        dense_polar: operations of one step of a polar iteration for every matrix that is not an expert's.
        expert_polar: of experts'.
    """

    dense: int = 0
    expert: int = 0
    rest: int = field(default=0, compare=False)
    dense_polar: int = field(default=0, compare=False)
    expert_polar: int = field(default=0, compare=False)

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Count)))

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


class Counter:
    """Counts parts of one model, as one rank of a layout holds them."""

    def __init__(self, shape: ModelShape, tp: int, ep: int, only: TrainOnly | None = None) -> None:
        """Set up for a model under tensor and expert parallelism, experts not split; count what ``only`` says."""
        self.shape = shape.replace(vocab_size=padded_vocab_size(shape))
        self.tp, self.ep, self.only = tp, ep, only
        family = shape.family
        self.sublayers = {kind: self._rows(rows_of(shape, kind)) for kind in family.rows}
        self.first = self._part(EMBEDDING, family.first_rows)
        self.norm = self._part(NORMS, (row for row in family.last_rows if row.key == FINAL_NORM))
        self.output = self._part(OUTPUT, (row for row in family.last_rows if row.key != FINAL_NORM))
        of_mtp = [row for kind in MTP_SUBLAYERS if kind in family.rows for row in rows_of(shape, kind)]
        self.mtp = self._part(MTP_PART, (*family.mtp_rows, *of_mtp))
        self._of_layers: dict[tuple[str, int, frozenset[str] | None], Count] = {}

    def _part(self, part: str, rows: Iterable[Weight]) -> Count:
        """Of rows outside of the layers."""
        return self._rows(rows) if self.only is None or self.only.trains(Place(part)) else Count()

    def _rows(self, rows: Iterable[Weight], block: ModelShape | None = None) -> Count:
        """Of rows, in a block with these sizes."""
        found, shape = Count(), block or self.shape
        for row in (row for row in rows if not row.buffer):
            numel, products = row.numel(shape), polar_flops(row, shape.sizes)
            if row.stacked:
                experts = len(row.experts(shape)) // self.ep
                found += Count(expert=numel // self.ep, expert_polar=products * experts)
            else:
                ways = 1 if row.tp_dim is None else self.tp
                numel //= ways
                found += Count(numel, rest=numel if has_rest(row) else 0, dense_polar=products // ways)
        return found

    def _layer(self, layer: int, kinds: Iterable[str]) -> Count:
        """Of a transformer block: what is counted of it."""
        block, found = self.shape.in_block(f"{LAYERS}{layer}"), Count()
        parts = None if self.only is None else self.only.parts_of_layer(layer)
        for kind in kinds:
            key = kind, block.num_moe_experts, parts
            if key not in self._of_layers:
                named = parts_of_kind(self.shape, kind)
                rows = (row for row in rows_of(block, kind) if parts is None or named[row.key] in parts)
                self._of_layers[key] = self._rows(rows, block)
            found += self._of_layers[key]
        return found

    def stage(self, start: int, stop: int, *, is_first: bool, is_last: bool) -> Count:
        """Of a pipeline stage with the layers from ``start`` up to ``stop``.

        An MTP block on another stage than the first has an embedding of its own there, a copy of the first one's.
        With an MTP block, Megatron puts the final norm where the last layer is, and else on the last stage.
        """
        found = Count()
        for layer, kinds in enumerate(self.shape.sublayers[start:stop], start):
            found += self._layer(layer, kinds)
        if is_first:
            found += self.first
        if is_last:
            found += self.output
            for _ in range(self.shape.mtp_num_layers):
                found += self.mtp
            if self.shape.mtp_num_layers and not is_first:
                found += self.first
        holds_last_layer = start < stop == self.shape.num_layers
        if holds_last_layer if self.shape.mtp_num_layers else is_last:
            found += self.norm
        return found

    def stages(self, layers: Sequence[int]) -> list[Count]:
        """Of every virtual stage, in the order of the forward pass, by how many layers it holds."""
        found, start = [], 0
        for number, count in enumerate(layers):
            ends = {"is_first": number == 0, "is_last": number == len(layers) - 1}
            found.append(self.stage(start, start + count, **ends))
            start += count
        return found


@cache
def counter(shape: ModelShape, tp: int, ep: int, only: TrainOnly | None = None) -> Counter:
    """The same `Counter` for the same model and sizes, of which a search asks again and again."""
    return Counter(shape, tp, ep, only)
