"""The kinds of sublayers by name, and all axes that can be pruned: what everybody reads (imports no torch)."""

from __future__ import annotations

from megatron_slim.architecture import delta_net, feed_forward, full_attention
from megatron_slim.architecture.prunable import HIDDEN, LAYERS, PrunableAxis
from megatron_slim.architecture.sublayer_kind import AttentionKind, FeedForwardKind

KINDS: dict[str, AttentionKind] = {kind.name: kind for kind in (full_attention.KIND, delta_net.KIND)}
FEED_FORWARD: dict[str, FeedForwardKind] = {
    kind.name: kind for kind in (feed_forward.MOE_KIND, feed_forward.DENSE_KIND)
}
SUBLAYERS: dict[str, AttentionKind | FeedForwardKind] = {**KINDS, **FEED_FORWARD}
# By the size's field: those of blocks, and with them all.
BLOCK_AXES: dict[str, PrunableAxis] = {
    axis.field: axis for kinds in (FEED_FORWARD, KINDS) for kind in kinds.values() for axis in kind.axes
}
AXES: dict[str, PrunableAxis] = {axis.field: axis for axis in (LAYERS, HIDDEN)} | BLOCK_AXES
