"""Jobs of a run that Slurm still has: a second one at work on the same step would write the same files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from megatron_slim.errors import SlimError

JOBS = "logs/jobs.txt"  # of a run: numbers of the jobs that compress.sh has submitted, a line each


def refuse_queued(save: Path) -> None:
    """Ask Slurm for the jobs of a run.

    Args:
        save: directory of the run.

    Raises:
        SlimError: some wait or run, or Slurm does not say.
    """
    path = save / JOBS
    jobs = list(dict.fromkeys(path.read_text().split())) if path.is_file() else []
    if not jobs:
        return
    clusters = os.environ.get("SBATCH_CLUSTERS")
    command = ["squeue", "--noheader", "--format", "%i", "--jobs", ",".join(jobs)]
    command += ["--clusters", clusters] if clusters else []
    filters = {name for name in os.environ if name.startswith("SQUEUE_")}  # which would leave some out
    environment = {name: value for name, value in os.environ.items() if name not in filters}
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        fix = "start it where Slurm's commands are"
        raise SlimError("no squeue here to ask for jobs of this run", where=str(path), fix=fix) from None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # what it says of a single job that has ended
        what = " ".join(answer.stderr.split())
        fix = "run again when Slurm answers"
        raise SlimError(f"squeue does not say whether jobs of this run are left: {what}", where=str(path), fix=fix)
    found = set(answer.stdout.split())
    if queued := [job for job in jobs if job in found]:
        fix = f"wait for them, or run scancel {' '.join(queued)}"
        raise SlimError(f"jobs of this run are in the queue: {', '.join(queued)}", where=str(path), fix=fix)
