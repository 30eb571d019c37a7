"""What the report and the card say of the export in FP8 (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_slim.compression.report_tables import NOT_MEASURED, count
from megatron_slim.files import read_json
from megatron_slim.page import Section

HEADING = "Quantization"


def quantization_of(model: Path) -> Mapping[str, Any] | None:
    """``quantization_config`` of a model's config.json; None where it has none."""
    from megatron_slim.checkpoint.huggingface_files import CONFIG

    config = read_json(model / CONFIG) if (model / CONFIG).is_file() else {}
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def quantization_section(measured: Mapping[str, Any]) -> Section:
    """Size of the export in FP8, and errors of its weights.

    Args:
        measured: ``quantization`` of `report_facts.Gathered.facts`; empty where the step has left no result.
    """
    worst = measured.get("worst", {})
    shown = {
        "bytes": count(measured["bytes"]) if "bytes" in measured else NOT_MEASURED,
        "weights in FP8": f"{measured['tensors']:,}" if "tensors" in measured else NOT_MEASURED,
        "of these with smaller blocks at the edges": str(measured.get("partial_blocks", NOT_MEASURED)),
        "largest relative RMS error": f"{100 * worst['relative_rms']:.2f}%" if worst else NOT_MEASURED,
        "tensor with this error": worst.get("tensor", NOT_MEASURED),
    }
    note = "Errors compare the dequantized weights in bf16 with those of the export."
    return Section(HEADING, ("", "FP8"), tuple(shown.items()), note, text=True)


def description(config: Mapping[str, Any]) -> str:
    """The format in a sentence, from ``quantization_config``."""
    rows, columns = config["weight_block_size"]
    return (
        f"Weights of linear layers are in FP8 ({config['fmt'].upper()}) with one fp32 scale for {rows} x {columns} of "
        f"them; activations are rounded when the model runs ({config['activation_scheme']}). All else is in 16 or 32 "
        "bits: embedding, output layer, norms, routers, convolutions."
    )


def loading(config: Mapping[str, Any]) -> Iterator[str]:
    """What is particular about loading it."""
    rows, columns = config["weight_block_size"]
    yield "config.json names the quantization, so neither needs a flag:"
    yield ""
    yield "- transformers needs `accelerate`. Without a GPU of compute capability 8.9 or more it dequantizes to bf16."
    yield f"- With tensor parallelism, each rank's part of a layer must be whole blocks of {rows} x {columns} weights."
    yield "- megatron_slim reads it with `--dequantize-fp8`."
    yield ""
