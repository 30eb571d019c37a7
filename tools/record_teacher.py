#!/usr/bin/env python3
"""``megatron-slim record``, from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_slim.cli.record import main

if __name__ == "__main__":
    main(sys.argv[1:], Path(sys.argv[0]).name)
