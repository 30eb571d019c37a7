#!/usr/bin/env bash
# megatron-core 0.19.2: HybridStack, the block of layers of HybridModel, takes its layers from a spec and makes its final
# norm of Transformer Engine's class, whatever the spec says. GPTModel, which it is to replace, is built of PyTorch's
# modules alone, its final norm too.
#
# Expected: a final norm that can be chosen, as in GPTModel.
# Seen: GPTModel has a final norm of PyTorch. HybridStack is built of the same layer without a final norm, and with one it
# asks for Transformer Engine.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2

run_python <<'PY'
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=1, hidden_size=32, num_attention_heads=4, normalization="RMSNorm", use_cpu_initialization=True,
)
layer = get_gpt_layer_local_spec(normalization="RMSNorm")
model = GPTModel(config=config, transformer_layer_spec=layer, vocab_size=64, max_sequence_length=16)
seen = [f"GPTModel: final norm of {type(model.decoder.final_layernorm).__module__.split('.')[0]}"]
attention = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        self_attention=layer.submodules.self_attention, self_attn_bda=layer.submodules.self_attn_bda
    ),
)
groups = ProcessGroupCollection.use_mpu_process_groups()
for final_norm in (False, True):
    try:
        HybridStack(
            config=config, submodules=HybridStackSubmodules(attention_layer=attention), layer_type_list=["*"],
            post_layer_norm=final_norm, pg_collection=groups,
        )
        seen.append(f"HybridStack, final norm {final_norm}: built")
    except ImportError as error:
        seen.append(f"HybridStack, final norm {final_norm}: {str(error).split('.')[0]}")
print(*seen, sep="\n")
assert seen == [
    "GPTModel: final norm of torch",
    "HybridStack, final norm False: built",
    "HybridStack, final norm True: Transformer Engine is not installed",
], "the behaviour has changed"
PY
