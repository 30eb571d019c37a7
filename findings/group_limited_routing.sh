#!/usr/bin/env bash
# megatron-core 0.19.2: with --moe-router-num-groups the router chooses groups of experts before experts. The docstring of
# group_limited_topk says that a group is ranked by the sum of its two best scores, as in DeepSeek-V3. The code takes its
# topk // group_topk best scores. Where that is not two, other experts are chosen than by transformers 5.24.0's GLM-4.5.
#
# Expected: the same experts for any top-k.
# Seen: top-4 of 2 groups: the same. Top-6 of 2 groups: other experts for 15 of 64 tokens; top-2 of 2 groups: for 9.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0 megatron-core==0.19.2

run_python <<'PY'
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

seen = {}
for topk in (4, 6, 2):
    config = Glm4MoeConfig(
        hidden_size=16, n_routed_experts=32, num_experts_per_tok=topk, n_group=4, topk_group=2, norm_topk_prob=True
    )
    router = Glm4MoeTopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, 0.0, 0.1)
    logits, _, theirs = router(torch.randn(64, 16))
    _, chosen = topk_routing_with_score_function(
        logits, topk, num_groups=4, group_topk=2, score_function="sigmoid", expert_bias=router.e_score_correction_bias
    )
    expected = torch.zeros_like(chosen).scatter_(1, theirs, True)
    seen[topk] = int((chosen != expected).any(1).sum())
    print(f"top-{topk} of 2 groups: other experts for {seen[topk]} of 64 tokens")
assert seen == {4: 0, 6: 15, 2: 9}, "the behaviour has changed"
PY
