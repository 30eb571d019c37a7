"""From samples to the numbers that docs/benchmarks.md explains, as JSON and as a table."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.directions import DIRECTIONS, LOAD_ALL, Measured
from benchmarks.models import largest_layer_group, model_bytes
from benchmarks.processes import Run
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import hf_tensors

GB = 1e9


def summarise(measured: Measured, shape: ModelShape, args: argparse.Namespace) -> dict[str, Any]:
    """All results; the headline numbers are of verified runs, imports left out on both sides of every ratio."""
    nbytes = model_bytes(shape)
    directions = {name: _direction(name, measured, nbytes) for name in args.only}
    verified = [entry["verified"] for entry in directions.values()]
    results = {
        "peak_memory_fraction": max(entry["peak_memory_fraction"] for entry in directions.values()),
        "peak_memory_fraction_above_start_up": max(
            entry["peak_memory_fraction_above_start_up"] for entry in directions.values()
        ),
        "wall_over_raw_io": max(entry["over_raw_io"] for entry in verified),
        "wall_over_raw_io_of_rows": max(entry["over_raw_io_of_rows"] for entry in verified),
        "wall_over_raw_io_with_imports": max(entry["over_raw_io_with_imports"] for entry in verified),
        **_load_all(measured, directions, nbytes),
        "model": {
            "bytes": nbytes,
            "tensors": len(hf_tensors(shape)),
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_moe_experts": shape.num_moe_experts,
            "largest_layer_group_bytes": largest_layer_group(shape),
        },
        "directions": directions,
        "start_up": {
            tool: {
                "seconds": _median(each.seconds for each in samples),
                "anonymous_bytes": max(each.anonymous for each in samples),
            }
            for tool, samples in measured.start_ups.items()
        },
        "source_in_page_cache": {"least": min(measured.resident), "most": max(measured.resident)},
        "repeats": args.repeats,
        "machine": machine(args.dir),
    }
    return results


def _direction(name: str, measured: Measured, nbytes: int) -> dict[str, Any]:
    needed = measured.needed[name]
    read, rows = _fastest(measured.reads, needed.kept), _fastest(measured.reads, needed.rows)
    write = _fastest(measured.writes, needed.written)
    raw, raw_rows = (max(each["seconds"], write["seconds"]) for each in (read, rows))
    both = rows["seconds"] + write["seconds"]
    starts = measured.start_ups[DIRECTIONS[name].tool]
    start = _median(each.seconds for each in starts)
    peak = measured.sampled[name].peak_anonymous
    return {
        "bytes_that_must_be_read": needed.kept,
        "bytes_of_their_rows": needed.rows,
        "bytes_of_result": needed.written,
        "raw_read": read,
        "raw_read_of_rows": rows,
        "raw_write": write,
        "raw_io_seconds": raw,
        "raw_io_of_rows_seconds": raw_rows,
        "rows_then_write_seconds": both,
        "peak_anonymous_bytes": peak,
        "peak_memory_fraction": peak / nbytes,
        "peak_memory_fraction_above_start_up": (peak - min(each.anonymous for each in starts)) / nbytes,
        "verified": _runs(measured.runs[name, True], raw, raw_rows, both, start),
        "unverified": _runs(measured.runs[name, False], raw, raw_rows, both, start),
    }


def _runs(samples: list[Run], raw: float, raw_rows: float, both: float, start: float) -> dict[str, Any]:
    seconds = _median(each.seconds for each in samples)
    return {
        "seconds": seconds - start,
        "seconds_with_imports": seconds,
        "samples_with_imports": [each.seconds for each in samples],
        "over_raw_io": (seconds - start) / raw,
        "over_raw_io_of_rows": (seconds - start) / raw_rows,
        "over_rows_then_write": (seconds - start) / both,
        "over_raw_io_with_imports": seconds / raw,
        "bytes_read": samples[0].read_bytes,
    }


def _fastest(samples: dict[tuple[int, int], list[float]], nbytes: int) -> dict[str, Any]:
    """The number of threads with the best median: the stricter yardstick."""
    medians = {threads: _median(found) for (size, threads), found in samples.items() if size == nbytes}
    threads = min(medians, key=medians.__getitem__)
    return {"seconds": medians[threads], "threads": threads, "medians": {str(k): v for k, v in medians.items()}}


def _load_all(measured: Measured, directions: dict[str, Any], nbytes: int) -> dict[str, Any]:
    """The way that holds the model, and how much faster the same conversion is."""
    if not measured.load_all_seconds:
        return {}
    seconds = _median(measured.load_all_seconds)
    whole = _median(each.seconds for each in measured.runs[LOAD_ALL, False])
    peak = measured.sampled[LOAD_ALL].peak_anonymous
    found: dict[str, Any] = {
        "load_all": {
            "seconds": seconds,
            "samples": measured.load_all_seconds,
            "seconds_with_imports": whole,
            "peak_anonymous_bytes": peak,
            "peak_memory_fraction": peak / nbytes,
        }
    }
    if ours := directions.get("hf_to_torch_dist"):
        found["speedup_over_load_all"] = seconds / ours["verified"]["seconds"]
        found["speedup_over_load_all_with_imports"] = whole / ours["verified"]["seconds_with_imports"]
        found["speedup_over_load_all_unverified"] = seconds / ours["unverified"]["seconds"]
    return found


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def machine(directory: Path) -> dict[str, Any]:
    """What was measured on, and when."""
    mounts = [
        mount for mount in psutil.disk_partitions(all=True) if directory.resolve().is_relative_to(mount.mountpoint)
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "file_system": max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def print_table(results: dict[str, Any]) -> None:
    """For a person: a line per direction, then the headline."""
    from rich.console import Console
    from rich.table import Table

    columns = "direction|raw I/O s|of rows s|verified s|/ raw|/ of rows|--no-verify s|/ raw|peak MB|of model".split("|")
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in results["directions"].items():
        verified, quick = entry["verified"], entry["unverified"]
        table.add_row(
            name,
            f"{entry['raw_io_seconds']:.2f}",
            f"{entry['raw_io_of_rows_seconds']:.2f}",
            f"{verified['seconds']:.2f}",
            f"{verified['over_raw_io']:.2f}",
            f"{verified['over_raw_io_of_rows']:.2f}",
            f"{quick['seconds']:.2f}",
            f"{quick['over_raw_io']:.2f}",
            f"{entry['peak_anonymous_bytes'] / 1e6:.0f}",
            f"{entry['peak_memory_fraction']:.1%}",
        )
    if other := results.get(LOAD_ALL):
        peak = (f"{other['peak_anonymous_bytes'] / 1e6:.0f}", f"{other['peak_memory_fraction']:.1%}")
        table.add_row("load all, then save", "", "", "", "", "", f"{other['seconds']:.2f}", "", *peak)
    console = Console()
    console.width = max(console.width, 120)  # whole even where that is not a terminal
    console.print(table)
    for tool, entry in results["start_up"].items():
        print(
            f"imports of {tool}: {entry['seconds']:.2f} s, {entry['anonymous_bytes'] / 1e6:.0f} MB; left out of seconds"
        )
    for key in ("peak_memory_fraction", "wall_over_raw_io", "wall_over_raw_io_of_rows", "speedup_over_load_all"):
        if key in results:
            also = results.get(f"{key}_with_imports")
            print(f"{key}: {results[key]:.3g}" + (f" ({also:.3g} with imports)" if also is not None else ""))


def print_layout_table(results: dict[str, Any]) -> None:
    """For a person: the run over the published layout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("direction", "seconds", "peak MB", "of model", "of a layer", "GB read", "GB written", "tensors", "")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, entry in results["directions"].items():
        table.add_row(
            name,
            f"{entry['seconds']:.1f}",
            f"{entry['peak_anonymous_bytes'] / 1e6:.0f}",
            f"{entry['peak_memory_fraction']:.2%}",
            f"{entry['peak_over_layer_group']:.2f}",
            f"{entry['bytes_read'] / GB:.1f}",
            f"{entry['bytes_of_result'] / GB:.1f}",
            f"{entry['tensors']:,}",
            "complete" if entry["complete"] else "INCOMPLETE",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
