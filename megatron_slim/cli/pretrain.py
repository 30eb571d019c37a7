"""Train or distil with Megatron's loop; one process per device, started by torchrun.

Arguments are Megatron's and ours; with ``--`` among them, those in front of it are variables, as `megatron-slim
distill` takes them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from megatron_slim.processes import die_with_parent

# At import, because the processes that Megatron starts to write checkpoints import this module too.
if "TORCHELASTIC_RUN_ID" in os.environ:
    die_with_parent()


def main(argv: Sequence[str], prog: str) -> None:
    """Run one process of a training run."""
    if {"-h", "--help"} & set(argv):
        from megatron_slim.training.slim_arguments import help_parser

        help_parser(prog).print_help()
        return
    from megatron_slim.cli.terminal import messages_shown, progress_shown
    from megatron_slim.reporting import use_progress

    # What Megatron and torch announce at import is the doctor's to report; what they warn of later stays.
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        from megatron_slim.training.pretrain import run_ranks

    with messages_shown("stdout"), use_progress(progress_shown()):
        run_ranks(argv)


if __name__ == "__main__":
    main(sys.argv[1:], "megatron-slim pretrain")
