"""What the report and the card say of a teacher that was recorded (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_slim.compression.machine import size_text
from megatron_slim.compression.recordings import cache_path
from megatron_slim.compression.steps import RECORD
from megatron_slim.errors import DataError
from megatron_slim.files import read_json
from megatron_slim.page import Section
from megatron_slim.sample_set import SAMPLES
from megatron_slim.teacher_cache.names import CACHE, is_finished
from megatron_slim.training.run_figures import amount

HEADING = "Recorded teacher"
_RESULT = {"states": str, "heads": int, "samples": int, "tokens": int, "bytes": int}
_FIGURES = ("teacher_loss", "kl_of_rounding", "largest_kl_of_rounding")


def recorded(train: Mapping[str, Any], save: Path) -> dict[str, Any] | None:
    """What the cache that training reads says of itself; None where there is none, or it is not finished.

    Of one that was recorded and removed since, what the command that recorded it has printed.

    Args:
        train: the section of the recipe.
        save: directory of the run.

    Raises:
        DataError: it does not describe a cache.
    """
    described: Callable[[], dict[str, Any] | None]
    path, result = cache_path(train, save), save / "results" / f"teacher-{RECORD}.json"
    if path is not None and is_finished(path):
        where, described = path / CACHE, partial(_of_cache, path)
    elif "record" in train and result.is_file():
        where, described = result, partial(_of_result, result)
    else:
        return None
    try:
        return described()
    except (KeyError, TypeError, ValueError) as error:
        fix = "record the teacher again"
        raise DataError(f"not a description of a cache ({error!r})", where=str(where), fix=fix) from None


def _of_cache(path: Path) -> dict[str, Any]:
    cache, samples = read_json(path / CACHE), read_json(path / SAMPLES)
    return {
        "states": str(cache["kind"]),
        "heads": int(cache["heads"]),
        "samples": int(samples["samples"]),
        "tokens": int(samples["samples"]) * int(samples["seq_length"]),
        "bytes": sum(file.stat().st_size for file in path.glob("states-*.bin")),
        **_figures(cache["figures"]),
    }


def _of_result(file: Path) -> dict[str, Any] | None:
    """None where it was lost, and is empty."""
    found = read_json(file)
    return {**{key: kind(found[key]) for key, kind in _RESULT.items()}, **_figures(found)} if found else None


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(found[name]) for name in _FIGURES}


def recorded_section(found: Mapping[str, Any]) -> Section:
    """What was recorded, and what rounding costs."""
    shown = {
        "hidden states": found["states"],
        "heads": str(found["heads"]),
        "tokens": f"{found['tokens']:,} ({found['samples']:,} samples)",
        "disk": size_text(found["bytes"]),
        "teacher's cross entropy": f"{found['teacher_loss']:.4f}",
        "KL of rounding, mean": f"{found['kl_of_rounding']:.2g}",
        "KL of rounding, largest": f"{found['largest_kl_of_rounding']:.2g}",
    }
    note = "Training reads the teacher's hidden states from disk. Nats per token are of a part of the tokens."
    return Section(HEADING, ("", "cache"), tuple(shown.items()), note, text=True)


def sentence(found: Mapping[str, Any]) -> str:
    """The same in short, for the card."""
    return (
        f"hidden states recorded once, of {amount(found['tokens'])} tokens in {found['states']}; rounding them costs a "
        f"KL of {found['kl_of_rounding']:.2g} nats per token"
    )
