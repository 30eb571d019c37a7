"""The published layout as files of holes, through the real tools, with what they write dug away behind them."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.directions import DIRECTIONS, HF, PRUNE, TORCH_DIST, Direction
from benchmarks.holes import HoleDigger
from benchmarks.models import (
    PUBLISHED,
    RECIPE,
    largest_layer_group,
    model_bytes,
    shape_of,
    write_model,
    write_recipe,
    write_statistics,
)
from benchmarks.processes import ROOT, python, run
from benchmarks.report import machine
from benchmarks.storage import bytes_of
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.architecture.table import count_parameters, hf_tensors
from megatron_slim.cli.terminal import say
from megatron_slim.errors import SlimError

SAMPLE_SECONDS = 0.1  # a run is timed and watched at once, and 48 layers are alike


class LayoutRun:
    """One run of the benchmark."""

    def __init__(self, args: argparse.Namespace, expected: Mapping[str, int] | None) -> None:
        """Set up.

        Args:
            args: of the script.
            expected: counts that the layout must have; None for another model than the published one.
        """
        self.args, self.expected = args, expected
        self.config = _config(args.layers, args.set)
        self.shape = shape_of(self.config)
        self.sources = {HF: args.dir / "source", TORCH_DIST: args.dir / "torch_dist"}
        self.plan = args.dir / "plan.json"

    def results(self) -> dict[str, Any]:
        """Run everything."""
        say("making the layout and a plan")
        write_model(self.sources[HF], self.config, sparse=True)
        counts = layout_counts(self.sources[HF])
        if self.expected is not None and counts != self.expected:
            raise SlimError(f"the layout has {counts}, the published one {dict(self.expected)}")
        self._make_plan()
        entries = {}
        for name in sorted(self.args.only, key=list(DIRECTIONS).index):
            say(name)
            entries[name] = self._direction(DIRECTIONS[name])
        nbytes = model_bytes(self.shape)
        return {
            "model": counts | {"bytes": nbytes, "largest_layer_group_bytes": largest_layer_group(self.shape)},
            "peak_memory_fraction": max(entry["peak_memory_fraction"] for entry in entries.values()),
            "peak_over_layer_group": max(entry["peak_over_layer_group"] for entry in entries.values()),
            "complete": all(entry["complete"] for entry in entries.values()),
            "verified": not self.args.no_verify,
            "directions": entries,
            "machine": machine(self.args.dir),
        }

    def _make_plan(self) -> None:
        stats, recipe = self.args.dir / "stats.safetensors", self.args.dir / "recipe.yaml"
        write_statistics(self.sources[HF], stats)
        if self.expected is None:
            write_recipe(self.config, recipe)
        else:
            shutil.copyfile(RECIPE, recipe)
        options = ("--load", self.sources[HF], "--stats", stats, "--recipe", recipe, "--save", self.plan)
        run(python(ROOT / "tools" / "plan_pruning.py", *options))

    def _direction(self, direction: Direction) -> dict[str, Any]:
        if direction.source == TORCH_DIST and not self.sources[TORCH_DIST].exists():
            self._run(DIRECTIONS["hf_to_torch_dist"], self.sources[TORCH_DIST])
        kept = direction == DIRECTIONS["hf_to_torch_dist"]
        save = self.sources[TORCH_DIST] if kept else self.args.dir / "out"
        found = self._run(direction, save)
        if not kept:
            shutil.rmtree(save)
        return found

    def _run(self, direction: Direction, save: Path) -> dict[str, Any]:
        """Run a tool, and look at what it has written."""
        digger, limit = HoleDigger(save.parent, save.name), self.args.max_disk_gb * 1e9

        def dig() -> None:
            if (disk := digger.dig()) > limit:
                raise SlimError(f"the result takes {disk / 1e9:.0f} GB", where=str(save), fix="--max-disk-gb")

        outcome = run(self._command(direction, save), sample_seconds=SAMPLE_SECONDS, meanwhile=dig)
        digger.dig(final=True)
        shape = shape_of_plan(self.plan) if direction.tool == PRUNE else self.shape
        tensors, parameters = (written_in_hf if direction.target == HF else written_in_torch_dist)(save)
        expected = set(hf_tensors(shape)) if direction.target == HF else set(torch_dist_tensors(shape))
        total = count_parameters(shape).total
        return {
            "seconds": outcome.seconds,
            "peak_anonymous_bytes": outcome.peak_anonymous,
            "peak_memory_fraction": outcome.peak_anonymous / model_bytes(self.shape),
            "peak_over_layer_group": outcome.peak_anonymous / largest_layer_group(self.shape),
            "bytes_read": outcome.read_bytes,
            "bytes_of_result": bytes_of(save),
            "tensors": len(tensors),
            "missing_tensors": len(expected - tensors),
            "extra_tensors": len(tensors - expected),
            "parameters": parameters,
            "complete": tensors == expected and parameters == total,
            "peak_disk_bytes": digger.peak_disk,
        }

    def _command(self, direction: Direction, save: Path) -> list[str]:
        tool = "prune_checkpoint" if direction.tool == PRUNE else "convert_checkpoint"
        more: list[object] = ["--plan", self.plan] if direction.tool == PRUNE else []
        more += ["--processes", self.args.processes] if self.args.processes else []
        more += ["--no-verify"] if self.args.no_verify else []
        load = ("--load", self.sources[direction.source], "--save", save, "--to", direction.target)
        return python(ROOT / "benchmarks" / "roomy.py", ROOT / "tools" / f"{tool}.py", *load, *more)


def _config(layers: int | None, changes: list[str]) -> dict[str, Any]:
    found = dict(PUBLISHED)
    if layers is not None:
        found["num_hidden_layers"] = layers
    for change in changes:
        key, _, value = change.partition("=")
        if key not in PUBLISHED or not value.isdecimal():
            raise SlimError(f"{change!r} is not KEY=N with a key of config.json", where="--set")
        found[key] = int(value)
    return found


def layout_counts(directory: Path) -> dict[str, int]:
    """Counts of a checkpoint by its files alone; ``mtp_tensors`` are those in the last shard."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    tensors, parameters = written_in_hf(directory)
    files = sorted(set(weight_map.values()))
    mtp = {name for name in tensors if name.startswith("mtp.")}
    if tensors != set(weight_map) or mtp != {name for name, file in weight_map.items() if file == files[-1]}:
        raise SlimError("the index and the shards do not agree", where=str(directory))
    return {"shards": len(files), "tensors": len(tensors), "mtp_tensors": len(mtp), "parameters": parameters}


