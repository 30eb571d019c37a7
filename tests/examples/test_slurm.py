"""The training script as a Slurm job, on two nodes that are processes of this machine (see slurm_stub.py)."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_slim.files import to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/slimqwen/pretrain_distill.sh"
TRAINING = {"SAVE": "run", "DATA": "0.3 a 0.7 b", "STUDENT": "pruned", "TEACHER": "big"}


def job(**more: str) -> dict[str, str]:
    """What a batch script finds in its environment."""
    inside = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    return inside | TRAINING | more


def script(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_dry_run_of_a_job_prints_srun_and_every_node(slurm: dict[str, str]) -> None:
    done = script(slurm | job(DRY_RUN="1", TP="2", NPROC_PER_NODE="8", NCCL_IB_HCA="mlx5"), "--lr", "1")
    assert done.returncode == 0, done.stderr
    step, *nodes = map(shlex.split, done.stdout.splitlines())
    assert step[:3] == ["srun", "--nodes", "2"] and f"{ROOT}/run/logs/4242-0.log" in step
    assert {"CUDA_DEVICE_MAX_CONNECTIONS=1", "NCCL_IB_HCA=mlx5"} <= set(step)
    for number, words in enumerate(nodes):
        assert words[:2] == ["node", f"{number}:"]
        assert words[3:7] == ["-m", "megatron_slim", "torchrun", "--node-rank"] and words[7] == str(number)
        assert words[8:] == step[step.index("--nproc-per-node") :]  # what the step hands to each node
    command = " ".join(nodes[1])
    assert "--nnodes 2 --master-addr localhost --master-port 24242" in command
    assert f"--data 0.3 {ROOT}/a 0.7 {ROOT}/b --student" in command and "-- --exit-signal-handler" in command
    assert nodes[1][-2:] == ["--lr", "1"]
    assert not (ROOT / "run").exists()


def test_dry_run_outside_of_a_job_prints_sbatch_too(slurm: dict[str, str]) -> None:
    done = script(slurm | TRAINING | {"DRY_RUN": "1", "LAUNCHER": "slurm", "SETTINGS": "h100_64"})
    assert done.returncode == 0, done.stderr
    batch, step, *nodes = done.stdout.splitlines()
    assert f"sbatch --nodes 8 --output {ROOT}/run/logs/%j.out --gpus-per-node 8 {SCRIPT}" in batch
    assert step.startswith("srun --nodes 8 ") and len(nodes) == 8
    assert "--expert-tensor-parallel-size 1" in nodes[0] and "--precision bf16" in nodes[0]


def test_tensor_parallelism_alone_asks_for_one_queue(slurm: dict[str, str]) -> None:
    def queues(*arguments: str, **variables: str) -> list[str]:
        done = script(slurm | job(DRY_RUN="1", **variables), *arguments)
        return re.findall(r"CUDA_DEVICE_MAX_CONNECTIONS=(\d+)", done.stdout)

    assert queues() == []
    assert queues(TP="2") == ["1"]
    assert queues("--overlap-moe-expert-parallel-comm", TP="2") == ["32"]
    assert queues(TP="2", CUDA_DEVICE_MAX_CONNECTIONS="8") == ["8"]
    smi = Path(slurm["PATH"].split(":")[0]) / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncase $1 in --query*) echo 10.0;; *) echo GPU 0;; esac\n")
    smi.chmod(0o755)
    assert queues(TP="2") == ["32"] and queues() == []


def test_a_program_of_the_users_own_is_mounted(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    own = tmp_path / "mine/my_run.py"
    own.touch()
    asked = slurm | job(DRY_RUN="1", IMAGE="registry#image:1", PROGRAM=os.path.relpath(own, ROOT))
    step, *nodes = map(shlex.split, script(asked, "--z-weight-end", "1").stdout.splitlines())
    assert f"{own.parent}:{own.parent}" in step[step.index("--container-mounts") + 1].split(",")
    for words in (step, *nodes):
        place = words.index(str(own))
        assert words[place - 1] == "24242" and words[place + 1] == "--tp" and "--module" not in words


def test_names_that_look_like_numbers_are_data_where_no_weight_stands(slurm: dict[str, str]) -> None:
    for data, shown in (("2024", f"{ROOT}/2024"), ("0.5 ./2024 .5e0 e", f"0.5 {ROOT}/2024 .5e0 {ROOT}/e")):
        step = script(slurm | job(DRY_RUN="1", DATA=data)).stdout.splitlines()[0]
        assert f"--data {shown} --student" in step


def test_mounts_that_are_here_become_absolute(slurm: dict[str, str]) -> None:
    variables = {"IMAGE": "registry#image:1", "MOUNTS": "tests,./docs:/y,/etc/x,tmpfs:/dev/shm"}
    words = shlex.split(script(slurm | job(DRY_RUN="1", **variables)).stdout.splitlines()[0])
    mounts = words[words.index("--container-mounts") + 1].split(",")
    assert mounts[-4:] == [f"{ROOT}/tests:{ROOT}/tests", f"{ROOT}/docs:/y", "/etc/x:/etc/x", "tmpfs:/dev/shm"]


def test_a_container_has_its_own_python(slurm: dict[str, str]) -> None:
    """Where the command has started the script, and the caller names no Python."""
    training = ["--student", "pruned", "--save", "run", "--data", "a", "--dry-run"]
    command = [sys.executable, "-m", "megatron_slim", "distill", *training]
    for image, python in (("", sys.executable), ("registry#image:1", "python3")):
        environment = {key: value for key, value in (slurm | job(IMAGE=image)).items() if key != "PYTHON"}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        words = shlex.split(done.stdout.splitlines()[0])
        assert words[words.index("bash") + 3] == python


@pytest.mark.parametrize("image", ["image.sqsh", "registry#image:1", "image.sif"])
def test_containers(slurm: dict[str, str], tmp_path: Path, image: str) -> None:
    if not image.startswith("registry"):
        image = str(tmp_path / image)
        Path(image).touch()
    variables = {"IMAGE": image, "MOUNTS": "/scratch,/etc/x:/y", "SLURM_GPUS_ON_NODE": "8"}
    done = script(slurm | job(DRY_RUN="1", **variables))
    words = shlex.split(done.stdout.splitlines()[0])
    mounts = [f"{path}:{path}" for path in (ROOT, ROOT / "big", ROOT / "pruned", ROOT / "run", "/scratch")] + [
        "/etc/x:/y"
    ]
    if image.endswith(".sif"):
        begin = words.index("apptainer")
        assert words[begin : begin + 3] == ["apptainer", "exec", "--bind"]
        assert words[begin + 3].split(",") == mounts
        assert words[begin + 4 : begin + 9] == ["--pwd", str(ROOT), "--nv", image, "env"]
    else:
        assert words[words.index("--container-image") + 1] == image
        assert words[words.index("--container-mounts") + 1].split(",") == mounts
        assert words[words.index("--container-workdir") + 2] == "env"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TRAINING | {"SETTINGS": "h100_63"}, "settings/h100_63.sh: no such settings; there are h100_256.sh h100_64.sh"),
        (TRAINING | {"LAUNCHER": "mpi"}, "LAUNCHER=mpi: it is torchrun or slurm"),
        (job(SETTINGS="h100_64"), "h100_64.sh is for 8 nodes, the job has 2; give sbatch --nodes 8"),
        (job(IMAGE="none.sif") | {"DRY_RUN": "0"}, "IMAGE=none.sif: no such file"),
        (job(PATH="/usr/bin:/bin"), "no srun in this job"),
        (TRAINING | {"LAUNCHER": "slurm", "PATH": "/usr/bin:/bin"}, "no sbatch here"),
        (job(SLURM_STEP_ID="0", SLURM_STEP_NUM_NODES="2"), "srun started this on 2 nodes"),
        (job(SAVE=""), "SAVE is not set"),
    ],
)
def test_wrong_settings_are_one_line(slurm: dict[str, str], variables: dict[str, str], message: str) -> None:
    done = script(slurm | variables)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


# What a launcher does, in place of Python; the last words of each case are what the job must come to.
LAUNCHERS = {
    "saves": "signal_the_job; wait_for_term; echo $((START * 10 + 5)) >$SAVE/latest_checkpointed_iteration.txt; exit 0",
    "reports Slurm's signal": "echo 'exiting program after receiving SIGTERM.'; exit 0",
    "dies of it": "signal_the_job; wait_for_term; exit 1",
    "is refused": "signal_the_job; wait_for_term; exit 2",
    "crashes": "exit 1",
    "ends": "exit 0",
}
LAUNCHER = """#!/bin/bash
START=${{SLURM_RESTART_COUNT:-0}}
signal_the_job() {{ [[ $SLURM_NODEID != 0 ]] || kill -{signal} "$(cat "$SLURM_STUB/batch.pid")"; }}
wait_for_term() {{ [[ $SLURM_NODEID == 0 ]] || return 0; trap : TERM; sleep 20 & wait $!; kill $!; }}
if [[ $START -ge {ends} ]]; then exit 0; fi
{body}
"""


@pytest.mark.parametrize(
    ("launcher", "variables", "codes", "says"),
    [
        ("saves", {}, [0, 0, 0], "ended with code 0 at checkpoint 15"),
        ("saves", {"signal": "TERM"}, [0, 0, 0], "ended with code 0 at checkpoint 15"),
        ("saves", {"STUB_STATE": "CANCELLED"}, [0], "left as it is"),
        ("saves", {"STUB_STATE": "COMPLETING"}, [0], "left as it is"),
        ("reports Slurm's signal", {}, [0, 0, 0], "ended with code 0"),
        ("dies of it", {"ends": "9"}, [0, 0, 1], "error: 3 starts without a new checkpoint"),
        ("is refused", {}, [2], "ended with code 2"),
        ("crashes", {}, [1], "ended with code 1"),
        ("ends", {}, [0], "ended with code 0"),
    ],
)
def test_what_is_run_again(
    slurm: dict[str, str], tmp_path: Path, launcher: str, variables: dict[str, str], codes: list[int], says: str
) -> None:
    python = tmp_path / "python"
    options = {"signal": "USR1", "ends": "2"} | variables
    python.write_text(LAUNCHER.format(body=LAUNCHERS[launcher], signal=options["signal"], ends=options["ends"]))
    python.chmod(0o755)
    training = {"SAVE": str(tmp_path / "run"), "DATA": "a", "STUDENT": "b", "NNODES": "2", "LAUNCHER": "slurm"}
    done = script(slurm | training | variables | {"PYTHON": str(python), "STUB_WAIT": "1"})
    state = Path(slurm["SLURM_STUB"])
    assert done.returncode == codes[-1], done.stderr
    assert [int((state / f"code-{start}").read_text()) for start in range(len(codes))] == codes
    assert not (state / f"code-{len(codes)}").exists()
    assert says in (state / f"output-{len(codes) - 1}").read_text()


def test_storage_that_is_not_shared(tmp_path: Path) -> None:
    node = (ROOT / "examples/slimqwen/slurm_node.sh").read_text().replace("{1..30}", "{1..1}")
    (tmp_path / "node.sh").write_text(node)
    command = ["bash", str(tmp_path / "node.sh"), "/nowhere/1.ready", "python3"]
    done = subprocess.run(command, env=os.environ | {"SLURM_NODEID": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "SAVE must be on shared storage" in done.stderr


@contextlib.contextmanager
def submitted(slurm: dict[str, str], tmp_path: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A job of two nodes with one rank each; nothing of it is left afterwards."""
    model = tmp_path / "model"
    model.mkdir()
    shape = tiny_shape(num_layers=1, layer_types=("full_attention",), mtp_num_layers=0, hidden_size=32, vocab_size=96)
    (model / "config.json").write_text(to_json(tiny_hf_config(shape)))
    write_tokens(tmp_path / "data", np.random.default_rng(0).integers(0, 96, (400, 33)))
    small = {
        "SEQ_LENGTH": "32",
        "GLOBAL_BATCH_SIZE": "2",
        "LR_WARMUP_ITERS": "1",
        "EVAL_ITERS": "0",
        "LOG_INTERVAL": "1",
    }
    variables = {
        "SAVE": str(tmp_path / "run"),
        "DATA": str(tmp_path / "data"),
        "HF_CONFIG": str(model),
        "LOG_INTERVAL": "1",
    }
    environment = slurm | small | variables | {"NNODES": "2", "LAUNCHER": "slurm", "TRAIN_ITERS": "4000"} | more
    command = ["bash", str(SCRIPT), "--split", "1,0,0", *arguments]
    batch = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        yield batch
    finally:
        for process in [*psutil.Process(batch.pid).children(recursive=True), batch] if batch.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        batch.wait()


