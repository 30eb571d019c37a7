#!/usr/bin/env bash
# transformers 5.24.0: the MTP block of GLM-4.5 (Glm4MoeForCausalLM) is stored as the layer after the last one, so its
# number is num_hidden_layers. MtpModel.from_pretrained looks for it under the numbers of two published models alone, 46
# and 92. In a GLM of another depth, as a smaller or a pruned one, it finds nothing and raises, though config.json declares
# the block and its tensors are there; loading the trunk lists them as unexpected.
#
# Expected: layers from num_hidden_layers on are the MTP block of any depth.
# Seen: 46 layers: MTP found, nothing unexpected. 3 layers: RuntimeError (MtpModel weights are missing), 17 unexpected.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python <<'PY'
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

seen = {}
for layers in (46, 3):
    config = Glm4MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=2, num_experts_per_tok=1,
        first_k_dense_replace=1, num_mtp_layers=1,
    )
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config)
    directory = Path(tempfile.mkdtemp())
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    prefix = f"model.layers.{layers}."
    for name, tensor in MtpModel(model, 1).state_dict().items():
        if name.startswith("layers.0."):
            name = name.removeprefix("layers.0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            if "mlp.experts." not in name:
                tensors[prefix + name] = tensor.clone()
                continue
            # In files every expert is apart; fused tensors are what transformers has in memory.
            for expert, part in enumerate(tensor):
                if name.endswith("gate_up_proj"):
                    for which, half in zip(("gate_proj", "up_proj"), part.chunk(2)):
                        tensors[f"{prefix}mlp.experts.{expert}.{which}.weight"] = half.clone()
                else:
                    tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = part.clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    declared = json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"]
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    try:
        MtpModel.from_pretrained(loaded)
        ending = "found"
    except RuntimeError as error:
        ending = f"RuntimeError: {str(error)[:44]}"
    seen[layers] = (declared, ending, len(info["unexpected_keys"]))
    print(f"{layers} layers, {declared} MTP block declared: {ending}; {len(info['unexpected_keys'])} unexpected")
assert seen[46] == (1, "found", 0), "the behaviour has changed"
assert seen[3][1].startswith("RuntimeError: The following MtpModel weights are missing"), "the behaviour has changed"
assert seen[3][2] == 17, "the behaviour has changed"
PY
