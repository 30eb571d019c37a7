#!/usr/bin/env bash
# megatron-core 0.19.2 with emerging-optimizers 0.3.0: Muon keeps moving a matrix whose gradient has become zero, such as
# that of an expert which gets no more tokens. Its momentum shrinks from step to step, its update does not: the momentum is
# brought to one size first. AdamW's updates of the same matrix die out.
#
# Expected: updates that shrink with the momentum.
# Seen: five steps with a gradient and 35 without. The last update is as large as the first, and AdamW's is a hundredth.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2 emerging-optimizers==0.3.0

run_python <<'PY'
import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

OPTIMIZERS = {
    "Muon": lambda weight: TensorParallelMuon([weight], lr=1.0, momentum=0.9, weight_decay=0.0, fp32_matmul_prec="high"),
    "AdamW": lambda weight: torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0),
}
left = {}
for name, make in OPTIMIZERS.items():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer, moved = make(weight), []
    for step in range(40):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 32) if step < 5 else torch.zeros(64, 32)
        optimizer.step()
        moved.append(float((weight.detach() - before).norm()))
    left[name] = moved[-1] / moved[0]
    print(f"{name}: the last update is {left[name]:.3f} of the first")
assert 0.95 < left["Muon"] < 1.05 and left["AdamW"] < 0.05, "the behaviour has changed"
PY
