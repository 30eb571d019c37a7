#!/usr/bin/env bash
# Compress a model from a recipe: every phase is pruned, trained, exported and evaluated, and a report written.
#
#   bash examples/slimqwen/compress.sh RECIPE --teacher DIR --data PREFIX --valid-data PREFIX --save DIR
#   LAUNCHER=slurm bash examples/slimqwen/compress.sh RECIPE ... --settings h100_64
#
# The arguments are those of `megatron-slim run`, which this runs. With LAUNCHER=slurm every step that is not done
# becomes a job of its own, which begins when the one before has ended well: training on the nodes of its settings, as
# pretrain_distill.sh submits it, all others on one node. A job that fails ends those after it. Run again, it submits what
# is left; not while jobs of this run are in the queue. IMAGE and MOUNTS as there; a job reads paths where it runs, so
# give absolute ones. Slurm's own SBATCH_... variables (partition, account, time) are those of all jobs. DRY_RUN=1 prints
# what would be submitted.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

root=${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
[[ -d $root/megatron_slim ]] || fail "ROOT is not set; it is the repository's directory, on storage that all nodes see"
files=$root/examples/slimqwen
if [[ -d $files ]]; then
  mounted=$root
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
else
  files=$root/megatron_slim/slimqwen
  mounted=$files
fi
python=${PYTHON:-python3}
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
slim=("$python" -m megatron_slim run "$@")

if [[ ${LAUNCHER:-torchrun} != slurm && -z ${STEP:-} ]]; then
  if [[ ${DRY_RUN:-0} == 1 ]]; then slim+=(--dry-run); fi
  exec "${slim[@]}"
fi

# shellcheck source=examples/slimqwen/slurm.sh
source "$files/slurm.sh"
if [[ -n $IMAGE && -f $IMAGE ]]; then IMAGE=$(absolute "$IMAGE"); fi
MOUNTS=$(absolute_mounts)

# In the job of one step: the command, in the container if there is one. What it reads and writes is mounted.
if [[ -n ${STEP:-} ]]; then
  slurm_container "$(tr ',' '\n' <<<"$mounted,$PATHS${MOUNTS:+,$MOUNTS}" | sed '/:/!s/.*/&:&/' | sort -u | paste -sd ,)"
  exec srun --nodes 1 --ntasks 1 --mpi none --output "$LOGS/$SLURM_JOB_ID.log" "${container_options[@]}" "${container[@]}" \
    env "PYTHONPATH=${PYTHONPATH:-}" "${slim[@]}" --step "$STEP"
fi

[[ -z ${SLURM_JOB_ID:-} ]] || fail "LAUNCHER=slurm within job $SLURM_JOB_ID: submit from outside of a job, or leave LAUNCHER out to run all steps in this one"
[[ -n $(command -v sbatch) || ${DRY_RUN:-0} == 1 ]] || fail "no sbatch here; submit where Slurm's commands are"
# Training reads the run's recipe when it is submitted, before a step has run.
mode=--prepare
if [[ ${DRY_RUN:-0} == 1 ]]; then mode=--dry-run; fi
steps=$("${slim[@]}" $mode --json | tail -n 1)
read_steps() { "$python" -c "import json, shlex, sys; found = json.loads(sys.argv[1]); $1" "$steps"; }
LOGS=$(read_steps 'print(found["save"] + "/logs")')
PATHS=$(read_steps 'print(",".join(found["paths"]))')
# Settings are those of a cluster with GPUs, which the machine that submits need not have.
if [[ -n $(read_steps 'print(found["settings"] or "")') ]]; then gpus=1; fi
export ROOT=$root IMAGE MOUNTS LOGS PATHS

previous=''
while IFS=$'\t' read -r name kind command; do
  dependency=${previous:+afterok:$previous}
  if [[ $kind == train ]]; then
    submit=(env "LAUNCHER=slurm" "DEPENDENCY=$dependency" bash -c "exec \"\$0\" -m megatron_slim $command" "$python")
  else
    submit=(env "STEP=$name" sbatch --nodes 1 --job-name "$name" --output "$LOGS/%j.out" ${dependency:+--dependency "$dependency" --kill-on-invalid-dep yes})
    if [[ $gpus -gt 0 ]]; then submit+=(--gpus-per-node 1); fi
    submit+=("$files/compress.sh" "$@")
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${submit[@]}"
    echo
    previous=JOB-OF-$name
    continue
  fi
  mkdir -p "$LOGS"
  answer=$("${submit[@]}" </dev/null)
  [[ $answer =~ batch\ job\ ([0-9]+) ]] || fail "sbatch gave no number of a job: $answer"
  previous=${BASH_REMATCH[1]} # of "Submitted batch job 123", and "on cluster NAME" where there are several
  echo "$previous" >>"$LOGS/jobs.txt" # --prepare asks Slurm for them
  echo "$name: job $previous${dependency:+, $dependency}"
done < <(read_steps '[print(s["name"], s["kind"], shlex.join(s["command"][1:]), sep="\t") for s in found["steps"] if not s["done"]]')
[[ -n $previous ]] || echo "everything is done"
