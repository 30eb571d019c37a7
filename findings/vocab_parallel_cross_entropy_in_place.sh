#!/usr/bin/env bash
# megatron-core 0.19.2: vocab_parallel_cross_entropy computes in place. Logits in fp32 hold their softmax afterwards;
# logits in bf16 are copied first and keep their values. Whoever reads logits after the loss gets probabilities, in fp32 alone.
#
# Expected: a loss leaves its input as it is, or does the same in every type.
# Seen: fp32: logits unchanged False, now the softmax True. bf16: unchanged True, the softmax False.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2

run_python <<'PY'
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
torch.manual_seed(0)
targets = torch.randint(8, (3, 2))
seen = {}
for dtype in (torch.float32, torch.bfloat16):
    logits = torch.randn(3, 2, 8).to(dtype)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, targets)
    softmax = before.float().softmax(-1)
    seen[dtype] = torch.equal(logits, before), torch.allclose(logits.float(), softmax)
    print(f"{dtype}: logits unchanged {seen[dtype][0]}, now the softmax {seen[dtype][1]}")
assert seen == {torch.float32: (False, True), torch.bfloat16: (True, False)}, "the behaviour has changed"
PY
