#!/usr/bin/env bash
# transformers 5.24.0: MtpModel takes the class of its norms from the first norm in the trunk's last layer. In a Qwen3-Next
# whose last layer is Gated DeltaNet (any depth that is not a multiple of four, as pruning leaves it) that is the gated
# norm, which wants a second argument: the MTP block is built, and its first forward pass fails.
#
# Expected: the MTP block does not depend on the type of the trunk's last layer.
# Seen: 4 layers: RMSNorm, works. 5 layers: RMSNormGated, TypeError: missing 1 required positional argument: 'gate'.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python <<'PY'
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.modeling_layers import MtpModel

seen = {}
for layers in (4, 5):
    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=32,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, num_mtp_layers=1, mtp_layer_types=["full_attention"],
    )
    layer = MtpModel(Qwen3NextForCausalLM(config), 1).layers[0]
    try:
        layer.hnorm(torch.ones(1, 2, config.hidden_size))
        ending = "works"
    except TypeError as error:
        ending = f"TypeError: {str(error).split('() ')[-1]}"
    seen[layers] = ending
    print(f"{layers} layers: {type(layer.hnorm).__name__}, {ending}")
assert seen[4] == "works" and "'gate'" in seen[5], "the behaviour has changed"
PY
