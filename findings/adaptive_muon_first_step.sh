#!/usr/bin/env bash
# megatron-core 0.19.2 with emerging-optimizers 0.3.0, of which it asks for no version: the optimizer adaptive_muon, which
# is among Megatron's choices, is built and fails at its first step. Muon of the same module steps.
#
# Expected: a step.
# Seen: AttributeError: 'TensorParallelAdaptiveMuon' object has no attribute 'scale_mode'.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2 emerging-optimizers==0.3.0

run_python <<'PY'
import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon, TensorParallelMuon

seen = {}
for kind in (TensorParallelMuon, TensorParallelAdaptiveMuon):
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    weight.grad = torch.ones(64, 32)
    optimizer = kind([weight], lr=1.0)
    try:
        optimizer.step()
        seen[kind.__name__] = "stepped"
    except AttributeError as error:
        seen[kind.__name__] = str(error)
    print(f"{kind.__name__}: {seen[kind.__name__]}")
assert seen["TensorParallelMuon"] == "stepped", "the behaviour has changed"
assert "no attribute 'scale_mode'" in seen["TensorParallelAdaptiveMuon"], "the behaviour has changed"
PY
