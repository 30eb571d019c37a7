"""The kinds of sublayers by name: the dictionaries that everybody reads (imports no torch)."""

from __future__ import annotations

from megatron_slim.architecture import delta_net, feed_forward, full_attention
from megatron_slim.architecture.sublayer_kind import AttentionKind, FeedForwardKind, SublayerKind

KINDS: dict[str, AttentionKind] = {kind.name: kind for kind in (full_attention.KIND, delta_net.KIND)}
FEED_FORWARD: dict[str, FeedForwardKind] = {
    kind.name: kind for kind in (feed_forward.MOE_KIND, feed_forward.DENSE_KIND)
}
SUBLAYERS: dict[str, SublayerKind] = {**KINDS, **FEED_FORWARD}
