"""Signals of a test's children: as in a terminal, however the tests themselves were started."""

from __future__ import annotations

import signal


def default_signals() -> None:
    """Undo what a child inherits from ``nohup`` or a shell's ``&``: SIGHUP or SIGINT ignored. Call it in the child."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
