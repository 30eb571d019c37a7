"""Whether the optimizer and the schedule of a checkpoint fit a run, found before anything is built.

Megatron saves its arguments, its scheduler's state and the format of its optimizer's with every checkpoint, next to the
tensors: that is compared with the run. Megatron itself compares less of it, and while it loads.
"""

from __future__ import annotations

import math
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import megatron_slim.mcore

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_slim.aliases import JsonObject
from megatron_slim.checkpoint.common_state import read_common_state
from megatron_slim.checkpoint.iterations import iteration_directory
from megatron_slim.checkpoint.torch_dist_names import RELEASE, TRACKER
from megatron_slim.errors import CheckpointError
from megatron_slim.training.rates import Lengths

SAME_LAYOUT = (
    "resume in the layout it was saved in; in any other after one save with --dist-ckpt-optim-fully-reshardable; or "
    "give --no-load-optim, which starts with a new optimizer"
)
OTHER_OPTIMIZER = "give what it was saved with, or --no-load-optim, which starts with a new optimizer"
OTHER_SCHEDULE = "give what it was saved with, or --override-opt_param-scheduler to continue with what is given"
# What the default format of the optimizer's state, buckets of a rank, depends on in addition to the model.
_LAYOUT = {
    "tensor_model_parallel_size": "tensor parallel size",
    "pipeline_model_parallel_size": "pipeline parallel size",
    "expert_model_parallel_size": "expert parallel size",
    "expert_tensor_parallel_size": "expert tensor parallel size",
    "virtual_pipeline_model_parallel_size": "virtual pipeline stages",
    "pipeline_model_parallel_layout": "pipeline layout",
    "params_dtype": "type of parameters",
    "accumulate_allreduce_grads_in_fp32": "gradients in fp32",
}
# What any format depends on.
_OPTIMIZER = {
    "optimizer": "--optimizer",
    "optimizer_matrices": "--optimizer-matrices",
    "train_only": "--train-only",
    "use_distributed_optimizer": "--use-distributed-optimizer",
    # Megatron's name of the same flag with an optimizer of matrices.
    "use_layer_wise_distributed_optimizer": "--use-distributed-optimizer",
}
_LATER = ("train_only",)  # of ours, which older runs had not: as if it was not given
_RATES = {
    "lr": "--lr",
    "min_lr": "--min-lr",
    "decoupled_lr": "--decoupled-lr",
    "decoupled_min_lr": "--decoupled-min-lr",
    "adamw_lr": "--adamw-lr",
    "stage_warmup": "--stage-warmup",
}
_STYLES = {
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "initial weight decay",
    "end_wd": "final weight decay",
    "wd_incr_style": "--weight-decay-incr-style",
}
_GIVEN_AS = {"start_wd": "start_weight_decay", "end_wd": "end_weight_decay", "wd_incr_style": "weight_decay_incr_style"}


def check_resume(args: Namespace) -> None:
    """Compare the checkpoint that a run resumes from with the run.

    Args:
        args: Megatron's, validated.

    Raises:
        CheckpointError: the optimizer cannot be restored in this layout, or the schedule is another one; all ranks
            raise it alike.
    """
    directory = _resumed_from(args)
    if directory is None or args.no_load_optim or args.finetune or args.skip_train:
        return
    state = read_common_state(directory)
    saved = state.get("args")
    if saved is None or getattr(saved, "no_save_optim", None):
        return
    where = str(directory)
    if differing := [*_differing(saved, args, _OPTIMIZER)]:
        raise CheckpointError(f"saved with {', '.join(differing)}", where=where, fix=OTHER_OPTIMIZER)
    if differing := [*_of_layout(state, args)]:
        raise CheckpointError(f"saved with {', '.join(differing)}", where=where, fix=SAME_LAYOUT)
    if not args.override_opt_param_scheduler and (differing := [*_of_schedule(state, args)]):
        raise CheckpointError(f"saved with another schedule: {', '.join(differing)}", where=where, fix=OTHER_SCHEDULE)


