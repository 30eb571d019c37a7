# shellcheck shell=bash disable=SC2034  # read by pretrain_distill.sh; the environment wins
# Qwen3-Next-80A3B -> SlimQwen-23A2B on one node of 8 H100 (80 GB).
# The optimizer (12 bytes a parameter, 280 GB) is in the node's memory; all but experts is divided by two.
SETTINGS_NODES=1
: "${SEQ_LENGTH:=4096}" "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=1024}" "${NPROC_PER_NODE:=8}" "${PRECISION:=bf16}"
: "${TP:=2}" "${PP:=1}" "${EP:=8}"
settings_args=(
  --expert-tensor-parallel-size 1 --overlap-grad-reduce --overlap-param-gather --manual-gc
  --optimizer-cpu-offload --optimizer-offload-fraction 1.0 --use-precision-aware-optimizer
)
