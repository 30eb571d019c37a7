#!/usr/bin/env python3
"""Train or distil with Megatron's loop; one process per device, started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from megatron_slim import device

    device.install()
    from megatron_slim.training.pretrain import run_from_command_line

    run_from_command_line()
