"""Devices, communication, memory, limits and storage of this machine."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_slim.doctor.findings import GIB, NOTE, OK, PROBLEM, Finding, good_or, size
from megatron_slim.doctor.packages import kernels

LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "ramfs", "squashfs", "f2fs")


def machine() -> Iterator[Finding]:
    """All of it; torch is there."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    yield from _gpus() if cuda else _no_gpu(psutil.cpu_count() or 1)
    layer = "not used: CUDA is there" if cuda else "in use: Megatron-Core runs on the CPU, as if on CUDA"
    yield Finding("cpu layer", OK, layer)
    yield _backend(cuda)
    yield from kernels(cuda)
    memory = psutil.virtual_memory()
    yield Finding("memory", OK, f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free")
    if cuda:
        yield from _of_gpu_machines()


def _no_gpu(cores: int) -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding(
            "device", NOTE, f"CPU, {cores} cores", "enough for the demo, for converting, pruning and planning"
        )
        return
    fix = (
        "there is a driver: check CUDA_VISIBLE_DEVICES, that torch is a CUDA build, and (in a container) --gpus or --nv"
    )
    yield Finding("device", PROBLEM, f"CPU, {cores} cores: torch sees no GPU", fix)


def _gpus() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    fix = "a run is as slow as its slowest GPU: leave the others out (CUDA_VISIBLE_DEVICES)"
    yield good_or(NOTE, "device", len(names) == 1, f"{count} x CUDA {torch.version.cuda}: {', '.join(names)}", fix)
    capability = min(torch.cuda.get_device_capability(index) for index in range(count))
    found = f"{capability[0]}.{capability[1]}"
    if capability < (8, 0):
        yield Finding("compute capability", PROBLEM, found, "bf16 needs 8.0 (A100) or more: train with PRECISION=fp32")
    else:
        yield good_or(NOTE, "compute capability", capability >= (8, 9), found, "FP8 needs 8.9 or more; bf16 works")
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < 0.9 * total:
            found = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"
            yield Finding(f"memory of GPU {index}", NOTE, found, "another process uses it: see nvidia-smi")
    if count > 1:
        apart = [i for i in range(1, count) if not torch.cuda.can_device_access_peer(0, i)]
        fix = "expert and tensor parallelism will be slow; see nvidia-smi topo -m"
        found = f"GPU 0 reaches {'all others' if not apart else f'not {apart}'} directly"
        yield good_or(NOTE, "peer access", not apart, found, fix)
    yield from _errors_of_gpus()


def _errors_of_gpus() -> Iterator[Finding]:
    """Uncorrected memory errors, which come back."""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        yield Finding("nvidia-smi", NOTE, "does not answer", "states and memory errors of GPUs were not looked at")
        return
    rows = [line.split(", ") for line in text.splitlines() if ", " in line]
    bad = [index for index, errors in rows if errors.isdecimal() and int(errors)]
    fix = "have the node drained: it will end runs, or spoil them"
    yield good_or(PROBLEM, "memory errors", not bad, f"uncorrected on GPU {', '.join(bad)}" if bad else "none", fix)


def _backend(cuda: bool) -> Finding:
    import torch

    name = "nccl" if cuda else "gloo"
    distributed = torch.distributed
    there = distributed.is_available() and (
        distributed.is_nccl_available() if cuda else distributed.is_gloo_available()
    )
    found = "available" if there else "not in this torch"
    if cuda and there:
        found = ".".join(map(str, torch.cuda.nccl.version()))
    return good_or(PROBLEM, name, there, found, f"install a torch with {name}")


def _of_gpu_machines() -> Iterator[Finding]:
    """What NCCL and loader processes need of the operating system, or of the container."""
    shm = shutil.disk_usage("/dev/shm").total
    fix = "docker run --ipc=host, or --shm-size 16g"
    yield good_or(PROBLEM, "/dev/shm", shm >= GIB, size(shm), fix)
    fabric = Path("/sys/class/infiniband")
    ports = sorted(port.name for port in fabric.iterdir()) if fabric.is_dir() else []
    fix = "fine on one node; several talk over TCP: load the driver, or let the container see /dev/infiniband"
    yield good_or(NOTE, "infiniband", bool(ports), ", ".join(ports) or "none", fix)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if ports:
        fix = "NCCL registers memory: docker run --ulimit memlock=-1, or ask for it in Slurm's limits"
        unlimited = locked == resource.RLIM_INFINITY
        found = "unlimited" if unlimited else size(locked)
        yield good_or(PROBLEM, "ulimit -l", unlimited, found, fix)
    if (queues := os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")) is not None:
        yield Finding("CUDA_DEVICE_MAX_CONNECTIONS", NOTE, queues, "pretrain_distill.sh sets it where needed: unset it")


def file_system(path: Path) -> tuple[str, str]:
    """Type of the file system that a path is on, and where that is mounted.

    >>> file_system(Path("/proc/self"))
    ('proc', '/proc')
    """
    best = ("unknown", "")
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(point) and len(point) >= len(best[1]):
            best = (after.split()[0], point)
    return best


def storage(name: str, path: Path, *, nodes: int) -> Finding:
    """Whether other nodes can see a path, as far as the type of its file system shows."""
    kind, point = file_system(path)
    found = f"{kind} at {point}"
    if kind in LOCAL and nodes > 1:
        return Finding(f"{name} storage", PROBLEM, found, f"a disk of this machine; {nodes} nodes need a shared one")
    note = "of this machine; on several nodes it must be shared" if kind in LOCAL else "not a local disk"
    return Finding(f"{name} storage", OK, f"{found}, {note}")
