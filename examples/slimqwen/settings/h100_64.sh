# shellcheck shell=bash disable=SC2034  # read by pretrain_distill.sh; the environment wins
# Qwen3-Next-80A3B -> SlimQwen-23A2B on 8 nodes of 8 H100 (80 GB).
# Experts of a layer are divided within a node, and all else by two: weights of both models and activations of all layers
# are too much for one GPU.
SETTINGS_NODES=8
: "${SEQ_LENGTH:=4096}" "${MICRO_BATCH_SIZE:=1}" "${GLOBAL_BATCH_SIZE:=1024}" "${NPROC_PER_NODE:=8}" "${PRECISION:=bf16}"
: "${TP:=2}" "${PP:=1}" "${EP:=8}"
settings_args=(
  --expert-tensor-parallel-size 1 --overlap-grad-reduce --overlap-param-gather --manual-gc
)
