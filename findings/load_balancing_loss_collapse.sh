#!/usr/bin/env bash
# transformers 5.24.0: load_balancing_loss_func of the Qwen MoE models adds up the routing of all layers before it
# compares experts. Four layers that each send every token to one expert, each to another, have the loss of perfect balance.
# megatron-core 0.19.2 computes the loss layer by layer, where the same layers have the largest loss there is. So a
# coefficient (router_aux_loss_coef, --moe-aux-loss-coeff) does not mean the same thing in both.
#
# Expected: collapsed layers cost more than balanced ones.
# Seen (4 layers, 4 experts, top-1): balanced 1.0 and 1.0; collapsed 1.0 in transformers, 4.0 in every layer in Megatron-Core.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2 transformers==5.24.0

run_python <<'PY'
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

TOKENS = EXPERTS = LAYERS = 4


def layer(experts):
    """Router logits of a layer that sends token t to experts[t]."""
    return torch.nn.functional.one_hot(torch.tensor(experts), EXPERTS) * 60.0


def megatron(logits):
    scores = logits.softmax(-1)
    counts = torch.bincount(scores.argmax(-1), minlength=EXPERTS)
    loss = switch_load_balancing_loss_func(
        scores, counts, total_num_tokens=TOKENS, topk=1, num_experts=EXPERTS, moe_aux_loss_coeff=1.0
    )
    return round(loss.item(), 4)


balanced = [layer([0, 1, 2, 3])] * LAYERS
collapsed = [layer([expert] * TOKENS) for expert in range(LAYERS)]
seen = [
    (round(load_balancing_loss_func(tuple(layers), EXPERTS, 1).item(), 4), [megatron(logits) for logits in layers])
    for layers in (balanced, collapsed)
]
for name, (transformers, per_layer) in zip(("balanced", "collapsed"), seen):
    print(f"{name}: transformers {transformers}, Megatron-Core by layer {per_layer}")
assert seen == [(1.0, [1.0] * 4), (1.0, [4.0] * 4)], "the behaviour has changed"
PY
