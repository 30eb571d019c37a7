#!/usr/bin/env bash
# megatron-core 0.19.2: a checkpoint that is saved synchronously is written by threads of the process that saves. What they
# have written they nevertheless pass on through a queue in another process, which every rank starts at its first saving
# and which stays until the end. To read an entry of the queue that process imports torch.
#
# Expected: no other process, since nobody but the one that saves reads or writes the queue.
# Seen: after saving, 1 process more has torch in its memory
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2 psutil==7.0.0

cat >save.py <<'PY'
def main():  # imports are here for the other process, which runs this file too, and must not have torch from it
    import os

    import psutil
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    # The saving waits for copies from a GPU, and sends a number from there. Here is none.
    torch.cuda.synchronize, torch.cuda.current_device = lambda: None, lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    os.mkdir("checkpoint")
    before = set(psutil.Process().children())
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.arange(4.0))}
    dist_checkpointing.save(state, "checkpoint", async_sharded_save=False)
    started = [each for each in psutil.Process().children() if each not in before]
    with_torch = [each for each in started if any("libtorch" in part.path for part in each.memory_maps())]
    print(f"after saving, {len(with_torch)} process more has torch in its memory")  # another one is Python's own tracker
    assert len(with_torch) == 1, "the behaviour has changed"


if __name__ == "__main__":
    main()
PY
python save.py 2>output || { tail -n 20 output >&2; exit 1; }
