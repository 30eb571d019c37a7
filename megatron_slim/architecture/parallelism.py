"""Which parallel layouts a model's sizes allow."""

from __future__ import annotations

from megatron_slim.architecture.shape import ModelShape


def layout_violations(
    shape: ModelShape, *, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 1
) -> list[str]:
    """Everything that keeps a model from being laid out like this, one sentence each.

    Args:
        shape: sizes of the model.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        vpp: virtual stages per pipeline rank.
        ep: expert parallel size.
        etp: tensor parallel size inside an expert.

    >>> from megatron_slim.testing import tiny_shape
    >>> for sentence in layout_violations(tiny_shape(), pp=3, ep=5):
    ...     print(sentence)
    num_layers 4 does not divide into 3 pipeline stages
    num_moe_experts 8 does not divide by expert parallel size 5
    """
    stages = f"{pp} pipeline stages" if vpp == 1 else f"{pp} x {vpp} virtual pipeline stages"
    found = [f"num_layers {shape.num_layers} does not divide into {stages}"] if shape.num_layers % (pp * vpp) else []
    divided = {
        "num_attention_heads": ("tensor", tp),
        "linear_num_key_heads": ("tensor", tp),
        "linear_num_value_heads": ("tensor", tp),
        "moe_shared_expert_intermediate_size": ("tensor", tp),
        "num_moe_experts": ("expert", ep),
        "moe_ffn_hidden_size": ("expert tensor", etp),
    }
    for name, (kind, ways) in divided.items():
        if (value := getattr(shape, name)) % ways:
            found.append(f"{name} {value} does not divide by {kind} parallel size {ways}")
    if shape.num_query_groups % tp and tp % shape.num_query_groups:
        found.append(
            f"num_query_groups {shape.num_query_groups} neither divides nor is divided by tensor parallel size {tp}"
        )
    return found
