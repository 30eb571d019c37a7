"""Without CUDA: what `torch.cuda` answers about its device, generator, memory, streams and events."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from megatron_slim.aliases import Function

_CPU = torch.device("cpu")


def answer() -> None:
    """Have `torch.cuda` speak of the CPU, for the whole process."""
    _redirect_generator()
    _replace_device_queries()
    _replace_streams()


def _redirect_generator() -> None:
    """Megatron's generator states are those of the CPU generator."""

    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state  # type: ignore[attr-defined]
        module.manual_seed = manual_seed  # type: ignore[attr-defined]


def _resident_bytes(*_: object, **__: object) -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes(*_: object, **__: object) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _memory_stats(*_: object, **__: object) -> dict[str, int]:
    now, peak = _resident_bytes(), _peak_resident_bytes()
    return {
        "reserved_bytes.all.current": now,
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,
    }


def _replace_device_queries() -> None:
    """Answer what Megatron asks of its device; memory is this process's resident set."""
    # Compute capability 10: Megatron then asks for no CUDA_DEVICE_MAX_CONNECTIONS.
    properties = SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=os.cpu_count() or 1)
    answers: dict[str, Function] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": _memory_stats,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    answers |= dict.fromkeys(("memory_allocated", "memory_reserved", "device_memory_used"), _resident_bytes)
    answers |= dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), _peak_resident_bytes)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: None)


class _Stream:
    """A CUDA stream on a device that does everything in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        pass


class _Event:
    """A CUDA event: the time at which it was recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.seconds - self.seconds) * 1000.0


@contextlib.contextmanager
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _replace_streams() -> None:
    current = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[misc, assignment]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: current  # type: ignore[assignment, return-value]
    torch.cuda.stream, torch.cuda.set_stream = _stream_context, lambda stream: None  # type: ignore[assignment]
