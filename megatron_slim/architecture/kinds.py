"""The kinds of attention by layer type: one dictionary that everybody reads (imports no torch)."""

from __future__ import annotations

from megatron_slim.architecture import delta_net, full_attention
from megatron_slim.architecture.attention_kind import AttentionKind

KINDS: dict[str, AttentionKind] = {kind.name: kind for kind in (full_attention.KIND, delta_net.KIND)}
