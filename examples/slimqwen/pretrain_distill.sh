#!/usr/bin/env bash
# Train or distil: on this node (torchrun, GPUs or CPU), on several by hand (NNODES, NODE_RANK, MASTER_ADDR), or as a
# Slurm job. The same script and recipe; docs/cluster.md has the whole story.
#
#   TEACHER=teacher-hf STUDENT=pruned SAVE=run DATA=corpus_text_document bash examples/slimqwen/pretrain_distill.sh
#   ... SETTINGS=h100_64 LAUNCHER=slurm bash examples/slimqwen/pretrain_distill.sh      submits itself
#   ... SETTINGS=h100_64 sbatch --nodes 8 --gpus-per-node 8 examples/slimqwen/pretrain_distill.sh
#
# Arguments go to Megatron as they are and win over what is set here. DRY_RUN=1 prints the commands and does nothing.
# `megatron-slim distill` runs this script with its variables as flags: TEACHER is --teacher.
#SBATCH --job-name=slim
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

# Slurm runs a copy of the script that it keeps elsewhere; then the job was submitted from the repository, or ROOT is set.
root=${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
[[ -d $root/megatron_slim ]] || root=${SLURM_SUBMIT_DIR:-}
[[ -d $root/megatron_slim ]] || fail "ROOT is not set; it is the repository's directory, on storage that all nodes see"
# The scripts of a checkout, which is what nodes mount and import; or of an installed package, which every node has.
files=$root/examples/slimqwen
if [[ -d $files ]]; then
  mounted=$root
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
else
  files=$root/megatron_slim/slimqwen
  mounted=$files
fi

# Layout and batch for a number of GPUs, from a file that is a list of defaults: the environment wins over it.
SETTINGS=${SETTINGS:-}
settings_args=()
if [[ -n $SETTINGS ]]; then
  [[ -f $SETTINGS ]] || SETTINGS=$files/settings/$SETTINGS.sh
  [[ -f $SETTINGS ]] || fail "$SETTINGS: no such settings; there are $(cd "$files/settings" && echo *.sh)"
  # shellcheck source=examples/slimqwen/settings/h100_64.sh
  source "$SETTINGS"
fi

# What to train. STUDENT: a checkpoint to start from, torch_dist or Hugging Face. Without one, HF_CONFIG: a directory
# whose config.json gives the shape of a student with random weights. Without TEACHER it is plain LM + MTP-LM training.
STUDENT=${STUDENT:-}
HF_CONFIG=${HF_CONFIG:-}
TEACHER=${TEACHER:-}
SAVE=${SAVE:-}
DATA=${DATA:-}             # prefix of a .bin/.idx pair, or "weight prefix weight prefix ..."
VALID_DATA=${VALID_DATA:-} # the same, for validation; without it a part of DATA is set aside
[[ -n $SAVE ]] || fail "SAVE is not set (--save DIR); it is the directory for checkpoints and logs, and a run found there is resumed"
[[ -n $DATA ]] || fail "DATA is not set (--data PREFIX); make it with megatron-slim preprocess"
[[ -n $STUDENT || -n $HF_CONFIG ]] || fail "neither STUDENT nor HF_CONFIG is set; give a checkpoint (--student DIR), or a config.json for random weights (--hf-config DIR)"

# Layout: NPROC_PER_NODE processes a node, of which TP x PP hold one copy of both models and the rest is data parallel.
TP=${TP:-1}
PP=${PP:-1}
EP=${EP:-1}
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : TP * PP * EP))}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
# slurm: one launcher on each node of a job. In a step of a job this script already is what runs on a node.
LAUNCHER=${LAUNCHER:-$([[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]] && echo slurm || echo torchrun)}
[[ $LAUNCHER == torchrun || $LAUNCHER == slurm ]] || fail "LAUNCHER=$LAUNCHER: it is torchrun or slurm"

# SlimQwen, 400B-token setting.
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
# PROGRESSIVE=1: the student is that of a phase of a recipe, and takes its part in the one schedule of all phases, whose
# length follows from the recipe's tokens. CARRY_OPTIMIZER=1: it begins with the moments that pruning has carried over;
# without them STAGE_WARMUP=N: the learning rate begins at a tenth and is the schedule's after N steps of the phase.
PROGRESSIVE=${PROGRESSIVE:-0}
CARRY_OPTIMIZER=${CARRY_OPTIMIZER:-0}
STAGE_WARMUP=${STAGE_WARMUP:-}
length_args=(--progressive-schedule ${TRAIN_ITERS:+--train-iters "$TRAIN_ITERS"})
TRAIN_ITERS=${TRAIN_ITERS:-95368}
case $PROGRESSIVE in
  0) length_args=(--train-iters "$TRAIN_ITERS") ;;
  1) ;;
  *) fail "PROGRESSIVE=$PROGRESSIVE: it is 0 or 1" ;;
