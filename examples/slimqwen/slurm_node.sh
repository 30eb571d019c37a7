#!/usr/bin/env bash
# What srun starts on each node of a job, in its container: slurm_node.sh READY PYTHON ARGUMENTS...
#
# READY is a file that the job has just written on shared storage. The first node's launcher leaves its process id there:
# a signal to it reaches all ranks and nothing else, while what Slurm sends also hits the processes that write checkpoints.
set -euo pipefail
ready=$1 python=$2
shift 2
for _ in {1..30}; do # a network file system may show it late
  [[ -e $ready ]] && break
  sleep 1
done
if [[ ! -e $ready ]]; then
  echo "error: $ready, written by the job's first node, is not on $(hostname); SAVE must be on shared storage, and mounted" >&2
  exit 2
fi
if [[ $SLURM_NODEID == 0 ]]; then echo $$ >"$ready"; fi
exec "$python" -m megatron_slim torchrun --node-rank "$SLURM_NODEID" "$@"
