"""Train or distil with Megatron's loop; one process per device, started by torchrun."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_slim import device

    device.install()
    from megatron_slim.training.pretrain import run_from_command_line

    run_from_command_line()
