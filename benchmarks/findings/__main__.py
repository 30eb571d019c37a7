"""``python -m benchmarks.findings``: run the cells of the findings, and report; ``make findings``."""

from __future__ import annotations

from benchmarks.findings.main import arguments, run
from megatron_slim.cli.tool import run_tool

if __name__ == "__main__":
    given = arguments()
    run_tool(lambda: run(given), as_json=given.json)
