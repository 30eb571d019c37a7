#!/usr/bin/env bash
# transformers 5.24.0: a config.json without norm_topk_prob means that the gates of the chosen experts sum to one in
# Qwen3-Next, and that they do not in Qwen3-MoE. A writer that leaves out keys with default values changes the model
# as soon as the file is read as the other family.
#
# Expected: one default for one key of sibling families.
# Seen: Qwen3MoeConfig().norm_topk_prob False, Qwen3NextConfig().norm_topk_prob True.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 transformers==5.24.0

run_python <<'PY'
from transformers import Qwen3MoeConfig, Qwen3NextConfig

seen = Qwen3MoeConfig().norm_topk_prob, Qwen3NextConfig().norm_topk_prob
print(f"Qwen3MoeConfig().norm_topk_prob {seen[0]}, Qwen3NextConfig().norm_topk_prob {seen[1]}")
assert seen == (False, True), "the behaviour has changed"
PY
