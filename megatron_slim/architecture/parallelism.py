"""Which parallel layouts a model's sizes allow."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.architecture.kinds import FEED_FORWARD, KINDS
from megatron_slim.architecture.prunable import Heads
from megatron_slim.architecture.shape import ModelShape

VOCAB_MULTIPLE = 128  # one padded vocabulary for every tensor parallel size that divides it


def padded_vocab_size(shape: ModelShape, multiple: int = VOCAB_MULTIPLE) -> int:
    """Rows of embedding and output layer in training, the same under every tensor parallel size that divides them.

    Megatron would pad to ``multiple`` times the tensor parallel size.
    """
    return -(-shape.vocab_size // multiple) * multiple


def layout_violations(
    shape: ModelShape, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, cp: int = 1
) -> list[str]:
    """Everything that rules this layout out for a model, one sentence each.

    Args:
        shape: sizes of the model.
        tp: tensor parallel size.
        pp: pipeline parallel size, for equally many layers to each stage.
        ep: expert parallel size.
        etp: tensor parallel size inside an expert.
        cp: context parallel size.

    >>> from megatron_slim.testing import tiny_shape
    >>> for sentence in layout_violations(tiny_shape(), pp=3, ep=5):
    ...     print(sentence)
    num_layers 4 does not divide into 3 pipeline stages
    num_moe_experts 8 does not divide by expert parallel size 5
    """
    found = (
        [f"num_layers {shape.num_layers} does not divide into {pp} pipeline stages"] if shape.num_layers % pp else []
    )
    ways_of = {"tensor": tp, "expert": ep, "expert tensor": etp}
    divided = {
        **{field: ways for kind in KINDS.values() for field, ways in _of_heads(kind.heads, tp, cp).items()},
        **{
            axis.field: (axis.sharded, ways_of[axis.sharded])
            for kind in FEED_FORWARD.values()
            for axis in kind.axes
            if axis.sharded
        },
    }
    for name, (kind, ways) in divided.items():
        if (value := getattr(shape, name)) % ways:
            found.append(f"{name} {value} does not divide by {kind} parallel size {ways}")
    if wrong := sorted({count for count in shape.experts_per_layer if count % ep}):
        found.append(
            f"experts_per_layer {', '.join(map(str, wrong))} do not divide by expert parallel size {ep} (plan with "
            "experts.multiple)"
        )
    for heads in (kind.heads for kind in KINDS.values() if not kind.heads.exchanged):
        groups: int = getattr(shape, heads.groups_field)
        if groups % tp and tp % groups:
            found.append(f"{heads.groups_field} {groups} neither divides nor is divided by tensor parallel size {tp}")
    return found


def _of_heads(heads: Heads, tp: int, cp: int) -> dict[str, tuple[str, int]]:
    """What the numbers of heads and of their groups divide by; groups that ranks do not exchange may be copied."""
    if heads.exchanged:
        return dict.fromkeys(
            (heads.groups_field, heads.field), ("tensor times context" if cp > 1 else "tensor", tp * cp)
        )
    return {heads.field: (heads.sharded, tp)}


@dataclass(frozen=True)
class Layout:
    """A way to split a model across processes; experts are not split (expert tensor parallel size 1).

    Attributes:
        world: number of processes.
        tp: tensor parallel size, with sequence parallelism where it is above 1.
        pp: pipeline parallel size.
        ep: expert parallel size.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def violations(self, shape: ModelShape, seq_length: int) -> list[str]:
        """Everything that rules this layout out for a model, or for sequences of this length.

        >>> from megatron_slim.testing import tiny_shape
        >>> Layout(4, tp=2, pp=4).violations(tiny_shape(), seq_length=7)
        ['4 processes do not divide into groups of tp 2 x pp 4', 'sequences of 7 tokens do not divide by tp 2']
        """
        found = [
            f"{self.world} processes do not divide into groups of {name} {size} x pp {self.pp}"
            for name, size in (("tp", self.tp), ("ep", self.ep))
            if self.world % (size * self.pp)
        ]
        if seq_length % self.tp:
            found.append(f"sequences of {seq_length} tokens do not divide by tp {self.tp}")
        return found + layout_violations(shape, tp=self.tp, pp=self.pp, ep=self.ep)
