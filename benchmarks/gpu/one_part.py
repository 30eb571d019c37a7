#!/usr/bin/env python3
"""Run one part of the acceptance kit in this process and write how it ended; run_all.py starts it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.parts import MISSING, NOT_RUN, PARTS, Missing, NotRun, Outcome, Setting


def outcome_of(name: str, setting: Setting) -> Outcome:
    """Run a part; its errors are raised as they are."""
    try:
        return Outcome.of(PARTS[name].run(setting))
    except Missing as missing:
        return Outcome(MISSING, f"{missing.what}: {missing.how}")
    except NotRun as reason:
        return Outcome(NOT_RUN, str(reason))


def main() -> None:
    """Run; a part that fails ends with a traceback and no file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--device-name", default="CPU")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--outcome", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.device, args.quick or args.device == "cpu", args.gpus, args.device_name, args.work)
    outcome = outcome_of(args.part, setting)
    args.outcome.write_text(json.dumps(asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main()