def written_in_hf(directory: Path) -> tuple[set[str], int]:
    """Names of all tensors in the safetensors files, and the number of their elements, as safetensors reads them."""
    from safetensors import safe_open

    names, total = list[str](), 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as content:
            for name in content.keys():  # noqa: SIM118 (not a dict)
                names.append(name)
                total += math.prod(content.get_slice(name).get_shape())
    if len(names) != len(set(names)):
        raise SlimError("a tensor is there twice", where=str(directory))
    return set(names), total


def written_in_torch_dist(directory: Path) -> tuple[set[str], int]:
    """The same of a torch_dist checkpoint, as torch reads its metadata: elements are those of the stored pieces."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(directory / "release").read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return set(tensors), sum(math.prod(chunk.sizes) for entry in tensors.values() for chunk in entry.chunks)


def torch_dist_tensors(shape: ModelShape) -> list[str]:
    """Names under which a torch_dist checkpoint holds a model."""
    from megatron_slim.architecture.table import weights
    from megatron_slim.checkpoint.layout import stored_shapes

    return [key for weight in weights(shape) for key, _ in stored_shapes(weight, shape)]


def shape_of_plan(plan_file: Path) -> ModelShape:
    """The model that a plan gives."""
    from megatron_slim.pruning.plan_reader import load_plan

    return load_plan(plan_file).target_shape
