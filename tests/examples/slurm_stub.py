"""Slurm's commands, as far as a job of ours sees them: nodes are processes of this machine.

Called as ``sbatch``, ``squeue``, ``srun`` or ``scontrol`` (this file under these names), with the state of the one job
in ``$SLURM_STUB``.
Kept from the real ones: sbatch runs a copy of the script in a spool directory; signals of ``--signal=B:`` reach the
batch shell alone; srun kills its tasks when it gets SIGTERM, takes the highest exit code, gives tasks ``--wait``
seconds after the first has ended, and passes no standard output but through ``--output``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

STATE = Path(os.environ["SLURM_STUB"])
JOB = "4242"
FLAGS_WITHOUT_VALUE = {"--label", "--requeue", "--exclusive", "--noheader"}


def split_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options up to the first word that is none, and the rest."""
    options: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, has_value, value = words.pop(0).partition("=")
        if name not in FLAGS_WITHOUT_VALUE and not has_value:
            value = words.pop(0)
        options[name] = value
    return options, words


def sbatch(words: list[str]) -> int:
    """Run the job in the foreground, again as long as it is requeued."""
    options, (script, *arguments) = split_options(words)
    header = re.findall(r"^#SBATCH (--\S+)", Path(script).read_text(), re.MULTILINE)
    options = split_options(header)[0] | options
    if "STUB_HOLDS" in os.environ:  # as of a queue that no job has left yet
        with (STATE / "held").open("a") as held:
            held.write(json.dumps(options) + "\n")
        print(f"Submitted batch job {JOB}{os.environ.get('STUB_CLUSTER', '')}")
        return 0
    spool = STATE / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(script, spool / "slurm_script")
    (STATE / "options").write_text("\n".join(f"{name}={value}" for name, value in options.items()))
    for restart in range(int(os.environ.get("STUB_STARTS", "10"))):
        (STATE / "requeued").unlink(missing_ok=True)
        (STATE / "state").write_text(os.environ.get("STUB_STATE", "RUNNING"))
        environment = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": options["--nodes"],
            "SLURM_JOB_NODELIST": f"node[0-{int(options['--nodes']) - 1}]",
            "SLURM_SUBMIT_DIR": os.getcwd(),
            **({"SLURM_RESTART_COUNT": str(restart)} if restart else {}),
        }
        command = ["bash", str(spool / "slurm_script"), *arguments]
        with (STATE / f"output-{restart}").open("w") as output:
            job = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
        (STATE / "batch.pid").write_text(str(job.pid))
        code = job.wait()
        (STATE / f"code-{restart}").write_text(str(code))
        if not (STATE / "requeued").exists():
            print(f"Submitted batch job {JOB}")
            return code
    return 0


def squeue(words: list[str]) -> int:
    """The numbers of the jobs asked for that are in the queue."""
    options, _ = split_options(words)
    if "STUB_NO_CONTROLLER" in os.environ:
        print("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    if not (STATE / "held").exists():
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    print("\n".join(job for job in options["--jobs"].split(",") if job == JOB))
    return 0


def srun(words: list[str]) -> int:
    """Start one task per node, each with the node's number; end them as srun does."""
    options, command = split_options(words)
    assert options["--ntasks"] == options["--nodes"]
    with open(options["--output"], "a") as output:
        tasks = []
        for node in range(int(options["--nodes"])):
            of_step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": options["--nodes"]}
            environment = os.environ | of_step | {"SLURM_NODEID": str(node)}
            task = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            threading.Thread(target=label, args=(node, task, output), daemon=True).start()
            tasks.append(task)

        def kill(signum: int, frame: FrameType | None) -> None:
            for task in tasks:
                task.kill()

        signal.signal(signal.SIGTERM, kill)
        deadline = None
        while any(task.poll() is None for task in tasks):
            if deadline is None and any(task.poll() is not None for task in tasks):
                deadline = time.monotonic() + float(os.environ.get("STUB_WAIT", options.get("--wait", "0")))
            if deadline is not None and time.monotonic() > deadline:
                kill(0, None)
            time.sleep(0.05)
        time.sleep(0.2)  # for the readers
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def label(node: int, task: subprocess.Popen[str], output) -> None:  # type: ignore[no-untyped-def]
    """``--label``."""
    for line in task.stdout or ():
        output.write(f"{node}: {line}")
        output.flush()


def scontrol(words: list[str]) -> int:
    """Names of nodes, the state of the job, and requeue."""
    match words:
        case ["show", "hostnames", nodes]:
            last = int(re.fullmatch(r"node\[0-(\d+)\]", nodes)[1])  # type: ignore[index]
            print("\n".join(["localhost", *(f"node{number}" for number in range(1, last + 1))]))
        case ["show", "job", "-o", job]:
            print(f"JobId={job} JobName=slim JobState={(STATE / 'state').read_text()} Reason=None")
        case ["requeue", job]:
            assert job == JOB
            (STATE / "requeued").touch()
        case _:
            raise SystemExit(f"scontrol: {words}")
    return 0


if __name__ == "__main__":
    commands = {"sbatch": sbatch, "squeue": squeue, "srun": srun, "scontrol": scontrol}
    sys.exit(commands[Path(sys.argv[0]).name](sys.argv[1:]))