def wait_for(batch: subprocess.Popen[bytes], log: Path, pattern: str) -> None:
    deadline = time.monotonic() + 150
    while not (log.exists() and re.search(pattern, log.read_text())):
        text = log.read_text()[-3000:] if log.exists() else ""
        assert batch.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.05)


def stop(batch: subprocess.Popen[bytes], slurm: dict[str, str], logs: Path) -> None:
    """Let it train for some steps; then the signal."""
    wait_for(batch, logs / "4242-0.log", r"iteration +3/")
    os.kill(int((Path(slurm["SLURM_STUB"]) / "batch.pid").read_text()), signal.SIGUSR1)


def iterations(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r"iteration +(\d+)/", log.read_text())]


@pytest.mark.slow
def test_a_job_of_two_nodes_saves_at_the_signal(slurm: dict[str, str], tmp_path: Path) -> None:
    """USR1, as Slurm sends it before the end of the time, while both nodes train."""
    state, logs = Path(slurm["SLURM_STUB"]), tmp_path / "run/logs"
    with submitted(slurm, tmp_path, STUB_STARTS="1") as batch:
        stop(batch, slurm, logs)
        assert batch.wait(timeout=150) == 0
    done = iterations(logs / "4242-0.log")[-1]
    assert (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == str(done)
    assert f"ended with code 0 at checkpoint {done}" in (state / "output-0").read_text()
    assert (state / "requeued").exists() and (state / "code-0").read_text() == "0"
    assert {"0", "1"} == {line.split(":")[0] for line in (logs / "4242-0.log").read_text().splitlines()}
    assert not list(logs.glob("*.ready"))
    assert "--signal=B:USR1@600" in (state / "options").read_text().splitlines()


@pytest.mark.slow
def test_a_job_that_runs_again_resumes(slurm: dict[str, str], tmp_path: Path) -> None:
    """With a program of the user's own, which both starts run."""
    state, logs = Path(slurm["SLURM_STUB"]), tmp_path / "run/logs"
    (tmp_path / "my_run.py").write_text(
        "import sys\nfrom megatron_slim.cli.pretrain import main\n"
        "if __name__ == '__main__':\n    print('mine')\n    main(sys.argv[1:], sys.argv[0])\n"
    )
    with submitted(slurm, tmp_path, "--exit-interval", "200", PROGRAM="my_run.py") as batch:
        stop(batch, slurm, logs)
        assert batch.wait(timeout=150) == 0
    first, second = (iterations(logs / f"4242-{start}.log") for start in (0, 1))
    assert second[0] == first[-1] + 1 and second[-1] == 200
    assert all("mine" in (logs / f"4242-{start}.log").read_text() for start in (0, 1))
    output = (state / "output-1").read_text()
    assert f"start 2 on 2 nodes, the first is localhost; from checkpoint {first[-1]}" in output
    assert "ended with code 0 at checkpoint 200" in output and "to be run again" not in output


@pytest.mark.slow
def test_a_failing_job_is_not_run_again(slurm: dict[str, str], tmp_path: Path) -> None:
    """An error that the user can fix keeps its exit code through ranks, launchers, srun and the job."""
    with submitted(slurm, tmp_path, DATA=str(tmp_path / "nothing")) as batch:
        assert batch.wait(timeout=150) == 2
    log = (tmp_path / "run/logs/4242-0.log").read_text()
    assert log.startswith("0: error: ") and "no such data" in log and len(log.splitlines()) <= 2
    assert not (Path(slurm["SLURM_STUB"]) / "code-1").exists()


@pytest.mark.slow
def test_a_dead_rank_ends_all_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "run/logs/4242-0.log"
    with submitted(slurm, tmp_path, STUB_WAIT="5") as batch:
        wait_for(batch, log, r"iteration +3/")
        ranks = [p for p in psutil.Process(batch.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
        assert batch.wait(timeout=60) not in (0, 2)
    assert not (Path(slurm["SLURM_STUB"]) / "code-1").exists()
