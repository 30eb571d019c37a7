# shellcheck shell=bash disable=SC2034,SC2154  # sourced by pretrain_distill.sh; they share variables
# A training as a Slurm job: submit it, start a launcher on each node, save before Slurm ends it, and have it run again.
#
# IMAGE: a container, *.sif for apptainer, anything else for pyxis (a .sqsh file or registry#name); without it nodes run
# what is installed there. MOUNTS: more paths for it, comma-separated, SOURCE or SOURCE:TARGET.
IMAGE=${IMAGE:-}
MOUNTS=${MOUNTS:-}
IDLE_REQUEUES=${IDLE_REQUEUES:-3} # so many restarts in a row without a new checkpoint are the last

absolute() { realpath -ms -- "$1"; }

absolute_data() { # in "weight prefix ..." the prefixes
  local word words=() found=()
  read -r -a words <<<"$1"
  for word in "${words[@]}"; do
    # A number is a weight, but for the only word.
    if [[ ${#words[@]} -gt 1 && $word =~ ^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]]; then found+=("$word"); else found+=("$(absolute "$word")"); fi
  done
  echo "${found[*]}"
}

# MOUNTS with the sources absolute that are there, each SOURCE:TARGET.
absolute_mounts() {
  local mount source found=()
  while IFS= read -r mount; do
    [[ -n $mount ]] || continue
    source=${mount%%:*}
    if [[ -e $source ]]; then mount=$(absolute "$source")${mount#"$source"}; fi
    if [[ $mount != *:* ]]; then mount=$mount:$mount; fi
    found+=("$mount")
  done < <(tr ',' '\n' <<<"$MOUNTS")
  (IFS=, && echo "${found[*]}")
}

# Paths that hold wherever a node starts; and where it starts.
slurm_prepare() { # slurm_prepare [Megatron's flags]
  local command
  root=$(absolute "$root")
  SAVE=$(absolute "$SAVE")
  DATA=$(absolute_data "$DATA")
  VALID_DATA=$(absolute_data "$VALID_DATA")
  if [[ -n $STUDENT ]]; then STUDENT=$(absolute "$STUDENT"); fi
  if [[ -n $HF_CONFIG ]]; then HF_CONFIG=$(absolute "$HF_CONFIG"); fi
  if [[ -n $TEACHER ]]; then TEACHER=$(absolute "$TEACHER"); fi
  if [[ -n $TEACHER_CACHE ]]; then TEACHER_CACHE=$(absolute "$TEACHER_CACHE"); fi
  if [[ -n $PROGRAM ]]; then PROGRAM=$(absolute "$PROGRAM"); fi
  if [[ ${DRY_RUN:-0} != 1 && ($IMAGE == *.sif || $IMAGE == *.sqsh) && ! -f $IMAGE ]]; then
    fail "IMAGE=$IMAGE: no such file"
  fi
  if [[ -f $IMAGE ]]; then IMAGE=$(absolute "$IMAGE"); fi
  MOUNTS=$(absolute_mounts)
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    slurm_submit "$@"
    MASTER_ADDR=FIRST_NODE MASTER_PORT=PORT # to be printed
    return
  fi
  for command in srun scontrol; do
    [[ -n $(command -v $command) ]] || fail "no $command in this job; give sbatch no container, but IMAGE to this script"
  done
  if [[ ${SETTINGS_NODES:-$SLURM_JOB_NUM_NODES} != "$SLURM_JOB_NUM_NODES" ]]; then
    fail "$SETTINGS is for $SETTINGS_NODES nodes, the job has $SLURM_JOB_NUM_NODES; give sbatch --nodes $SETTINGS_NODES, or other SETTINGS"
  fi
  NNODES=$SLURM_JOB_NUM_NODES
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
}

# Variables that must be passed into a container, since its image may have set it otherwise.
node_environment() {
  local name
  while read -r name; do
    if [[ $name =~ ^(NCCL_|GLOO_|NVTE_|UCX_|TORCH_NCCL_|CUDA_DEVICE_MAX_|PYTORCH_CUDA_|TRITON_CACHE_DIR|OMP_NUM_|PYTHONPATH) ]]; then
      echo "$name=${!name}"
    fi
  done < <(compgen -e)
}

# Directories that the job uses, each under its own name: path:path, one a line.
node_mounts() {
  local path words=()
  read -r -a words <<<"$DATA $VALID_DATA"
  {
    printf '%s\n' "$mounted" "$SAVE"
    for path in "$STUDENT" "$HF_CONFIG" "$TEACHER" "$TEACHER_CACHE"; do [[ -z $path ]] || echo "$path"; done
    for path in "${words[@]}" "$PROGRAM"; do [[ $path != /* ]] || dirname "$path"; done
  } | sort -u | sed 's/.*/&:&/'
  if [[ -n $MOUNTS ]]; then tr ',' '\n' <<<"$MOUNTS"; fi
}

# The arrays `container_options`, of srun, and `container`, what comes before a command, for these mounts.
slurm_container() { # slurm_container SOURCE:TARGET,...
  container_options=() container=()
  case $IMAGE in
    '') ;;
    *.sif)
      container=("$(command -v apptainer || command -v singularity || echo apptainer)" exec --bind "$1" --pwd "$mounted")
      if [[ $gpus -gt 0 ]]; then container+=(--nv); fi
      container+=("$IMAGE")
      ;;
    *) container_options=(--container-image "$IMAGE" --container-mounts "$1" --container-workdir "$mounted") ;;
  esac
}

# The array `launch`: srun, its container, and what runs in it on each node.
slurm_launch() { # slurm_launch LOG READY
  local environment mounts
  mapfile -t environment < <(node_environment)
  mounts=$(node_mounts | paste -sd ,)
  # A launcher that has ended gives the others a minute, in which they find the same error, or have lost their peer.
  launch=(srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --mpi none --cpu-bind none)
  if [[ -n ${SLURM_CPUS_ON_NODE:-} ]]; then launch+=(--cpus-per-task "$SLURM_CPUS_ON_NODE"); fi
  launch+=(--kill-on-bad-exit 0 --wait 60 --label --open-mode append --output "$1")
  slurm_container "$mounts"
  launch+=("${container_options[@]}" "${container[@]}")
  launch+=(env "${environment[@]}" bash "$files/slurm_node.sh" "$2" "$python" "${job[@]}")
}

# Start it; on USR1 or TERM save, and have Slurm run the same job again.
slurm_run() {
  local log ready before step code=0 signalled='' name=$SAVE/logs/${SLURM_JOB_ID:-JOB}-${SLURM_RESTART_COUNT:-0}
  log=$name.log ready=$name.ready
  slurm_launch "$log" "$ready"
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    slurm_print "${launch[@]}"
    return
  fi
  mkdir -p "$SAVE/logs"
  : >"$ready"
  before=$(last_checkpoint)
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $NNODES nodes, the first is $MASTER_ADDR; from checkpoint ${before:-none}; log: $log"
  trap 'signalled=1; stop_ranks "$ready" &' USR1 TERM
  "${launch[@]}" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trap ends `wait`, not the step
  wait "$step" || code=$?
  rm -f "$ready"
  echo "job $SLURM_JOB_ID: ended with code $code at checkpoint $(last_checkpoint)"
  # Slurm may also have signalled the ranks alone.
  if grep -qs "exiting program after receiving SIGTERM" "$log"; then signalled=1; fi
  if [[ -n $signalled && $code != 2 ]]; then
    code=0
    requeue "$before" || code=$?
  fi
  return "$code"
}

last_checkpoint() { cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || true; }

stop_ranks() { # stop_ranks READY: as soon as the first node's launcher is there. (srun would kill at SIGTERM.)
  local launcher
  until launcher=$(cat "$1" 2>/dev/null) && [[ -n $launcher ]]; do
    [[ -e $1 ]] || return 0
    sleep 1
  done
  kill -TERM "$launcher" 2>/dev/null || true
}

# Run again what Slurm was about to end, but not what a person cancelled, nor what comes no further.
requeue() { # requeue CHECKPOINT-AT-THE-START
  local record=$SAVE/logs/$SLURM_JOB_ID.requeues
  if [[ " $(scontrol show job -o "$SLURM_JOB_ID") " != *" JobState=RUNNING "* ]]; then
    echo "job $SLURM_JOB_ID: not running any more (cancelled, or requeued by Slurm): left as it is"
    return 0
  fi
  if [[ $(last_checkpoint) != "$1" ]]; then : >"$record"; else echo "${1:-none}" >>"$record"; fi
  if [[ $(wc -l <"$record") -ge $IDLE_REQUEUES ]]; then
    echo "error: $IDLE_REQUEUES starts without a new checkpoint; give the job more time, or signal it earlier (sbatch --signal B:USR1@SECONDS)" >&2
    return 1
  fi
  echo "job $SLURM_JOB_ID: to be run again"
  scontrol requeue "$SLURM_JOB_ID"
}

# Outside of a job: hand this very script to Slurm, its output next to the checkpoints.
slurm_submit() { # slurm_submit [Megatron's flags]
  local submit
  NNODES=${SETTINGS_NODES:-$NNODES}
  submit=(sbatch --nodes "$NNODES" --output "$SAVE/logs/%j.out")
  if [[ -n ${SETTINGS_NODES:-} || $gpus -gt 0 ]]; then submit+=(--gpus-per-node "$NPROC_PER_NODE"); fi
  if [[ -n ${DEPENDENCY:-} ]]; then submit+=(--dependency "$DEPENDENCY" --kill-on-invalid-dep yes); fi
  submit+=("$files/pretrain_distill.sh" "$@")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${submit[@]}"
    echo
    return
  fi
  [[ -n $(command -v sbatch) ]] || fail "no sbatch here; submit where Slurm's commands are"
  mkdir -p "$SAVE/logs"
  export ROOT=$root SAVE DATA VALID_DATA STUDENT HF_CONFIG TEACHER TEACHER_CACHE PROGRAM SETTINGS IMAGE MOUNTS
  exec "${submit[@]}"
}

slurm_print() { # slurm_print SRUN-COMMAND...
  local node
  printf '%q ' "$@"
  echo
  for ((node = 0; node < NNODES; node++)); do
    printf 'node %d: ' "$node"
    printf '%q ' "$python" -m megatron_slim torchrun --node-rank "$node" "${job[@]}"
    echo
  done
}
