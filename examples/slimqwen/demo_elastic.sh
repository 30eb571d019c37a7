#!/usr/bin/env bash
# Three sizes in one checkpoint on a CPU: prune the demo's teacher to nested budgets, train them together in two ways,
# train each of them alone with as many tokens of its own, and the largest with those of all; compare.
#
#   bash examples/slimqwen/demo_elastic.sh [OUTPUT_DIRECTORY]      (default: runs/demo-elastic, made anew every time)
#
# Takes the teacher and the data of `make demo` from DEMO (default: runs/demo), which must be there. ITERS are the steps
# that each budget gets, SEEDS those of the order of the data and of the budgets.
set -euo pipefail
if [[ -n ${1:-} ]]; then set -- "$(realpath -ms -- "$1")"; fi # from here, not from the repository
if [[ -n ${DEMO:-} ]]; then DEMO=$(realpath -ms -- "$DEMO"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${1:-runs/demo-elastic}
demo=${DEMO:-runs/demo}
ITERS=${ITERS:-150}
SEEDS=${SEEDS:-1}
export SEQ_LENGTH=256 MICRO_BATCH_SIZE=4 GLOBAL_BATCH_SIZE=8 LR=1e-3 MIN_LR=1e-4 PP=2
export LOG_INTERVAL=${LOG_INTERVAL:-10} EVAL_INTERVAL=100000 EVAL_ITERS=1 SAVE_INTERVAL=100000 MASTER_PORT=${MASTER_PORT:-29541}
export TEACHER="$demo/teacher" DATA="$demo/data/train_text_document" VALID_DATA="$demo/data/validation_text_document"

if [[ ! -e $TEACHER || ! -e $DATA.bin ]]; then
  echo "error: $demo has no teacher and data; run make demo first, or give DEMO=DIRECTORY" >&2
  exit 2
fi
source examples/slimqwen/demo_steps.sh
begin_demo slices

read -r -a train_flags <<<"${TRAIN_FLAGS:-}" # more flags of every training run
train() { # train NAME STUDENT ITERS SEED FLAGS...
  local name=$1 student=$2 iters=$3 seed=$4
  shift 4
  step "$name" env PYTHON="$python" STUDENT="$student" TRAIN_ITERS="$iters" SAVE="$out/$name" \
    bash examples/slimqwen/pretrain_distill.sh --default-lr-warmup-iters 20 --seed "$seed" "${train_flags[@]}" "$@"
}

evaluate() { # evaluate NAME CHECKPOINT FLAGS...
  local name=$1 checkpoint=$2
  shift 2
  step "evaluate-$name" "$python" -m megatron_slim evaluate --load "$checkpoint" --teacher "$TEACHER" --data "$VALID_DATA" \
    --seq-length "$SEQ_LENGTH" --num-samples 96 --micro-batch-size 8 --json "$@"
}

budgets=(large middle small)
step prune "$python" -m megatron_slim prune --load "$TEACHER" --recipe examples/slimqwen/recipes/demo_elastic.yaml \
  --calibration-data "$DATA" --seq-length "$SEQ_LENGTH" --num-samples 64 --micro-batch-size 8 --save "$out/pruned" --json
for name in "${budgets[@]}"; do
  step "slice-$name" "$python" -m megatron_slim slice --load "$out/pruned" --budget "$name" --save "$out/slices/$name" --json
done
evaluate pruned "$out/pruned" --elastic
for seed in $SEEDS; do
  train "in-turn-$seed" "$out/pruned" $((ITERS * ${#budgets[@]})) "$seed" --elastic in-turn
  evaluate "in-turn-$seed" "$out/in-turn-$seed" --elastic
  train "together-$seed" "$out/pruned" "$ITERS" "$seed" --elastic together
  evaluate "together-$seed" "$out/together-$seed" --elastic
  for name in "${budgets[@]}"; do
    train "alone-$name-$seed" "$out/slices/$name" "$ITERS" "$seed"
    evaluate "alone-$name-$seed" "$out/alone-$name-$seed"
  done
  train "alone-all-$seed" "$out/slices/large" $((ITERS * ${#budgets[@]})) "$seed"
  evaluate "alone-all-$seed" "$out/alone-all-$seed"
done
"$python" examples/slimqwen/demo_elastic_report.py "$out"
