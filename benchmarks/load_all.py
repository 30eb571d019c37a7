#!/usr/bin/env python3
"""The other way to convert: load the whole model, make all Megatron parameters, save them with Megatron-Core.

What converters that hold the model do at best, in one process and without a model being built: the files are mapped,
every parameter is assembled, and `megatron.core.dist_checkpointing.save` writes it. The last line of standard output
is a JSON object with the seconds from the first read to the end of the save, imports left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import read_config, shape_of
from megatron_slim.architecture.shape import ModelShape


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="new directory of the weights")
    parser.add_argument("--threads", type=int, default=1, help="files that Megatron's writer writes at the same time")
    return parser.parse_args()


def sharded_tensors(shape: ModelShape, tensors: dict[str, Any]) -> Iterator[Any]:
    """Every parameter as Megatron's modules present it: an expert at its offset, gate and up apart."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_slim.architecture.table import weights
    from megatron_slim.checkpoint.layout import runs_of_sources, split_keys, to_megatron

    for weight in weights(shape):
        if not weight.stacked:
            whole = to_megatron(weight, shape, tensors.__getitem__)
            for key, rows in split_keys(weight, shape):
                yield ShardedTensor.from_rank_offsets(key, whole[rows])
            continue
        pieces = runs_of_sources(weight, shape)
        assert pieces is not None
        for expert in range(shape.num_moe_experts):
            one = to_megatron(weight, shape, tensors.__getitem__, expert=expert)
            for number, rows in enumerate(pieces):
                offsets = ((0, expert, shape.num_moe_experts), (1, number, len(pieces)))
                yield ShardedTensor.from_rank_offsets(weight.key, one[rows], *offsets, prepend_axis_num=1)


def load_and_save(load: Path, save: Path, threads: int) -> dict[str, float]:
    """Do it; returns the seconds until all parameters are in memory, and until they are on the disk."""
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from safetensors.torch import load_file

    started = time.monotonic()
    tensors: dict[str, Any] = {}
    for file in sorted(load.glob("*.safetensors")):
        tensors.update(load_file(file))
    parameters = list(sharded_tensors(shape_of(read_config(load)), tensors))
    loaded = time.monotonic()
    save.mkdir()
    state = {str(number): parameter for number, parameter in enumerate(parameters)}
    dist_checkpointing.save(state, str(save), TorchDistSaveShardedStrategy(thread_count=threads))
    return {"load_seconds": loaded - started, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    arguments = parse_args()
    results = load_and_save(arguments.load, arguments.save, arguments.threads)
    print(json.dumps(results), flush=True)
