"""tools/doctor.py on the machine that runs the tests, on one that looks like a GPU machine, and before a run."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_slim.compat.patch import TESTED
from megatron_slim.compat.table import PATCHES
from megatron_slim.doctor import machine
from megatron_slim.doctor.findings import OK, Finding
from megatron_slim.sample_set import write_samples
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint, write_tokens

Doctor = Callable[..., tuple[int, dict[str, dict[str, str]]]]


@pytest.fixture
def doctor(tool: Callable[..., Any]) -> Doctor:
    """Exit code, and findings by name."""

    def run(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
        outcome = tool("tools/doctor.py", "--json", *arguments)
        report = outcome.json
        assert all(finding["fix"] for finding in report["findings"] if finding["state"] == "problem")
        assert outcome.code == (1 if report["problems"] else 0)
        return outcome.code, {finding["name"]: finding for finding in report["findings"]}

    return run


def state(finding: dict[str, str], found: str = "", fix: str = "") -> str:
    assert found in finding["found"] and fix in finding["fix"], finding
    return finding["state"]


def test_a_cpu_machine_lacks_nothing_that_it_needs(doctor: Doctor, tmp_path: Path) -> None:
    code, findings = doctor("--disk", tmp_path)
    assert code == 0
    assert findings["megatron-core"]["found"] == importlib.metadata.version("megatron-core")
    assert {"python", "torch", "transformers", "device", "cpu layer", "gloo", "disk"} <= findings.keys()
    assert not {"/dev/shm", "infiniband", "nccl", "compute capability"} & findings.keys()
    notes = {name for name, finding in findings.items() if finding["state"] == "note"}
    assert notes - {"lm-eval", "accelerate"} == {"device"}  # these are not installed with the others


def test_missing_package_is_a_problem_with_a_fix(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.22.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, findings = doctor()
    assert code == 1 and state(findings["megatron-core"], "not installed", "make venv") == "problem"
    assert state(findings["transformers"], "5.22.0", "tested with <6,>=5.23") == "note"


def test_changes_of_megatron_are_counted_or_listed(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    _, findings = doctor()
    assert state(findings["changes of megatron"], f"{len(PATCHES)}, made for megatron-core {TESTED}; --patches") == "ok"
    assert not {each.name for each in PATCHES} & findings.keys()
    code, findings = doctor("--patches")
    assert code == 0
    for each in PATCHES:
        assert state(findings[each.name], f"{each.kind}, made: {each.targets[0]}") == "ok"
        assert findings[each.name]["found"].endswith(f"{each.why} ({each.upstream})")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "megatron-core" else real(name))
    code, findings = doctor("--patches")
    assert code == 0 and {findings[each.name]["state"] for each in PATCHES} == {"note"}
    assert state(findings["changes of megatron"], "", "docs/guides/upgrade_megatron.md") == "note"


def test_on_a_gpu_those_for_cpus_are_not_made(doctor: Doctor, gpu: dict[str, Any]) -> None:
    _, findings = doctor("--patches")
    made = {"cpu": "not made with CUDA", "speed": "not made with CUDA", "library": "made if missing"}
    for each in PATCHES:
        assert state(findings[each.name], f"{each.kind}, {made.get(each.kind, 'made')}: ") == "ok"


def test_builds_of_nvidia_count_as_the_release_that_they_lead_to(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    builds = {"torch": "2.13.0a0+8145d630e8.nv26.06"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: builds.get(name) or real(name))
    assert state(doctor()[1]["torch"], "nv26.06") == "ok"


def test_directory_that_does_not_exist(tool: Callable[..., Any], tmp_path: Path) -> None:
    assert "no such directory" in tool("tools/doctor.py", "--disk", tmp_path / "none").error


def test_driver_without_a_gpu_for_torch(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(tmp_path, monkeypatch, "0, 0")
    code, findings = doctor()
    assert code == 1 and state(findings["device"], "torch sees no GPU", "CUDA_VISIBLE_DEVICES") == "problem"


def stub(directory: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """An nvidia-smi that says one thing."""
    (directory / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (directory / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


PACKAGES = {
    "transformer_engine": ("pytorch", "raise ImportError('undefined symbol: _ZN3c105ErrorC2E')"),
    "fla": ("ops", ""),
    "apex": ("other", ""),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Eight GPUs, as torch and nvidia-smi report them; what a test changes in the dictionary they report too."""
    says: dict[str, Any] = {"capability": (9, 0), "free": 79, "shm": 64}
    stub(tmp_path, monkeypatch, "0, 0")
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "get_device_name": lambda index: "NVIDIA H100",
        "get_device_capability": lambda index: says["capability"],
        "mem_get_info": lambda index: (says["free"] << 30, 80 << 30),
        "can_device_access_peer": lambda a, b: True,
    }
    for name, function in answers.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    real = shutil.disk_usage
    usage = type(real("/"))

    def disk_usage(path: str) -> Any:
        return usage(says["shm"] << 28, 0, says["shm"] << 28) if str(path) == "/dev/shm" else real(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    for name, (inner, body) in PACKAGES.items():
        (tmp_path / name / inner).mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / inner / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield says
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def test_a_gpu_machine(doctor: Doctor, gpu: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "transformer_engine/pytorch/__init__.py").write_text("")
    (tmp_path / "apex/optimizers").mkdir()
    (tmp_path / "apex/optimizers/__init__.py").touch()
    code, findings = doctor()
    assert code == 0
    assert state(findings["device"], "8 x CUDA") == state(findings["memory errors"], "none") == "ok"
    assert state(findings["nccl"], "2.29.7") == state(findings["peer access"], "all others") == "ok"
    assert all(findings[name]["state"] == "ok" for name in ("flash-linear-attention", "transformer-engine", "apex"))


def test_what_is_wrong_with_a_gpu_machine(
    doctor: Doctor, gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu |= {"capability": (7, 5), "free": 10, "shm": 1}
    stub(tmp_path, monkeypatch, "3, 2")
    code, findings = doctor()
    assert code == 1
    wrong = {
        "transformer-engine": ("undefined symbol", "NVIDIA's image"),
        "apex": ("another package", "pip uninstall apex"),
        "compute capability": ("7.5", "PRECISION=fp32"),
        "memory errors": ("GPU 3", "drained"),
        "/dev/shm": ("0.2 GiB", "--ipc=host"),
    }
    for name, (found, fix) in wrong.items():
        assert state(findings[name], found, fix) == "problem", name
    assert state(findings["memory of GPU 0"], "10 of 80 GiB", "another process uses it") == "note"


@pytest.fixture
def work(tmp_path: Path, tiny_release: Path) -> Path:
    """A student, a teacher with another vocabulary, data, and the directory of a run with one checkpoint."""
    write_tiny_checkpoint(tmp_path / "student", tiny_shape())
    write_tiny_checkpoint(tmp_path / "teacher", tiny_shape())
    write_tokens(tmp_path / "data", [np.arange(66)])
    run = tmp_path / "run"
    shutil.copytree(tiny_release.parent, run)
    (run / "release").rename(run / "iter_0000007")
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path


def given(work: Path) -> list[object]:
    names = {"--checkpoint": "student", "--teacher": "teacher", "--data": "data", "--save": "run"}
    return [word for flag, name in names.items() for word in (flag, work / name)]


def test_all_is_there_for_a_run(doctor: Doctor, work: Path) -> None:
    code, findings = doctor(*given(work))
    assert code == 0
    assert state(findings["checkpoint"], "4 layers") == state(findings["teacher"], "vocabulary 128") == "ok"
    assert state(findings["data data"], "66 tokens in 1 documents, largest id seen 65") == "ok"
    assert state(findings["resume"], "resume from iteration 7") == state(findings["free space"]) == "ok"
    assert state(findings["teacher's losses"], "not recorded", "--record") == "note"
    assert not list((work / "run").glob(".doctor*"))


def test_columns_stay_apart_whatever_their_length() -> None:
    line = Finding("data train_text_document", OK, "2,718,308 tokens").line()
    assert "data train_text_document  2,718,308 tokens" in line


def test_a_run_that_would_be_saved_in_a_new_directory(doctor: Doctor, work: Path) -> None:
    code, findings = doctor("--save", work / "new")
    assert code == 0 and state(findings["save"], f"{work / 'new'} would be created: {work} can be written") == "ok"
    _, findings = doctor("--save", work / "shraed/run", "--nodes", 2)
    found = f"{work / 'shraed'} does not exist, and would be created in {work}"
    assert state(findings["path of save"], found, "mount what is missing") == "note"


def test_sample_sets(doctor: Doctor, work: Path) -> None:
    for name, largest in (("set", 65), ("beyond", 1000)):
        (work / name).mkdir()
        mask = np.ones((3, 8))
        write_samples(work / name, np.full((3, 9), largest), mask, mask * 0, documents=True, about={})
    _, findings = doctor("--checkpoint", work / "student", "--data", 1, work / "set", 2, work / "beyond")
    assert state(findings["data set"], "3 samples of 8 tokens, largest id seen 65") == "ok"
    assert state(findings["data beyond"], "token id 1000 is beyond the vocabulary of") == "problem"
    (work / "set" / "tokens.npy").unlink()
    _, findings = doctor("--data", work / "set")
    assert state(findings["data set"], "tokens.npy: not readable as a .npy matrix") == "problem"


def test_data_that_is_not_there_is_one_problem(doctor: Doctor, work: Path) -> None:
    code, findings = doctor("--data", work / "none", work / "data.bin", "--nodes", 2)
    assert code == 1 and state(findings["data none"], "no such data", "pair") == "problem"
    assert ".npy" not in findings["data none"]["fix"]
    assert state(findings["data data.bin"], "is a file of a data set", f"its prefix, {work / 'data'}") == "problem"
    assert not [name for name in findings if name.endswith(" storage")]


def test_data_are_named_as_in_training(doctor: Doctor, work: Path) -> None:
    """With weights or without, by the same reader."""
    one = work / "data"
    for words in ((one, one), (0.3, one, 0.7, one)):
        code, findings = doctor("--data", *words)
        assert code == 0 and state(findings["data data"], "66 tokens") == "ok"
    for words, found in (((10, one, one), "do not alternate"), ((1, one, 0, one), "weight 0 is not positive")):
        code, findings = doctor("--data", *words)
        assert code == 1 and state(findings["data"], found) == "problem"
        assert not [name for name in findings if name.startswith("data ")]


def break_index(work: Path) -> None:
    (work / "data.idx").unlink()


def cut_data(work: Path) -> None:
    path = work / "data.bin"
    path.write_bytes(path.read_bytes()[:-4])


def large_ids(work: Path) -> None:
    write_tokens(work / "data", [np.arange(200, 266)])


def ignored_ids(work: Path) -> None:
    write_tokens(work / "data", [np.ones(30), np.full(10, -100)])


def overflowed_ids(work: Path) -> None:
    write_tokens(work / "data", [np.array([5, 65_535, 6])], "int16")


def lose_documents(work: Path) -> None:
    write_tokens(work / "data", [np.ones(5)] * 4)
    index = (work / "data.idx").read_bytes()
    (work / "data.idx").write_bytes(index[:26] + np.int64(3).tobytes() + index[34:-16])  # boundaries 0, 1, 2


def tear_tracker(work: Path) -> None:
    (work / "run/latest_checkpointed_iteration.txt").write_text("\0\0")


def cut_checkpoint(work: Path) -> None:
    path = max((work / "run/iter_0000007").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-100])


def other_vocabulary(work: Path) -> None:
    shutil.rmtree(work / "teacher")
    write_tiny_checkpoint(work / "teacher", tiny_shape(vocab_size=256))


def lose_a_shard(work: Path) -> None:
    max((work / "student").glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("damage", "name", "found", "fix"),
    [
        (break_index, "data data", "data.idx: its other half is missing", "megatron-slim preprocess"),
        (cut_data, "data data", "data.bin: truncated", "megatron-slim preprocess"),
        (large_ids, "data data", "token id 265 is beyond the vocabulary of 128", "own tokenizer"),
        (ignored_ids, "data data", "data.bin: token id -100 is below 0", "preprocess again"),
        (overflowed_ids, "data data", "data.bin: token id -1 is below 0", "preprocess again"),
        (lose_documents, "data data", "data.idx: its documents are sequences 0 to 2, there are 4", "add_index"),
        (tear_tracker, "resume", "latest_checkpointed_iteration.txt", "write 7 into"),
        (cut_checkpoint, "resume", "incomplete", "to start a new run"),
        (other_vocabulary, "vocabularies", "teacher 256, student 128", "prune the student from its teacher"),
        (lose_a_shard, "checkpoint", "safetensors", ""),
    ],
)
def test_what_stands_in_the_way_of_a_run(
    doctor: Doctor, work: Path, damage: Callable[[Path], None], name: str, found: str, fix: str
) -> None:
    damage(work)
    code, findings = doctor(*given(work))
    assert code == 1 and state(findings[name], found, fix) == "problem"
    others = {key for key, finding in findings.items() if finding["state"] == "problem"} - {name}
    assert not others


def test_an_empty_tracker_is_left_to_training(doctor: Doctor, work: Path) -> None:
    tracker = work / "run/latest_checkpointed_iteration.txt"
    tracker.write_text("")
    code, findings = doctor(*given(work))
    assert code == 0 and state(findings["resume"], "will resume from 7") == "note"
    assert tracker.read_text() == ""


def test_several_nodes_need_storage_that_all_see(doctor: Doctor, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, code in (("ext4", 1), ("lustre", 0)):
        monkeypatch.setattr(machine, "file_system", lambda path, kind=kind: (kind, "/data"))
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        found, findings = doctor(*given(work))
        storage = {name: finding for name, finding in findings.items() if name.endswith(" storage")}
        assert found == code and len(storage) == 4
        assert all(f"{kind} at /data" in finding["found"] for finding in storage.values())


def test_no_space_for_a_checkpoint(doctor: Doctor, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(real(path))(1 << 20, 0, 1 << 20))
    code, findings = doctor(*given(work))
    assert code == 1 and state(findings["free space"], "1.0 MiB are free", "make space") == "problem"
