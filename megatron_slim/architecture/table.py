"""The architecture table of a model: all its parameters, their names complete.

Conversion, pruning, parameter counts and memory plans all read this table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_slim.architecture.family import LAYERS, MTP, MTP_SUBLAYERS
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.weight import HFTensor, Weight

BF16_BYTES = 2  # of a parameter


def weights(model: ModelShape) -> Iterator[Weight]:
    """Every parameter of a model, in the order of the forward pass, names complete but for ``{expert}``."""
    family, present = model.family, {kind: rows_of(model, kind) for kind in model.family.rows}
    yield from family.first_rows
    for layer, kinds in enumerate(model.sublayers):
        yield from _in_block(kinds, present, f"decoder.layers.{layer}", f"{LAYERS}{layer}", model)
    yield from family.last_rows
    for depth in range(model.mtp_num_layers):
        block = f"{MTP}layers.{depth}"
        for row in family.mtp_rows:
            sources = (replace(each, name=each.name.format(block=model.hf_prefix(block))) for each in row.sources)
            yield replace(row, key=f"mtp.layers.{depth}.{row.key}", sources=tuple(sources))
        yield from _in_block(MTP_SUBLAYERS, present, f"mtp.layers.{depth}.transformer_layer", block, model)


def rows_of(model: ModelShape, kind: str) -> tuple[Weight, ...]:
    """The rows of a kind of sublayer, as far as a model has them."""
    return tuple(row for row in model.family.rows[kind] if not row.when or getattr(model, row.when))


def _in_block(
    kinds: tuple[str, ...], present: Mapping[str, tuple[Weight, ...]], key: str, block: str, model: ModelShape
) -> Iterator[Weight]:
    hf = f"{model.hf_prefix(block)}."
    for row in (row for kind in kinds for row in present[kind]):
        sources = tuple(replace(source, name=hf + source.name, block=block) for source in row.sources)
        fused = None if row.fused is None else replace(row.fused, name=hf + row.fused.name, block=block)
        yield replace(row, key=f"{key}.{row.key}", sources=sources, block=block, fused=fused)


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


def copies_of(model: ModelShape) -> dict[str, tuple[str, str]]:
    """Tensors that files may have in MTP blocks though the trunk has them: name -> name in the block, the trunk's."""
    found, trunk = {}, names_of(model) if model.family.mtp_copies else {}
    for depth in range(model.mtp_num_layers):
        for short, key in model.family.mtp_copies.items():
            found[f"{model.hf_prefix(f'{MTP}layers.{depth}')}.{short}"] = short, trunk[key]
    return found


def mtp_layers_in(names: Iterable[str], trunk: ModelShape) -> int:
    """Number of MTP blocks that Hugging Face tensor names are of, next to a trunk; 0 where there is none."""
    depths = (trunk.family.mtp_depth(name, trunk.num_layers) for name in names)
    return max((depth for depth in depths if depth is not None), default=-1) + 1


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: ``active`` counts, of the routed experts, the top-k that a token visits."""

    total: int
    active: int


def count_parameters(model: ModelShape, *, include_mtp: bool = True) -> ParameterCount:
    """Count a model's parameters from the table alone, each row once: equal blocks have equally many.

    Active parameters are all but the routed experts that a token does not visit, embeddings and head included. What
    training does not change by gradients, as a bias of the router, is none.
    """
    family, depths = model.family, model.mtp_num_layers if include_mtp else 0
    blocks = list(model.blocks)[: model.num_layers + depths]
    kinds = Counter((kind, model.in_block(block)) for block in blocks for kind in model.sublayers_of(block))
    occurrences = [(rows, model, 1) for rows in (family.first_rows, family.last_rows)]
    occurrences += [(family.mtp_rows, model, depths)]
    occurrences += [(rows_of(model, kind), sizes, count) for (kind, sizes), count in kinds.items()]
    total = idle = 0
    for rows, sizes, count in occurrences:
        for row in (row for row in rows if not row.buffer):
            numel = row.numel(sizes) * count
            total += numel
            if row.stacked:
                idle += numel // sizes.num_moe_experts * (sizes.num_moe_experts - model.moe_router_topk)
    return ParameterCount(total=total, active=total - idle)
