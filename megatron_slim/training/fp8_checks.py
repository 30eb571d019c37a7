"""What keeps a run from multiplying in FP8, found before anything is built.

Without Transformer Engine Megatron ignores ``--fp8-format`` silently, and what the modules of Transformer Engine
refuse, they refuse at the first step, with a traceback.
"""

from __future__ import annotations

from argparse import Namespace

import megatron_slim.mcore

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_slim.architecture.fp8_sizes import RECIPES, row_violations, size_violations
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.training.teacher_config import teacher_recipe

_LAYERS_IN_BF16 = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def fp8_violations(shape: ModelShape, teacher: ModelShape | None, args: Namespace) -> list[str]:
    """What is wrong with the arguments about FP8, in sentences; nothing for a run without it.

    Args:
        shape: sizes of the student.
        teacher: sizes of the teacher, if there is one.
        args: Megatron's arguments and ours, as parsed.
    """
    teacher_fp8 = None if teacher is None else _teacher_recipe(args)
    found = []
    if args.teacher_fp8_recipe is not None and teacher_fp8 is None:
        found.append("--teacher-fp8-recipe needs a teacher in FP8; give --teacher-load and --teacher-dtype fp8")
    if not args.fp8 and teacher_fp8 is None:
        return found
    if not HAVE_TE:
        return [*found, "FP8 needs Transformer Engine, which is not installed (megatron-slim doctor says what is)"]
    if args.transformer_impl != "transformer_engine":
        return [*found, f"--transformer-impl {args.transformer_impl} has no FP8; leave it out"]
    if args.fp8:
        found += _student_violations(args)
    for name, model, recipe in (("student", shape, args.fp8 and args.fp8_recipe), ("teacher", teacher, teacher_fp8)):
        if model is not None and recipe in RECIPES:
            of_model = _model_violations(model, recipe, args, trained=name == "student")
            found += [f"{name}: {sentence}; or leave its FP8 out" for sentence in of_model]
    return found


def _teacher_recipe(args: Namespace) -> str | None:
    return teacher_recipe(args.teacher_dtype, args.teacher_fp8_recipe, args.fp8_recipe if args.fp8 else None)


def _student_violations(args: Namespace) -> list[str]:
    found = []
    if not args.bf16:
        found.append("--fp8-format needs --bf16: it is for bf16 weights and activations")
    if args.fp8_param_gather:
        found.append("--fp8-param-gather is not supported: weights are loaded into bf16 parameters")
    if args.fp8_recipe == "delayed" and args.first_last_layers_bf16:
        found.append("--first-last-layers-bf16 does not go with --fp8-recipe delayed, one region for all layers")
    return found


def _model_violations(shape: ModelShape, recipe: str, args: Namespace, *, trained: bool) -> list[str]:
    tp = args.tensor_model_parallel_size
    found = _gpu_violations(recipe)
    found += size_violations(shape, recipe, tp=tp, etp=args.expert_tensor_parallel_size or tp, trained=trained)
    if args.seq_length and args.micro_batch_size:
        ranks = tp if args.sequence_parallel else 1
        found += row_violations(args.seq_length, args.micro_batch_size, recipe, ranks=ranks, trained=trained)
    most = shape.num_layers // args.pipeline_model_parallel_size
    for name in _LAYERS_IN_BF16 if args.first_last_layers_bf16 else ():
        if not 0 <= getattr(args, name) <= most:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            found.append(f"{flag} is not between 0 and {most}, the layers of a pipeline stage")
    return found


def _gpu_violations(recipe: str) -> list[str]:
    if not torch.cuda.is_available():
        return []  # Transformer Engine says so itself
    (least, below, cuda), has = RECIPES[recipe], torch.cuda.get_device_capability()
    has_cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    if has >= least and (below is None or has < below) and (cuda is None or has_cuda >= cuda):
        return []
    fitting = [name for name, (low, high, _) in RECIPES.items() if has >= low and (high is None or has < high)]
    wanted = f"compute capability {_dotted(least)}" + (f" to below {_dotted(below)}" if below else "")
    wanted += f" and CUDA {_dotted(cuda)}" if cuda else ""
    fix = f"this GPU can do {', '.join(fitting)}" if fitting else "this GPU has no FP8"
    return [f"FP8 recipe {recipe} needs {wanted}, here is {_dotted(has)} with CUDA {torch.version.cuda}; {fix}"]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
