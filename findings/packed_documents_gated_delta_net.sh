#!/usr/bin/env bash
# transformers 5.24.0: position ids that start again at 0 separate packed documents. In Qwen3-MoE the second document
# then does not see the first. In Qwen3-Next the state of Gated DeltaNet and its convolution run on across the
# boundary, so the second document's logits depend on the first. Neither reports it.
#
# Expected: logits of the second document do not depend on the first, in both or in neither.
# Seen: they differ by 6e-08 (rounding) in Qwen3-MoE and by 2e-02 in Qwen3-Next, for two first documents that differ.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python <<'PY'
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

LENGTH, VOCAB = 12, 64
sizes = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32,
}
linear = {
    "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}
torch.manual_seed(0)
models = {
    "Qwen3-MoE": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)),
    "Qwen3-Next": Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **linear)),
}
first, other, second = torch.randint(VOCAB, (3, 1, LENGTH))
positions = torch.arange(LENGTH).repeat(2)[None]
seen = {}
for name, model in models.items():
    with torch.no_grad():
        outputs = [
            model(torch.cat([document, second], 1), position_ids=positions, use_cache=False).logits[:, LENGTH:]
            for document in (first, other)
        ]
    seen[name] = (outputs[0] - outputs[1]).abs().max().item()
    print(f"{name}: the second document's logits differ by {seen[name]:.1e} after another first document")
assert seen["Qwen3-MoE"] < 1e-5 and seen["Qwen3-Next"] > 1e-3, "the behaviour has changed"
PY
