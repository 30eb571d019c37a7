"""Peak rates of GPUs by the names that drivers give them (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PeakRate:
    """What a GPU's tensor cores do at most, dense: half of what data sheets print "with sparsity".

    Attributes:
        words: that the driver's name of the device contains.
        bf16: operations per second, fp16 alike.
        fp8: likewise; None where there is no FP8.
        source: of both.
    """

    words: frozenset[str]
    bf16: float
    fp8: float | None
    source: str


def _row(words: str, bf16: float, fp8: float | None, source: str) -> PeakRate:
    return PeakRate(frozenset(words.split()), bf16 * 1e12, None if fp8 is None else fp8 * 1e12, source)


# The variants of a GPU before the GPU: the first row whose words all occur counts. SXM parts have none of these words.
PEAK_RATES = (
    _row("A100", 312.0, None, "NVIDIA A100 data sheet"),
    _row("H100 PCIE", 756.5, 1513.0, "NVIDIA H100 data sheet, November 2022"),
    _row("H100 NVL", 835.5, 1670.5, "NVIDIA H100 data sheet"),
    _row("H100", 989.4, 1978.9, "NVIDIA H100 data sheet"),
    _row("H200 NVL", 835.5, 1670.5, "NVIDIA H200 data sheet"),
    _row("H200", 989.4, 1978.9, "NVIDIA H200 data sheet"),
    _row("B200", 2250.0, 4500.0, "NVIDIA HGX B200 data sheet"),
)


def peak_flops(device_name: str, *, fp8: bool = False) -> float | None:
    """Dense peak of a device in operations per second; None where the table does not know it.

    A slice of a GPU (MIG) has the GPU's name and only part of its rate, so it counts as unknown.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe", fp8=True), peak_flops("NVIDIA GH200 480GB")
    (989400000000000.0, 1513000000000000.0, None)
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    for row in PEAK_RATES:
        if row.words <= words:
            return row.fp8 if fp8 else row.bf16
    return None