esac
[[ $CARRY_OPTIMIZER == 0 || $CARRY_OPTIMIZER == 1 ]] || fail "CARRY_OPTIMIZER=$CARRY_OPTIMIZER: it is 0 or 1"
LR=${LR:-4e-4}
MIN_LR=${MIN_LR:-3e-5}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-} # 2000, or a tenth of a run that is no longer
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}
LOG_INTERVAL=${LOG_INTERVAL:-10}
PRECISION=${PRECISION:-$([[ $gpus -gt 0 ]] && echo bf16 || echo fp32)}
[[ $PRECISION == bf16 || $PRECISION == fp32 ]] || fail "PRECISION=$PRECISION: it is bf16 or fp32; FP8 and fp16 are flags of Megatron (docs/fp8.md)"

if [[ $LAUNCHER == slurm ]]; then
  # shellcheck source=examples/slimqwen/slurm.sh
  source "$files/slurm.sh"
  slurm_prepare "$@"
elif [[ ${SLURM_STEP_NUM_NODES:-1} -gt 1 && $NNODES == 1 ]]; then
  fail "srun started this on $SLURM_STEP_NUM_NODES nodes; start it once, in the job, and it starts them (LAUNCHER=slurm)"
fi

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
  "${length_args[@]}" --lr "$LR" --min-lr "$MIN_LR"
  --lr-decay-style cosine --clip-grad 1.0
  --save "$SAVE" --load "$SAVE" --save-interval "$SAVE_INTERVAL" --tensorboard-dir "$SAVE/tensorboard"
  --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" --log-interval "$LOG_INTERVAL"
  --distributed-timeout-minutes 30
  --data-cache-path "$SAVE/data-cache"
  "${data_args[@]}"
)
if [[ -n $LR_WARMUP_ITERS ]]; then args+=(--lr-warmup-iters "$LR_WARMUP_ITERS"); else args+=(--default-lr-warmup-iters 2000); fi
if [[ $TP -gt 1 ]]; then args+=(--sequence-parallel); fi
if [[ $PRECISION == bf16 ]]; then args+=(--bf16); fi
if [[ $LAUNCHER == slurm ]]; then args+=(--exit-signal-handler); fi
if [[ $CARRY_OPTIMIZER == 1 ]]; then args+=(--carry-optimizer); fi
if [[ -n $STAGE_WARMUP ]]; then args+=(--stage-warmup "$STAGE_WARMUP"); fi
if [[ -n $STUDENT ]]; then args+=(--pretrained-checkpoint "$STUDENT"); fi
if [[ -n $HF_CONFIG ]]; then args+=(--hf-config "$HF_CONFIG"); fi
if [[ -n $TEACHER ]]; then args+=(--teacher-load "$TEACHER"); fi

# Variables that ranks need in addition to those of the environment. One hardware queue makes kernels start in the order in
# which they were launched, by which tensor parallelism overlaps up to Hopper (Megatron insists on it); Blackwell has
# another way, and there, as for overlapped all-to-all of experts, streams should not wait for each other.
compute_capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [[ " ${settings_args[*]} $* " == *" --overlap-moe-expert-parallel-comm "* || ($TP -gt 1 && ${compute_capability%%.*} -ge 10) ]]; then
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-32}
elif [[ $TP -gt 1 ]]; then
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [[ $gpus -gt 0 || $LAUNCHER == slurm ]]; then
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Experts get another number of tokens in every step; blocks that can grow do not fragment memory.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # Kernels that Triton compiles: a home directory shared by all nodes is slow, and their compilers race.
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$UID}
fi

python=${PYTHON:-python3}
job=(
  --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
  --module megatron_slim.cli.pretrain "${args[@]}" "${settings_args[@]}" "$@"
)
if [[ $LAUNCHER == slurm ]]; then
  slurm_run
  exit
fi
command=("$python" -m megatron_slim torchrun --node-rank "$NODE_RANK" "${job[@]}")
if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
