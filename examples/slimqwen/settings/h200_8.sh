# shellcheck shell=bash disable=SC2034  # read by pretrain_distill.sh; the environment wins
# Qwen3-Next-80A3B -> SlimQwen-23A2B on one node of 8 H200 (141 GB).
# Experts are divided over the node; nothing is computed twice, and no pipeline idles.
SETTINGS_NODES=1
: "${SEQ_LENGTH:=4096}" "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=1024}" "${NPROC_PER_NODE:=8}" "${PRECISION:=bf16}"
: "${TP:=1}" "${PP:=1}" "${EP:=8}"
settings_args=(
  --overlap-grad-reduce --overlap-param-gather --manual-gc
)
