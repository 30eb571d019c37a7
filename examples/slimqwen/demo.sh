#!/usr/bin/env bash
# The whole pipeline on a CPU: train a teacher; prune it, distil it into its own pruned self, evaluate and report with
# `megatron-slim run`; and train the same student from random weights for comparison.
#
#   bash examples/slimqwen/demo.sh [OUTPUT_DIRECTORY]      (default: runs/demo, made anew every time)
#
# The tools and scripts are those that a cluster uses; only sizes differ. TEACHER_ITERS and STUDENT_ITERS say how long.
set -euo pipefail
if [[ -n ${1:-} ]]; then set -- "$(realpath -ms -- "$1")"; fi # from here, not from the repository
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${1:-runs/demo}
TEACHER_ITERS=${TEACHER_ITERS:-450}
STUDENT_ITERS=${STUDENT_ITERS:-150}
export SEQ_LENGTH=256 MICRO_BATCH_SIZE=4 GLOBAL_BATCH_SIZE=8
export LOG_INTERVAL=${LOG_INTERVAL:-5} EVAL_INTERVAL=100000 EVAL_ITERS=1 SAVE_INTERVAL=100000 MASTER_PORT=${MASTER_PORT:-29531}

source examples/slimqwen/demo_steps.sh
begin_demo data teacher-config

train() { # train NAME ITERS; the rest through the environment, as on a cluster
  local name=$1 iters=$2
  step "$name" env PYTHON="$python" TRAIN_ITERS="$iters" SAVE="$out/$name" DATA="$out/data/train_text_document" \
    VALID_DATA="$out/data/validation_text_document" bash examples/slimqwen/pretrain_distill.sh --default-lr-warmup-iters 20
}

export OMP_NUM_THREADS=2
step corpus "$python" examples/slimqwen/make_corpus.py --output "$out/corpus" --json
step tokenizer "$python" examples/slimqwen/train_tokenizer.py --input "$out/corpus/train.jsonl" \
  --output "$out/tokenizer" --vocab-size 2048 --json
step task "$python" examples/slimqwen/make_task.py --input "$out/corpus/validation.jsonl" --output "$out/task" \
  --documents 100 --json
also=() tasks=() # what lm-evaluation-harness scores, where it is installed
if "$python" -c "import lm_eval" 2>/dev/null; then
  also=(--tasks continuation --tasks-dir "$out/task")
  tasks=("evaluate.tasks=[continuation]" "evaluate.tasks_dir=$(realpath "$out/task")")
fi
for split in train validation; do
  step "preprocess-$split" "$python" tools/preprocess_data.py --input "$out/corpus/$split.jsonl" \
    --output-prefix "$out/data/$split" --tokenizer-model "$out/tokenizer" --append-eod --workers 2 --json
done
cp examples/slimqwen/demo_teacher/config.json "$out/tokenizer/"* "$out/teacher-config/"

# The teacher: plain LM + MTP-LM training, two data-parallel processes.
export OMP_NUM_THREADS=1 NPROC_PER_NODE=2
LR=2e-3 MIN_LR=1e-4 HF_CONFIG="$out/teacher-config" train teacher-training "$TEACHER_ITERS"
unset NPROC_PER_NODE
export OMP_NUM_THREADS=2
step export-teacher "$python" tools/convert_checkpoint.py --load "$out/teacher-training" --save "$out/teacher" --to hf --json

# Depth, width and experts at once; half of the surviving experts are kept bit for bit, the others absorb the rest. Then
# distillation with teacher and student side by side in two pipeline stages, export, evaluation and report.
head -n 16 "$out/corpus/validation.jsonl" >"$out/prompts.jsonl"
unset OMP_NUM_THREADS # one for each of two processes in training, two elsewhere
"$python" -m megatron_slim run examples/slimqwen/recipes/demo.yaml --teacher "$out/teacher" --save "$out/run" \
  --data "$out/data/train_text_document" --valid-data "$out/data/validation_text_document" \
  --tokens $((STUDENT_ITERS * SEQ_LENGTH * GLOBAL_BATCH_SIZE)) \
  --set "evaluate.acceptance=$(realpath "$out/prompts.jsonl")" "${tasks[@]}"

# The same target, losses, tokens and teacher from random weights.
TEACHER="$out/teacher" LR=1e-3 MIN_LR=1e-4 PP=2 HF_CONFIG="$out/run/phase-1/pruned" train random-init "$STUDENT_ITERS"
export OMP_NUM_THREADS=2
step export-random-init "$python" tools/convert_checkpoint.py --load "$out/random-init" --save "$out/random-init-student" --to hf --json
step evaluate-random-init "$python" tools/evaluate.py --load "$out/random-init-student" --teacher "$out/teacher" \
  --data "$out/data/validation_text_document" --seq-length "$SEQ_LENGTH" --num-samples 96 --micro-batch-size 8 "${also[@]}" --json
"$python" examples/slimqwen/demo_report.py "$out"
