"""What is computed with the libraries of a GPU against the same without them."""

from __future__ import annotations

from benchmarks import gated_delta_rule
from benchmarks.gpu.hide import compile_nothing, hide
from benchmarks.gpu.machine import need
from benchmarks.gpu.parity import BF16_GRADIENT, BF16_LOSSES, our_logits, reference_logits, tiny_model, token_errors
from benchmarks.gpu.parts import Check, Found, NotRun, Setting
from benchmarks.gpu.training_runs import narrow_checks, train, write_models

# Relative norm of the error of outputs and gradients against fp64. Inside a chunk fla multiplies in bf16, whose
# rounding is 0.4%; its own tests allow 0.5% for outputs to 2% for gates.
FLA_ERROR = 0.02
# FP8 keeps 3 bits of a factor, 6%, 16 times the rounding of bf16; it averages out over a product.
FP8_LOSSES, FP8_GRADIENT = 0.02, 0.3
FP8_CAPABILITY = (8, 9)


def fla(setting: Setting) -> Found:
    """The kernels of flash-linear-attention against fp64 and the PyTorch path, alone and in training."""
    if setting.device == "cpu":
        raise NotRun("its kernels need a GPU")
    need("flash-linear-attention")
    sizes = "--seq-length 256 --key-heads 2 --value-heads 4 --head-dim 64" if setting.quick else "--seq-length 2048"
    argv = f"{sizes} --device cuda --scaling-lengths 1024 --repeats 3 --json".split()
    results = gated_delta_rule.benchmark(gated_delta_rule.parse_args(argv))
    errors = results["relative_errors"]
    found = Found(details=results)
    for part, error in errors[gated_delta_rule.FLA].items():
        found.add(Check.at_most(f"fla's {part} against fp64, relative norm", error, FLA_ERROR))
    worst_of_ours = max(errors[gated_delta_rule.OURS].values())
    # Ours computes in fp32 what it is given in bf16: only its results are rounded.
    found.add(Check.at_most("the PyTorch path against fp64, the worst of these", worst_of_ours, FLA_ERROR / 2))
    found.add(Check("fla is faster than the PyTorch path, times", results["fla_speedup_over_package"]))
    write_models(setting.work)
    plain = train(setting, "plain", "--bf16")
    kernels = train(setting, "fla", "--bf16", hidden=("te", "apex"))
    found.add(*narrow_checks("bf16, with fla against without", kernels, plain, BF16_LOSSES, BF16_GRADIENT))
    return found


def transformer_engine(setting: Setting) -> Found:
    """Transformer Engine's modules against Megatron's own, on the same weights."""
    if setting.device == "cpu":
        raise NotRun("its modules need a GPU")
    need("Transformer Engine")
    hide(["fla"])  # or transformers would use it in what is to be the reference
    compile_nothing()
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    import torch

    directory = tiny_model(setting.work)
    reference = reference_logits(directory)
    plain = {"transformer_impl": "local", "moe_grouped_gemm": False}
    local, engine = (
        float(token_errors(our_logits(directory, torch.bfloat16, **fields), reference).median())
        for fields in (plain, {})
    )
    found = Found(details={"local": local, "transformer_engine": engine})
    # Both round to bf16, at different places: neither error should be much the larger.
    label = "logits in bf16, median relative error over that of the local layers"
    found.add(Check.at_most(label, engine / local, 2.0))
    write_models(setting.work)
    expected = train(setting, "local", "--bf16")
    losses = train(setting, "engine", "--bf16", hidden=("fla",))
    found.add(*narrow_checks("bf16, against the local layers", losses, expected, BF16_LOSSES, BF16_GRADIENT))
    return found


def fp8(setting: Setting) -> Found:
    """Training with ``--fp8-format hybrid`` against bf16, both with Transformer Engine."""
    if setting.device == "cpu":
        raise NotRun("FP8 needs a GPU")
    need("Transformer Engine")
    import torch

    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise NotRun(f"FP8 needs compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}")
    write_models(setting.work)
    expected = train(setting, "bf16", "--bf16", hidden=())
    losses = train(setting, "fp8", "--bf16", "--fp8-format", "hybrid", hidden=())
    checks = narrow_checks("FP8 against bf16", losses, expected, FP8_LOSSES, FP8_GRADIENT)
    return Found(checks, {"fp8": losses, "bf16": expected})
