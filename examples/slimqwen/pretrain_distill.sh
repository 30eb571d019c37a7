#!/usr/bin/env bash
# Train or distil: on this node (torchrun, GPUs or CPU), on several by hand (NNODES, NODE_RANK, MASTER_ADDR), or as a
# Slurm job. The same script and recipe; docs/cluster.md has the whole story.
#
#   TEACHER=teacher-hf STUDENT=pruned SAVE=run DATA=corpus_text_document bash examples/slimqwen/pretrain_distill.sh
#   ... SETTINGS=h100_64 LAUNCHER=slurm bash examples/slimqwen/pretrain_distill.sh      submits itself
#   ... SETTINGS=h100_64 sbatch --nodes 8 --gpus-per-node 8 examples/slimqwen/pretrain_distill.sh
#
# PROGRAM=my_run.py starts a program of yours on every rank in place of ours: it registers a loss, a family or an optimizer
# of its own and then calls megatron_slim.cli.pretrain.main (docs/guides/add_a_loss.md has one).
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
  [[ $SETTINGS == */* ]] || SETTINGS=./$SETTINGS # bash would look along PATH first
  [[ -f $SETTINGS ]] || fail "$SETTINGS: no such settings; there are $(cd "$files/settings" && echo *.sh)"
  # shellcheck source=examples/slimqwen/settings/h100_64.sh
  source "$SETTINGS"
fi

# What to train. STUDENT: a checkpoint to start from, torch_dist or Hugging Face. Without one, HF_CONFIG: a directory
# whose config.json gives the shape of a student with random weights. Without TEACHER it is plain LM + MTP-LM training.
STUDENT=${STUDENT:-}
HF_CONFIG=${HF_CONFIG:-}
TEACHER=${TEACHER:-}
TEACHER_CACHE=${TEACHER_CACHE:-} # in place of TEACHER: what megatron-slim record wrote, with the data
SAVE=${SAVE:-}
DATA=${DATA:-}             # prefix of a .bin/.idx pair, or "weight prefix weight prefix ..."
VALID_DATA=${VALID_DATA:-} # the same, for validation; without it a part of DATA is set aside
[[ -n $SAVE ]] || fail "SAVE is not set (--save DIR); it is the directory for checkpoints and logs, and a run found there is resumed"
[[ -n $DATA || -n $TEACHER_CACHE ]] || fail "DATA is not set (--data PREFIX); make it with megatron-slim preprocess"
[[ -n $STUDENT || -n $HF_CONFIG ]] || fail "neither STUDENT nor HF_CONFIG is set; give a checkpoint (--student DIR), or a config.json for random weights (--hf-config DIR)"

# Layout: NPROC_PER_NODE processes a node, of which TP x PP hold one copy of both models and the rest is data parallel.
TP=${TP:-1}
PP=${PP:-1}
EP=${EP:-1}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
whole() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a whole number above zero"; }
for name in TP PP EP NNODES; do whole "$name"; done
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : TP * PP * EP))}
whole NPROC_PER_NODE
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
# slurm: one launcher on each node of a job. In a step of a job this script already is what runs on a node.
LAUNCHER=${LAUNCHER:-$([[ -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]] && echo slurm || echo torchrun)}
[[ $LAUNCHER == torchrun || $LAUNCHER == slurm ]] || fail "LAUNCHER=$LAUNCHER: it is torchrun or slurm"

# What ranks run: a Python file, or without one our own main.
PROGRAM=${PROGRAM:-}
[[ -z $PROGRAM || -f $PROGRAM ]] || fail "PROGRAM=$PROGRAM: no such file; it is a Python program that calls megatron_slim.cli.pretrain.main (--program FILE)"

# PROGRESSIVE=1: the student is that of a phase of a recipe, and takes its part in the one schedule of all phases, whose
# length follows from the recipe's tokens. CARRY_OPTIMIZER=1: it begins with the moments that pruning has carried over;
# without them STAGE_WARMUP=N: the learning rate begins at a tenth and is the schedule's after N steps of the phase.
PROGRESSIVE=${PROGRESSIVE:-0}
CARRY_OPTIMIZER=${CARRY_OPTIMIZER:-0}
[[ $PROGRESSIVE == 0 || $PROGRESSIVE == 1 ]] || fail "PROGRESSIVE=$PROGRESSIVE: it is 0 or 1"
[[ $CARRY_OPTIMIZER == 0 || $CARRY_OPTIMIZER == 1 ]] || fail "CARRY_OPTIMIZER=$CARRY_OPTIMIZER: it is 0 or 1"
PRECISION=${PRECISION:-$([[ $gpus -gt 0 ]] && echo bf16 || echo fp32)}
[[ $PRECISION == bf16 || $PRECISION == fp32 ]] || fail "PRECISION=$PRECISION: it is bf16 or fp32; FP8 and fp16 are flags of Megatron (docs/fp8.md)"

if [[ $LAUNCHER == slurm ]]; then
  # shellcheck source=examples/slimqwen/slurm.sh
  source "$files/slurm.sh"
  slurm_prepare "$@"
elif [[ ${SLURM_STEP_NUM_NODES:-1} -gt 1 && $NNODES == 1 ]]; then
  fail "srun started this on $SLURM_STEP_NUM_NODES nodes; start it once, in the job, and it starts them (LAUNCHER=slurm)"
fi

# What is set, as `megatron-slim distill` has it. Defaults, and Megatron's names for it, are the ranks' to know:
# megatron_slim/training/variables.py.
read -r -a data <<<"$DATA"
read -r -a valid_data <<<"$VALID_DATA"
args=(--tp "$TP" --pp "$PP" --ep "$EP" --precision "$PRECISION" --save "$SAVE")
if [[ ${#data[@]} -gt 0 ]]; then args+=(--data "${data[@]}"); fi
if [[ ${#valid_data[@]} -gt 0 ]]; then args+=(--valid-data "${valid_data[@]}"); fi
pass_on() { [[ -z $2 ]] || args+=("$1" "$2"); }
pass_on --student "$STUDENT"
pass_on --hf-config "$HF_CONFIG"
pass_on --teacher "$TEACHER"
pass_on --teacher-cache "$TEACHER_CACHE"
pass_on --seq-length "${SEQ_LENGTH:-}"
pass_on --micro-batch-size "${MICRO_BATCH_SIZE:-}"
pass_on --global-batch-size "${GLOBAL_BATCH_SIZE:-}"
pass_on --train-iters "${TRAIN_ITERS:-}"
pass_on --tokens "${TOKENS:-}"
pass_on --lr "${LR:-}"
pass_on --min-lr "${MIN_LR:-}"
pass_on --lr-warmup-iters "${LR_WARMUP_ITERS:-}"
pass_on --save-interval "${SAVE_INTERVAL:-}"
pass_on --eval-interval "${EVAL_INTERVAL:-}"
pass_on --eval-iters "${EVAL_ITERS:-}"
pass_on --log-interval "${LOG_INTERVAL:-}"
pass_on --stage-warmup "${STAGE_WARMUP:-}"
if [[ $PROGRESSIVE == 1 ]]; then args+=(--progressive); fi
if [[ $CARRY_OPTIMIZER == 1 ]]; then args+=(--carry-optimizer); fi
# Megatron's own come behind.
args+=(--)
if [[ $LAUNCHER == slurm ]]; then args+=(--exit-signal-handler); fi

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
program=(--module megatron_slim.cli.pretrain)
if [[ -n $PROGRAM ]]; then program=("$PROGRAM"); fi
job=(
  --nproc-per-node "$NPROC_PER_NODE" --nnodes "$NNODES" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
  "${program[@]}" "${args[@]}" "${settings_args[@]}" "$@"
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
