"""Where the optimizer of a run has its states, and in how many bytes (no torch).

Megatron's own options of Adam: states of fewer bits (``--use-precision-aware-optimizer``), and states on the host
(``--optimizer-cpu-offload``). Both need Transformer Engine and were not run here: their bytes are counted from
Megatron-Core 0.19.2's source.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_slim.optimizers import ADAM, MAIN_COPY, OPTIMIZERS

FULL, HALF, HOST = "full", "bf16", "host"


@dataclass(frozen=True)
class Storage:
    """One way.

    Attributes:
        name: as ``--optimizer-states``.
        about: for people.
        gradient: bytes of a trained parameter's gradient.
        main: of its main copy on the GPU, in a run of 16 bits.
        moments: of Adam's two on the GPU; None: as the optimizer has them.
        host: bytes on the host.
        host_traffic: of a parameter, moved between GPU and host in a step.
        flags: of Megatron's.
    """

    name: str
    about: str
    gradient: int = 4
    main: int = MAIN_COPY
    moments: int | None = None
    host: int = 0
    host_traffic: int = 0
    flags: tuple[str, ...] = ()

    def state_bytes(self, optimizer: str, width: int) -> int:
        """Bytes of a trained parameter's state on the GPU, main copy included.

        Args:
            optimizer: its name.
            width: bytes of a weight.
        """
        moments = OPTIMIZERS[optimizer].state_bytes if self.moments is None else self.moments
        return moments + (self.main if width < MAIN_COPY else 0)

    def violations(self, optimizer: str, precision: str) -> list[str]:
        """What it does not go with, in sentences."""
        if self.name == FULL:
            return []
        found = []
        if optimizer != ADAM:
            found.append(f"--optimizer-states {self.name} is of {ADAM}'s states, not of {optimizer}'s")
        if precision != "bf16":
            found.append(f"--optimizer-states {self.name} needs bf16, not {precision}")
        return found


_PRECISE = "--use-precision-aware-optimizer"
STORAGES = {
    each.name: each
    for each in (
        Storage(FULL, "fp32, on the GPU"),
        # Of the main copy, the 16 bits that the weight has not; the weight is its other half.
        Storage(
            HALF,
            "moments and gradients in bf16, on the GPU",
            gradient=2,
            main=2,
            moments=4,
            flags=(
                _PRECISE,
                *("--main-grads-dtype", "bf16"),
                *("--exp-avg-dtype", "bf16"),
                *("--exp-avg-sq-dtype", "bf16"),
            ),
        ),
        # On the host: main copy, moments and a gradient, in fp32. Gradients go there, weights come back.
        Storage(
            HOST,
            "fp32, on the host; gradients in bf16",
            gradient=2,
            main=0,
            moments=0,
            host=16,
            host_traffic=2 + 2,
            flags=(_PRECISE, *("--main-grads-dtype", "bf16"), "--optimizer-cpu-offload"),
        ),
    )
}
