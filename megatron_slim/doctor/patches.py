"""What is changed in Megatron, and whether it is known to be needed in the version that is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from megatron_slim.doctor.findings import NOTE, Finding, good_or

NAME = "changes of megatron"
GUIDE = "docs/guides/upgrade_megatron.md says how to find out"


def patches(every: bool) -> Iterator[Finding]:
    """One line, or one more for each; torch is there, Megatron is not imported.

    Args:
        every: list them.
    """
    from megatron_slim.compat.patch import TESTED
    from megatron_slim.compat.table import PATCHES

    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:  # which is another finding
        return
    needed = version == TESTED
    more = "" if every else "; --patches lists them"
    yield good_or(NOTE, NAME, needed, f"{len(PATCHES)}, made for megatron-core {TESTED}{more}", GUIDE)
    if not every:
        return
    for patch in PATCHES:
        found = f"{patch.kind}, {_made(patch.kind)}: {', '.join(patch.targets)}. {patch.why} ({patch.upstream})"
        yield good_or(NOTE, patch.name, needed, found, GUIDE)


def _made(kind: str) -> str:
    """Where changes of a kind are made, as seen from this machine."""
    import torch

    from megatron_slim.compat.patch import CPU, LIBRARY, SPEED

    if torch.cuda.is_available():
        return {CPU: "not made with CUDA", SPEED: "not made with CUDA", LIBRARY: "made if missing"}.get(kind, "made")
    return "made"
