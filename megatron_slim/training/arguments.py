"""Command line of training: Megatron's own arguments plus a small group of ours.

The model's shape is not typed in: it is read from the config.json that travels with every checkpoint, and handed to
Megatron as the flags that it stands for.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import megatron_slim.mcore

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args, parse_args

from megatron_slim.aliases import Document, Keywords
from megatron_slim.architecture.layer_specs import shape_config_fields
from megatron_slim.architecture.parts import TrainOnly
from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.checkpoint.iterations import has_saved
from megatron_slim.checkpoint.torch_dist_names import HF_DIR
from megatron_slim.command_line import ToolParser
from megatron_slim.compat.hooks import take_optimizers
from megatron_slim.errors import SlimError
from megatron_slim.optimizers import OPTIMIZERS
from megatron_slim.training.optimizer_flags import SAME_SCALE
from megatron_slim.training.slim_arguments import WITHOUT_MTP, add_slim_arguments
from megatron_slim.training.train_only import AUX_LOSS, TRAIN_ONLY, chosen, train_only, trains_router

PROG = "megatron-slim pretrain"


def shape_directory(argv: list[str]) -> Path:
    """Directory whose config.json describes the student.

    Raises:
        SlimError: no argument names one.
    """
    early = ToolParser(add_help=False, allow_abbrev=False)
    for name in ("--hf-config", "--load", "--pretrained-checkpoint"):
        early.add_argument(name, type=Path)
    known, _ = early.parse_known_args(argv)
    if known.hf_config is not None:
        return Path(known.hf_config)
    own = known.load if known.load is not None and has_saved(known.load) else None
    for directory in (own, known.pretrained_checkpoint):
        if directory is not None and (directory / HF_DIR).is_dir():
            return Path(directory / HF_DIR)
    if known.pretrained_checkpoint is not None:
        return Path(known.pretrained_checkpoint)
    raise SlimError("no model shape", fix="give --hf-config, --pretrained-checkpoint or --load with a checkpoint in it")


# Fields of Megatron's config whose flags have other names.
_OTHER_NAMES = {
    "num_moe_experts": "num_experts",
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "gated_linear_unit": "swiglu",
}
# Fields without a flag of their own (--swiglu and --disable-bias-linear set two of them), or not fixed by the shape.
_NOT_FIXED = ("activation_func", "add_bias_linear", "hetereogenous_dist_checkpoint", "moe_aux_loss_coeff")
# Megatron's ways to ask for other rotary embeddings, most of which the model would not heed.
_ROTARY = (
    "use_rotary_position_embeddings",
    "no_position_embedding",
    "no_rope_freq",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rope_type",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "no_yarn_correction_range_round_to_int",
)


def model_flags(shape: ModelShape) -> Keywords:
    """Megatron's flags that a model's shape decides, and their values; None and False: the flag is not to be given."""
    fields = {name: value for name, value in shape_config_fields(shape).items() if name not in _NOT_FIXED}
    if (pattern := fields["linear_attention_freq"]) is not None:
        # Megatron's FLOP count, the only reader of this flag besides the config, needs the MTP blocks in the pattern.
        fields["linear_attention_freq"] = str([*pattern, *[0] * shape.mtp_num_layers]).replace(" ", "")
    if isinstance(fields["moe_layer_freq"], list):
        fields["moe_layer_freq"] = str(fields["moe_layer_freq"]).replace(" ", "")
    fields |= dict.fromkeys(_ROTARY)
    fields |= {
        "disable_bias_linear": True,
        "group_query_attention": True,
        "untie_embeddings_and_output_weights": True,
        "max_position_embeddings": shape.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rotary_base),
        "rotary_percent": shape.rotary_percent,
        "vocab_size": shape.vocab_size,
        "tokenizer_type": "NullTokenizer",
    }
    return {f"--{_OTHER_NAMES.get(name, name).replace('_', '-')}": value for name, value in fields.items()}


def _as_words(flags: Document) -> Iterator[str]:
    """Flags as they stand on a command line."""
    for flag, value in flags.items():
        if value is not None and value is not False:
            yield from [flag] if value is True else [flag, str(value)]


# What Megatron turns on by default and cannot do without Transformer Engine; without Apex's kernel (for the output
# layer, whose gradient is ours, but Megatron's class asks); on a CPU, which has no cores to spare for loaders.
LOCAL_FLAGS = (
    "--transformer-impl=local",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
)
NO_GRADIENT_KERNEL = "--no-gradient-accumulation-fusion"
CPU_FLAGS = (
    "--distributed-backend=gloo",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--num-workers=0",
)


def default_flags() -> list[str]:
    """Flags that this kind of model needs and the command line may override by naming them itself."""
    flags = ["--moe-router-load-balancing-type=global_aux_loss", "--moe-token-dispatcher-type=alltoall"]
    # Without an interval Megatron fails, also where there is no validation (--eval-iters 0).
    flags += ["--moe-router-dtype=fp32", "--ckpt-format=torch_dist", "--eval-interval=1000"]
    # Every token weighs the same, however masks share them out over micro-batches and ranks; NaN is `FiniteWatch`'s.
    flags += ["--calculate-per-token-loss", "--no-check-for-nan-in-loss-and-grad", SAME_SCALE]
    gpu = torch.cuda.is_available()
    flags += ["--moe-grouped-gemm"] if gpu and HAVE_TE else LOCAL_FLAGS
    flags += [] if gpu and _grad_accum_fusion_available else [NO_GRADIENT_KERNEL]
    return flags if gpu else [*flags, *CPU_FLAGS]


def complete_argv(argv: list[str]) -> tuple[list[str], ModelShape]:
    """What the command line that Megatron parses has in front of what was given, and the student's shape.

    Raises:
        SlimError: a flag contradicts the shape, which config.json alone decides.
    """
    shape = read_shape(shape_directory(argv), without_mtp=WITHOUT_MTP in argv)
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    fixed = model_flags(shape)
    if clash := sorted(given & fixed.keys()):
        raise SlimError(f"{', '.join(clash)} cannot be given", fix="the model's shape comes from its config.json")
    coefficient = shape.router_aux_loss_coef if trains_router(shape, _train_only(argv)) else 0.0
    defaults = [*default_flags(), f"{AUX_LOSS}={coefficient}"]
    return [*(flag for flag in defaults if flag.split("=")[0] not in given), *_as_words(fixed)], shape


def _train_only(argv: list[str]) -> TrainOnly | None:
    """What a command line trains, as far as it can be read before all of it is."""
    early = ToolParser(PROG, add_help=False, allow_abbrev=False)
    early.add_argument(TRAIN_ONLY, type=train_only)
    return chosen(early.parse_known_args(argv)[0])


def load_balancing_note(shape: ModelShape, argv: Sequence[str], kind: str | list[str]) -> str | None:
    """What config.json's load-balancing coefficient means here; None where the command line gives one, or no loss.

    transformers' loss is one of all layers together, and balance is top-k to it; Megatron's is one of every layer, and
    balance is 1. Where all layers are in the same balance, the ratio of the gradients is layers over top-k.

    Args:
        shape: the student's.
        argv: the command line as it was given.
        kind: Megatron's ``moe_router_load_balancing_type``.
    """
    coefficient, times = shape.router_aux_loss_coef, shape.num_layers / shape.moe_router_topk
    if kind == "none" or not coefficient or any(word.split("=")[0] == "--moe-aux-loss-coeff" for word in argv):
        return None
    return (
        f"load balancing: --moe-aux-loss-coeff {coefficient:g} is config.json's router_aux_loss_coef as it is; "
        f"Megatron's loss, layer by layer, weighs {times:.3g} times as much with it as transformers' (as much with "
        f"{coefficient / times:.3g})"
    )


def reading(argv: Sequence[str]) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """Megatron's ``extra_args_provider``: it adds our group to the parser, and has it parse these words.

    Megatron's functions parse what stands in ``sys.argv``, and take no words; but the parser is what this gives them.
    """

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.prog = PROG
        found = add_slim_arguments(parser)
        found.parse_args = partial(found.parse_args, list(argv))  # type: ignore[method-assign, assignment]
        return found

    return add


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments and ours, before Megatron's own validation."""
    take_optimizers(OPTIMIZERS)
    found: argparse.Namespace = parse_args(reading(argv))
    return found


def validated(argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments after its own validation, which asserts; from here on ``get_args`` gives them.

    Raises:
        SlimError: what Megatron refuses, and where it does not say, the line of its source.
    """
    take_optimizers(OPTIMIZERS)
    try:
        args: argparse.Namespace = parse_and_validate_args(reading(argv))
        core_transformer_config_from_args(args)  # validates more, and would do so after all else was set up
    except (AssertionError, ValueError) as error:
        what = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise SlimError(f"Megatron refuses the arguments: {what}") from None
    return args


class _PlainHelp(argparse.HelpFormatter):
    """Megatron's help texts hold bare percent signs, at which argparse's own expansion fails."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""


def print_help() -> None:
    """Print all of Megatron's arguments, and ours."""
    parser = argparse.ArgumentParser(prog=PROG, formatter_class=_PlainHelp, allow_abbrev=False)
    add_slim_arguments(add_megatron_arguments(parser)).print_help()
