#!/usr/bin/env python3
"""Compare our expert statistics with those of the REAP authors' own code, on the same inputs of one random MoE layer.

Their code (github.com/CerebrasResearch/reap) is not a dependency: --reap-source names the src folder of a checkout, of
which two modules are used that need torch and numpy alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.calibration import BLOCK, moe_layer
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser
from megatron_slim.errors import SlimError

if TYPE_CHECKING:
    from torch import Tensor

BATCHES = 4


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--reap-source", type=Path, required=True, help="folder that holds the package 'reap'")
    parser.add_argument("--experts", type=positive, default=64, help="experts of the MoE layer")
    parser.add_argument("--topk", type=positive, default=4, help="experts of a token")
    parser.add_argument("--hidden-size", type=positive, default=64)
    parser.add_argument("--ffn-size", type=positive, default=32, help="of an expert")
    parser.add_argument("--tokens", type=positive, default=512, help=f"in each of {BATCHES} forward passes")
    return parser.parse_args()


def ours(layer: Any, shape: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """Statistics of the layer by this package, as tensors."""
    import torch

    from megatron_slim.pruning.importance import block_statistics
    from megatron_slim.pruning.recorder import BlockRecorder
    from megatron_slim.pruning.statistics import importance_key, similarity_key

    recorder = BlockRecorder(BLOCK, shape, layer)
    for hidden in batches:
        layer.mlp(hidden[:, None])
        recorder.sums["tokens"] += len(hidden)  # counted by the layer, of which only the experts run here
    found = dict(block_statistics(BLOCK, shape, recorder.sums, layer.mlp.router.weight))
    keys = {kind: importance_key(BLOCK, kind) for kind in ("frequency", "soft_logits", "reap", "output_norm")}
    keys |= {kind: similarity_key(BLOCK, kind) for kind in ("router_logits", "expert_vectors")}
    return {kind: torch.from_numpy(found[key]).double() for kind, key in keys.items()}


def theirs(layer: Any, batches: list[Tensor], topk: int) -> dict[str, Tensor]:
    """The same from their code, which needs the output of every expert for every token.

    They average the router's similarity batch by batch; it is taken over all tokens at once here, by their distance.
    """
    import torch
    import torch.nn.functional as F

    try:
        from reap.metrics import OnlineStatsTracker, get_distance_fn, get_routed_characteristic_activation
        from reap.pruning_metrics import initialize_pruning_state, update_pruning_state
    except ImportError as error:
        raise SlimError(f"--reap-source: {error}", fix="give the src folder of a checkout of reap") from None

    experts, hidden_size = layer.mlp.router.weight.shape
    state = initialize_pruning_state(experts)
    vectors = OnlineStatsTracker((experts, hidden_size), (experts, hidden_size), dtype=torch.float64)
    all_logits = []
    for hidden in batches:
        logits = hidden @ layer.mlp.router.weight.T
        outputs = []
        for expert in layer.mlp.experts.local_experts:
            gate, up = (hidden @ expert.linear_fc1.weight.T).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ expert.linear_fc2.weight.T)
        batch = update_pruning_state(
            state,
            activations=torch.stack(outputs),
            selected_experts=logits.topk(topk).indices,
            router_logits=logits,
            num_experts=experts,
            renormalize_router_weights=True,
        )
        count = batch.expert_frequency
        means = get_routed_characteristic_activation(
            batch.activations, batch.selected_experts, count, hidden.device, hidden_size, experts
        )
        vectors.update(means, count[:, None].expand(-1, hidden_size))
        all_logits.append(logits)
    tokens = state["total_tokens"].double()
    columns = torch.cat(all_logits).double().T
    distance = get_distance_fn("cosine")
    return {
        "frequency": state["expert_frequency"] / tokens,
        "soft_logits": state["weighted_expert_frequency_sum"] / tokens,
        "reap": state["reap"].mean.double(),
        "output_norm": state["ean_sum"] / tokens,
        "router_logits": 1 - distance(columns[None, :, None], columns[None, None])[0],
        "expert_vectors": 1 - distance(vectors.mean[None, :, None], vectors.mean[None, None])[0],
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Largest differences, relative to the largest value, and whether the better half of the experts is the same."""
    sys.path.insert(0, str(args.reap_source))
    import megatron_slim.mcore

    import torch

    from megatron_slim.compat import runtime

    runtime.init_single_process()
    with torch.no_grad():
        layer, shape, generator = moe_layer(args)
        batches = [torch.randn(args.tokens, args.hidden_size, generator=generator) for _ in range(BATCHES)]
        one, other = ours(layer, shape, batches), theirs(layer, batches, args.topk)
    differences = {kind: float((one[kind] - other[kind]).abs().max() / other[kind].abs().max()) for kind in one}
    same = {
        kind: set(one[kind].topk(args.experts // 2).indices.tolist())
        == set(other[kind].topk(args.experts // 2).indices.tolist())
        for kind in ("soft_logits", "reap", "output_norm")  # frequencies tie
    }
    if not args.json:
        for kind, difference in differences.items():
            print(f"{kind}: differs by {difference:.1e}" + (f", same half kept: {same[kind]}" if kind in same else ""))
    return {"relative_differences": differences, "same_kept_half": same}


if __name__ == "__main__":
    arguments = parse_args()
    run_tool(lambda: compare(arguments), as_json=arguments.json)
