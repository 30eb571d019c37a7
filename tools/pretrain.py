#!/usr/bin/env python3
"""Train or distil with Megatron's loop; one process per device, started by torchrun."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli import die_with_parent

# Here, where the processes that Megatron starts to write checkpoints come past too: they import this file.
if "TORCHELASTIC_RUN_ID" in os.environ:
    die_with_parent()

if __name__ == "__main__":
    from megatron_slim.training.slim_arguments import help_parser

    if {"-h", "--help"} & set(sys.argv[1:]):
        help_parser().print_help()
        sys.exit()

    from megatron_slim import device

    # What Megatron and torch announce at import is tools/doctor.py's to say; what they warn of later stays.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        device.install()
        from megatron_slim.training.pretrain import run_from_command_line

    run_from_command_line()
