#!/usr/bin/env bash
# Train or distil on this node (torchrun), on several (NNODES, NODE_RANK, MASTER_ADDR), or on a CPU; the same command.
#
#   TEACHER=teacher-hf STUDENT=pruned SAVE=run DATA=corpus_text_document bash examples/slimqwen/pretrain_distill.sh
#
# Arguments go to Megatron as they are and win over what is set here. DRY_RUN=1 prints the command and does nothing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

fail() { echo "error: $*" >&2; exit 2; }

# What to train. STUDENT: a checkpoint to start from, torch_dist or Hugging Face. Without one, HF_CONFIG: a directory
# whose config.json gives the shape of a student with random weights. Without TEACHER it is plain LM + MTP-LM training.
STUDENT=${STUDENT:-}
HF_CONFIG=${HF_CONFIG:-}
TEACHER=${TEACHER:-}
SAVE=${SAVE:-}
DATA=${DATA:-}             # prefix of a .bin/.idx pair, or "weight prefix weight prefix ..."
VALID_DATA=${VALID_DATA:-} # the same, for validation; without it a part of DATA is set aside
[[ -n $SAVE ]] || fail "SAVE is not set; it is the directory for checkpoints and logs, and a run found there goes on"
[[ -n $DATA ]] || fail "DATA is not set; make it with tools/preprocess_data.py"
[[ -n $STUDENT || -n $HF_CONFIG ]] || fail "neither STUDENT nor HF_CONFIG is set; see the head of ${BASH_SOURCE[0]}"

# Layout: NPROC_PER_NODE processes a node, of which TP x PP hold one copy of both models and the rest is data parallel.
TP=${TP:-1}
PP=${PP:-1}
EP=${EP:-1}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : TP * PP * EP))}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# SlimQwen, 400B-token setting.
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-95368}
LR=${LR:-4e-4}
MIN_LR=${MIN_LR:-3e-5}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-2000}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}
LOG_INTERVAL=${LOG_INTERVAL:-10}
PRECISION=${PRECISION:-$([[ $gpus -gt 0 ]] && echo bf16 || echo fp32)}

read -r -a data <<<"$DATA"
read -r -a valid_data <<<"$VALID_DATA"
if [[ ${#valid_data[@]} -gt 0 ]]; then
  data_args=(--train-data-path "${data[@]}" --valid-data-path "${valid_data[@]}" --test-data-path "${valid_data[@]}")
else
  data_args=(--data-path "${data[@]}" --split "990,5,5")
fi
args=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP"
  --use-distributed-optimizer
  --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --train-iters "$TRAIN_ITERS" --lr "$LR" --min-lr "$MIN_LR" --lr-warmup-iters "$LR_WARMUP_ITERS"
  --lr-decay-style cosine --clip-grad 1.0
  --save "$SAVE" --load "$SAVE" --save-interval "$SAVE_INTERVAL" --tensorboard-dir "$SAVE/tensorboard"
  --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --log-interval "$LOG_INTERVAL"
  --distributed-timeout-minutes 30
  --data-cache-path "$SAVE/data-cache"
  "${data_args[@]}"
)
if [[ $TP -gt 1 ]]; then args+=(--sequence-parallel); fi
if [[ $PRECISION == bf16 ]]; then args+=(--bf16); fi
if [[ -n $STUDENT ]]; then args+=(--pretrained-checkpoint "$STUDENT"); fi
if [[ -n $HF_CONFIG ]]; then args+=(--hf-config "$HF_CONFIG"); fi
if [[ -n $TEACHER ]]; then args+=(--teacher-load "$TEACHER"); fi

command=(
  "${PYTHON:-python3}" "$root/tools/torchrun.py"
  --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" --node-rank "$NODE_RANK"
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
  "$root/tools/pretrain.py" "${args[@]}" "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${command[@]}"
