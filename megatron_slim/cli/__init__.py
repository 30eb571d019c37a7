"""The ``megatron-slim`` command, and all that talks to a terminal.

`main` finds a command; every command is a module with ``main(argv, prog)`` that parses its arguments and calls the
library. What several share is in ``calibration_run``, ``pruning_run`` and ``search_arguments``; ``tool`` is how a
command runs and ends, ``terminal`` what a person sees meanwhile. A command imports at its top only what parsing needs,
so that ``--help`` answers at once.
"""
