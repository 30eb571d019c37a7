#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a mixture of experts that is loaded in fp64, to check numbers against, fails at
# its first step on a CPU. Its experts are one grouped product by default, which torch has for fp32 and 16 bits alone, and
# transformers does not look at the type. With experts_implementation="eager" the same model runs.
#
# Expected: logits, as fp64 is among the types that from_pretrained takes, and as a dense model gives them.
# Seen: Qwen3MoeForCausalLM: RuntimeError (got Double); with eager experts, and Qwen3ForCausalLM: logits in float64.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python <<'PY'
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
configs = {"dense": Qwen3Config(**sizes), "experts": Qwen3MoeConfig(**sizes, **experts)}


def logits_of(name, **options):
    AutoModelForCausalLM.from_config(configs[name]).save_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64, **options)
    try:
        return str(model(torch.arange(8)[None]).logits.dtype)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


seen = logits_of("dense"), logits_of("experts"), logits_of("experts", experts_implementation="eager")
for name, result in zip(("dense", "experts", "eager experts"), seen, strict=True):
    print(f"{name}: {result}")
assert seen[0] == seen[2] == "torch.float64", "the behaviour has changed"
assert "got Double" in seen[1], "the behaviour has changed"
PY
