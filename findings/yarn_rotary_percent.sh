#!/usr/bin/env bash
# megatron-core 0.19.2: YarnRotaryEmbedding takes rotary_percent and ignores it. RotaryEmbedding rotates that part of
# a head; with YaRN all of it is rotated. Qwen3-Next rotates a quarter.
#
# Expected: a quarter of the 64 channels are 8 frequencies, with YaRN and without.
# Seen: RotaryEmbedding 8, YarnRotaryEmbedding 32.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2

run_python <<'PY'
import torch

torch.cuda.current_device = lambda: torch.device("cpu")  # YaRN's tables are put on the current device
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"kv_channels": 64, "rotary_percent": 0.25, "use_cpu_initialization": True}
plain = len(RotaryEmbedding(**sizes).inv_freq)
yarn = len(YarnRotaryEmbedding(**sizes, scaling_factor=4.0).inv_freq_extra)
print(f"RotaryEmbedding {plain}, YarnRotaryEmbedding {yarn}")
assert (plain, yarn) == (8, 32), "the behaviour has changed"
PY
