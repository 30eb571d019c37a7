# shellcheck shell=bash disable=SC2034  # read by pretrain_distill.sh; the environment wins
# Qwen3-Next-80A3B -> SlimQwen-23A2B on 32 nodes of 8 H100 (80 GB).
# As for 64; with 8 micro-batches a step, a pipeline of two stages would idle for an eighth of it.
SETTINGS_NODES=32
: "${SEQ_LENGTH:=4096}" "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=1024}" "${NPROC_PER_NODE:=8}" "${PRECISION:=bf16}"
: "${TP:=2}" "${PP:=1}" "${EP:=8}"
settings_args=(
  --expert-tensor-parallel-size 1 --overlap-grad-reduce --overlap-param-gather --manual-gc
)
