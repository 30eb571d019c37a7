#!/usr/bin/env bash
# transformers 5.24.0: Qwen3NextForCausalLM has no MTP head. from_pretrained leaves mtp.* tensors out silently, and
# save_pretrained writes a checkpoint without them whose config.json still has num_nextn_predict_layers: 1. A program
# that believes the key then builds a head without weights.
#
# Expected: the tensors, or a warning, or a config.json that declares no head.
# Seen: 1 mtp.* tensor before, 0 after; num_nextn_predict_layers 1 before and after; no warning names mtp.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python >seen <<'PY'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

config = Qwen3NextConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=32,
    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, num_nextn_predict_layers=1,
)
Qwen3NextForCausalLM(config).save_pretrained("before")
weights = load_file("before/model.safetensors")
save_file(weights | {"mtp.fc.weight": torch.zeros(32, 64)}, "before/model.safetensors", metadata={"format": "pt"})
Qwen3NextForCausalLM.from_pretrained("before").save_pretrained("after")
for folder in map(Path, ("before", "after")):
    tensors = [name for name in load_file(folder / "model.safetensors") if name.startswith("mtp.")]
    declared = json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"]
    print(f"{folder}: {len(tensors)} mtp.* tensors, num_nextn_predict_layers {declared}")
PY
cat seen
echo "lines that name mtp: $(grep -ci mtp output || true)"
diff seen - <<'TEXT'
before: 1 mtp.* tensors, num_nextn_predict_layers 1
after: 0 mtp.* tensors, num_nextn_predict_layers 1
TEXT
if grep -qi mtp output; then exit 1; fi
