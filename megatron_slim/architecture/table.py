"""The architecture table of a model: all its parameters, their names complete.

Conversion, pruning, parameter counts and memory plans all read this table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from megatron_slim.architecture.shape import FULL_ATTENTION, ModelShape
from megatron_slim.architecture.weight import HFTensor, Weight

BF16_BYTES = 2  # of a parameter


def weights(model: ModelShape) -> Iterator[Weight]:
    """Every parameter of a model, in the order of the forward pass, names complete but for ``{expert}``."""
    family = model.family
    blocks = {kind: (*attention, *family.moe_rows) for kind, attention in family.attention_rows.items()}
    yield from family.first_rows
    for layer, kind in enumerate(model.layer_types):
        yield from _in_block(blocks[kind], f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield from family.last_rows
    for depth in range(model.mtp_num_layers):
        yield from _renamed(family.mtp_rows, f"mtp.layers.{depth}.")
        block = blocks[FULL_ATTENTION]
        yield from _in_block(block, f"mtp.layers.{depth}.transformer_layer", f"mtp.layers.{depth}")


def _in_block(rows: tuple[Weight, ...], key: str, hf: str) -> Iterator[Weight]:
    yield from _renamed(rows, f"{key}.", f"{hf}.", block=hf)


def _renamed(rows: tuple[Weight, ...], key: str, hf: str = "", block: str = "") -> Iterator[Weight]:
    for row in rows:
        sources = tuple(replace(source, name=hf + source.name) for source in row.sources)
        fused = None if row.fused is None else replace(row.fused, name=hf + row.fused.name)
        yield replace(row, key=key + row.key, sources=sources, block=block, fused=fused)


def hf_tensors(model: ModelShape, fused_blocks: Collection[str] = ()) -> dict[str, HFTensor]:
    """Every tensor of the Hugging Face checkpoint by name; of these blocks, as files hold them where experts are fused.

    Without ``fused_blocks`` these are the names that the whole package uses, whatever the files hold.
    """
    found: dict[str, HFTensor] = {}
    for weight in weights(model):
        if weight.fused is not None and weight.block in fused_blocks:
            found[weight.fused.name] = weight.fused
        else:
            found |= {tensor.name: tensor for tensor, _ in weight.hf_tensors(model)}
    return found


def names_of(model: ModelShape) -> dict[str, str]:
    """Hugging Face name of every Megatron parameter that is one tensor, by its key."""
    return {each.key: each.sources[0].name for each in weights(model) if len(each.sources) == 1 and not each.stacked}


OUTPUT = "output_layer.weight"  # key of the output layer
ROUTER = ".mlp.router.weight"  # what the key of a router's weight ends with


def router_of(model: ModelShape, block: str) -> str:
    """Hugging Face name of the weight of a block's router."""
    (found,) = (each.sources[0].name for each in weights(model) if each.block == block and each.key.endswith(ROUTER))
    return found


def mtp_layers_in(names: Iterator[str] | set[str]) -> int:
    """Number of MTP blocks in a set of Hugging Face tensor names; 0 when there is no ``mtp.`` tensor."""
    depths = [-1]
    for name in names:
        if name.startswith("mtp."):
            digits = name.removeprefix("mtp.layers.").split(".")[0]
            depths.append(int(digits) if name.startswith("mtp.layers.") and digits.isdecimal() else 0)
    return max(depths) + 1


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: ``active`` counts, of the routed experts, the top-k that a token visits."""

    total: int
    active: int


def count_parameters(model: ModelShape, *, include_mtp: bool = True) -> ParameterCount:
    """Count a model's parameters from the table alone, each row once: equal blocks have equally many.

    Active parameters are all but the routed experts that a token does not visit, embeddings and head included.
    """
    family, blocks = model.family, Counter(model.layer_types)
    depths = model.mtp_num_layers if include_mtp else 0
    blocks[FULL_ATTENTION] += depths
    occurrences = [(family.first_rows, 1), (family.last_rows, 1), (family.mtp_rows, depths)]
    occurrences += [(family.attention_rows[kind], count) for kind, count in blocks.items()]
    occurrences.append((family.moe_rows, blocks.total()))
    total = idle = 0
    for rows, count in occurrences:
        for row in rows:
            numel = row.numel(model) * count
            total += numel
            if row.stacked:
                idle += numel // model.num_moe_experts * (model.num_moe_experts - model.moe_router_topk)
    return ParameterCount(total=total, active=total - idle)
