#!/usr/bin/env python3
"""One rank of a training run of which the saving and loading are timed: `switch_train.py FILE ARGUMENTS...`.

FILE gets the seconds of Megatron's saving, of its loading, and of loading the optimizer's state that was carried.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run_log import Stopwatch


def main(file: Path, argv: list[str]) -> None:
    """Train."""
    import megatron_slim.mcore

    import megatron.training.training as training

    from megatron_slim.training import pretrain
    from megatron_slim.training.carried import CarriedOptimizer

    stopwatch = Stopwatch()
    stopwatch.wrap(training, "save_checkpoint")
    stopwatch.wrap(training, "load_checkpoint")
    stopwatch.wrap(CarriedOptimizer, "load")
    try:
        pretrain.main(argv)
    finally:
        file.write_text(json.dumps(stopwatch.seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