def why_not_restored(error: Exception) -> CheckpointError | None:
    """What Megatron refuses while it restores an optimizer or its schedule; None if the error is not of that.

    What people change is found before, by `check_resume`. All ranks raise it alike.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    if "/megatron/core/optimizer" not in last.filename or not any(word in last.name for word in ("load", "_check")):
        return None
    return CheckpointError(f"Megatron cannot restore the optimizer: {type(error).__name__}: {error}", fix=SAME_LAYOUT)


def _resumed_from(args: Namespace) -> Path | None:
    """The iteration's directory; None where a run starts, or starts from weights alone."""
    if args.load is None:
        return None
    if args.ckpt_step:
        return Path(args.load) / f"iter_{args.ckpt_step:07d}"
    if not (Path(args.load) / TRACKER).is_file():
        return None
    directory = iteration_directory(Path(args.load))
    return None if directory.name == RELEASE else directory


def _differing(saved: Namespace, args: Namespace, names: dict[str, str]) -> Iterator[str]:
    """Arguments that are not what they were, in words; what an older Megatron did not have is not compared."""
    for name, words in names.items():
        own = getattr(args, name)
        before = getattr(saved, name, None if name in _LATER else own)
        if str(before) != str(own):  # a layout is an object that equals nothing
            was, is_now = ("none" if value is None else value for value in (before, own))
            yield f"{words} {was}, not {is_now}"


def _of_layout(state: JsonObject, args: Namespace) -> Iterator[str]:
    kind = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    has_buckets = args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer
    if has_buckets and kind not in DistributedOptimizer.checkpoint_fully_reshardable_formats:
        yield from _differing(state["args"], args, _LAYOUT)


def _of_schedule(state: JsonObject, args: Namespace) -> Iterator[str]:
    """Rates find the saved groups of parameters; the rest Megatron takes from the checkpoint on request."""
    saved, scheduler = state["args"], state.get("opt_param_scheduler")
    yield from _differing(saved, args, _RATES)
    if args.use_checkpoint_opt_param_scheduler or scheduler is None:
        return
    for key, flag in _STYLES.items():
        own = getattr(args, _GIVEN_AS.get(key, key))
        if scheduler[key] != own:
            yield f"{flag} {scheduler[key]}, not {own}"
    yield from _of_lengths(saved, scheduler, args)


def _of_lengths(saved: Namespace, scheduler: JsonObject, args: Namespace) -> Iterator[str]:
    """In Megatron's scheduler they are samples, so that another batch makes another schedule of the same iterations.

    A warm-up that is a fraction is one of samples there and of iterations here, which round differently.
    """
    own = Lengths.of(args)
    batch = 1 if own.unit == "samples" else args.global_batch_size
    lengths = {
        f"--train-{own.unit}": (scheduler["wd_incr_steps"], own.train),
        f"--lr-decay-{own.unit}": (scheduler["lr_decay_steps"], own.decay),
        f"warm-up in {own.unit}": (scheduler["lr_warmup_steps"], own.warmup),
    }
    if args.lr_decay_style == "WSD":
        before = Lengths.of(saved)
        batch_before = 1 if before.unit == "samples" else saved.global_batch_size
        lengths[f"--lr-wsd-decay-{own.unit}"] = ((before.wsd or 0) * batch_before, own.wsd or 0)
        yield from _differing(saved, args, {"lr_wsd_decay_style": "--lr-wsd-decay-style"})
    differing = [
        f"{name} {_number(before / batch)}, not {_number(now)}"
        for name, (before, now) in lengths.items()
        if not math.isclose(before, now * batch, rel_tol=1e-12)
    ]
    if differing and batch > 1:
        yield from _differing(saved, args, {"global_batch_size": "--global-batch-size"})
    yield from differing


def _number(value: float) -> str:
    """All digits of what is whole, which it need not be where a batch or a fraction is another.

    >>> _number(97656832.0), _number(2.5)
    ('97656832', '2.5')
    """
    return f"{value:.15g}"
