"""What ``calibrate`` and ``prune`` share: arguments and data of calibration, and the pass itself."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from megatron_slim.aliases import JsonObject, ReadOptions
from megatron_slim.architecture.parallelism import Layout
from megatron_slim.command_line import not_negative, positive
from megatron_slim.errors import SlimError
from megatron_slim.files import refuse_existing
from megatron_slim.processes import leaving_together

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_slim.checkpoint.convert import Checkpoint
    from megatron_slim.pruning.statistics import Statistics
    from megatron_slim.streaming.model_input import Samples
    from megatron_slim.streaming.work_dir import WorkDir


@dataclass(frozen=True)
class CalibrationOptions:
    """Data for calibration and how to read it; see `model_input.read_calibration_samples`."""

    data: Path
    num_samples: int | None
    seq_length: int | None
    seed: int
    micro_batch_size: int | None
    work_dir: Path | None = None


def add_calibration_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The arguments of calibration, the same in every tool that calibrates."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration-data",
        type=Path,
        required=required,
        metavar="DATA",
        help="prefix of a Megatron .bin/.idx pair, a sample set, or a .npy integer matrix [samples, sequence]",
    )
    group.add_argument(
        "--num-samples", type=positive, metavar="N", help="samples, drawn at random (default: 1024, or all of a matrix)"
    )
    group.add_argument(
        "--seq-length", type=positive, metavar="N", help="tokens per sample (default: at most 4096 from .bin)"
    )
    group.add_argument("--seed", type=not_negative, metavar="N", default=1234, help="seed of the random choice")
    group.add_argument(
        "--micro-batch-size", type=positive, metavar="N", help="samples per forward pass (default: about 4096 tokens)"
    )
    group.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="keep hidden states and progress on disk here: the same command resumes after a kill",
    )


def calibration_options(args: argparse.Namespace) -> CalibrationOptions:
    """The options that `add_calibration_arguments` gave."""
    return CalibrationOptions(
        args.calibration_data, args.num_samples, args.seq_length, args.seed, args.micro_batch_size, args.work_dir
    )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """The parallel sizes, under Megatron's names."""
    group = parser.add_argument_group(
        "parallel calibration", "under megatron-slim torchrun; processes beyond these sizes are data parallel"
    )
    for kind in ("tensor", "pipeline", "expert"):
        group.add_argument(
            f"--{kind}-model-parallel-size", type=positive, metavar="N", default=1, help=f"{kind} parallel size"
        )


def layout_options(args: argparse.Namespace) -> Layout | None:
    """The layout that `add_layout_arguments` and the launcher gave; None for a process of its own.

    Raises:
        SlimError: sizes above 1 and no launcher.
    """
    layout = Layout(
        int(os.environ.get("WORLD_SIZE", "1")),
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.expert_model_parallel_size,
    )
    if "MASTER_ADDR" in os.environ and "RANK" in os.environ:
        return layout
    if layout != Layout(layout.world):
        raise SlimError("parallel sizes need processes", fix="start it with megatron-slim torchrun --nproc-per-node N")
    return None


def run_calibrate(
    load: Path, save: Path, options: CalibrationOptions, layout: Layout | None = None, **reading: Unpack[ReadOptions]
) -> JsonObject:
    """Measure statistics and write them to a new file.

    Args:
        load: checkpoint to measure, in either format.
        save: the new file.
        options: data to measure on.
        layout: of the model over the processes of a launcher, all of which call this; None streams in one process.
        reading: how to read ``load``, as `checkpoint.convert.open_checkpoint`.

    Returns:
        What was written; nothing on ranks other than 0.
    """
    refuse_existing(save)
    from megatron_slim.checkpoint.convert import log_left_out, open_checkpoint

    _refuse_as_weights(save)
    source = open_checkpoint(load, **reading)
    if layout is None or os.environ["RANK"] == "0":
        log_left_out(source)
    with opened_work_dir(options, save) as work:
        stats = measure(source, options, work) if layout is None else _measure_parallel(source, options, layout)
        if stats is None:
            return {}
        stats.save(save)
    logger.info(
        f"{save}: statistics of {stats.metadata['num_samples']} samples of {stats.metadata['seq_length']} tokens"
    )
    return {"load": str(load), "save": str(save), "sha256": stats.sha256, **stats.metadata}


def _refuse_as_weights(save: Path) -> None:
    """Refuse a name that clients would load as weights of the model next to it."""
    from megatron_slim.checkpoint.huggingface_files import INDEX, SINGLE

    if save.suffix == ".safetensors" and any((save.parent / name).exists() for name in (INDEX, SINGLE)):
        fix = "name it calibration.stats, or save it elsewhere"
        raise SlimError("would be read as weights by what serves the model next to it", where=str(save), fix=fix)


def run_rank(
    load: Path, save: Path, options: CalibrationOptions, layout: Layout, **reading: Unpack[ReadOptions]
) -> JsonObject:
    """`run_calibrate` on one rank of many: an error is one line, and every rank leaves with exit code 2."""
    with leaving_together():
        results = run_calibrate(load, save, options, layout, **reading)
    import torch

    torch.distributed.barrier()  # no rank leaves with success before the file is there
    torch.distributed.destroy_process_group()
    return results


def opened_work_dir(options: CalibrationOptions | None, save: Path | None) -> AbstractContextManager[WorkDir | None]:
    """The work directory of a calibration, if it has one; ``save``: the output, which must be elsewhere."""
    if options is None or options.work_dir is None:
        return contextlib.nullcontext()
    from megatron_slim.streaming.work_dir import open_work_dir, refuse_in_work_dir

    if save is not None:
        refuse_in_work_dir(save, options.work_dir)
    return open_work_dir(options.work_dir)


def measure(source: Checkpoint, options: CalibrationOptions, work: WorkDir | None) -> Statistics:
    """Measure in this process; ``work`` as `calibrate.calibrate`."""
    samples = calibration_samples(source, options)
    from megatron_slim.pruning.calibrate import calibrate
    from megatron_slim.streaming.samples import log_calibration

    log_calibration(source, samples)
    return calibrate(source, samples, micro_batch_size=options.micro_batch_size, work=work)


def _measure_parallel(source: Checkpoint, options: CalibrationOptions, layout: Layout) -> Statistics | None:
    if options.work_dir is not None:
        raise SlimError("--work-dir is for one process, which streams", fix="leave it out under a launcher")
    if found := layout.violations(source.shape, seq_length=layout.tp):  # the samples' length is not known yet
        raise SlimError("; ".join(found), fix="choose other parallel sizes")
    samples = calibration_samples(source, options)
    from megatron_slim.pruning.parallel import calibrate_parallel
    from megatron_slim.streaming.samples import log_calibration

    if os.environ["RANK"] == "0":
        log_calibration(source, samples, f", {layout.world} processes")
    return calibrate_parallel(source, samples, layout, micro_batch_size=options.micro_batch_size)


def calibration_samples(source: Checkpoint, options: CalibrationOptions) -> Samples:
    """The samples of calibration."""
    from megatron_slim.streaming.model_input import read_calibration_samples

    return read_calibration_samples(
        options.data,
        source.shape,
        num_samples=options.num_samples,
        seq_length=options.seq_length,
        seed=options.seed,
    )
