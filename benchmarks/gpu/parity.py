"""The same numbers on this device as from transformers, from a CPU in fp32, after a resume and in every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.hide import LIBRARIES, compile_nothing, hide
from benchmarks.gpu.parts import Check, Found, NotRun, Setting
from benchmarks.gpu.training_runs import SIZES, STEPS, TERMS, Losses, narrow_checks, train, worst, write_models

if TYPE_CHECKING:
    from torch import Tensor

# fp32 sums of another order differ by a few 1e-6 at logits of about 2; tests on a CPU allow as much.
LOGITS_FP32 = 1e-4
# bf16 keeps 8 bits, 0.4%; in a random model of four layers it adds up to 2.1% on a CPU (median over tokens).
LOGITS_BF16 = 0.05
# Losses and gradient norms over five steps. In fp32 layouts of one machine agree to 1e-5; other exp and log, and other
# orders of the sums in all kernels, may take ten times that.
TRAINING_FP32 = 1e-4
# Between fp32 and bf16 on one CPU: 0.13% in losses, 1.9% in the first gradient norm; a GPU rounds at other places.
BF16_LOSSES, BF16_GRADIENT = 0.005, 0.05
LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2",
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "ep2": "--expert-model-parallel-size 2 --micro-batch-size 1",
}


def tiny_model(directory: Path) -> Path:
    """A random checkpoint in fp32."""
    import torch

    from megatron_slim.testing import tiny_shape, write_tiny_checkpoint

    return write_tiny_checkpoint(directory / "tiny", tiny_shape(**SIZES), seed=7, dtype=torch.float32)


def tokens() -> Tensor:
    """Two sequences of 96 token ids, on the device."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab_size"], (2, 96), generator=generator).to("cuda")


def reference_logits(directory: Path) -> Tensor:
    """What transformers' Qwen3-Next gives in fp32, in plain PyTorch, on the device: [b, s, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.backends.cudnn.allow_tf32 = False  # its convolution would be
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **plain)
    with torch.no_grad():
        logits: Tensor = model.to("cuda").eval()(tokens()).logits
    return logits


def our_logits(directory: Path, dtype: Any, **config: Any) -> Tensor:
    """What the Megatron model gives: [b, s, vocabulary] in fp32."""
    import torch

    from megatron_slim.architecture.hidden_states import HiddenStatesModel
    from megatron_slim.architecture.layer_specs import build_model, transformer_config
    from megatron_slim.checkpoint.huggingface import HFCheckpoint
    from megatron_slim.checkpoint.loading import load_hf_weights

    checkpoint = HFCheckpoint.open(directory)
    fields = {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "moe_aux_loss_coeff": 0.0} | config
    shape_config = transformer_config(checkpoint.shape, **fields)
    model = build_model(checkpoint.shape, shape_config, model_class=HiddenStatesModel)
    load_hf_weights(model, checkpoint)
    model = model.cuda().eval()
    inputs = tokens()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    with torch.no_grad():
        hidden = model.heads(model(inputs, positions, None))[0]
        logits: Tensor = hidden.transpose(0, 1) @ model.output_layer.weight.t()
    return logits.float()


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference over the norm, of every token's logits."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


def parity(setting: Setting) -> Found:
    """Logits and training in plain PyTorch: no Transformer Engine, no apex, no flash-linear-attention."""
    hide(LIBRARIES)
    compile_nothing()
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    import torch

    found, directory = Found(), tiny_model(setting.work)
    reference = reference_logits(directory)
    exact = float(token_errors(our_logits(directory, torch.float32), reference).max())
    found.add(
        Check.at_most("logits in fp32 against transformers', relative error of the worst token", exact, LOGITS_FP32)
    )
    # The median: a token whose router decides otherwise has other logits altogether.
    narrow = float(token_errors(our_logits(directory, torch.bfloat16), reference).median())
    found.add(Check.at_most("logits in bf16, relative error of the median token", narrow, LOGITS_BF16))
    write_models(setting.work)
    expected = train(setting, "cpu", on_cpu=True)
    wide, narrow_losses = train(setting, "fp32"), train(setting, "bf16", "--bf16")
    label = f"fp32 against a CPU: losses and gradient norms of {STEPS} steps, worst relative difference"
    found.add(Check.at_most(label, worst(wide, expected), TRAINING_FP32))
    found.add(*narrow_checks("bf16 against a CPU in fp32", narrow_losses, expected, BF16_LOSSES, BF16_GRADIENT))
    found.details |= {"cpu": expected, "fp32": wide, "bf16": narrow_losses}
    return found


def resume(setting: Setting) -> Found:
    """Steps after a checkpoint, in a run that resumes from it, as in the run that saved it."""
    write_models(setting.work)
    save, last = setting.work / "save", STEPS - 2
    whole = train(setting, "whole", "--save", str(save), "--save-interval", str(last))
    shutil.rmtree(save / f"iter_{STEPS:07d}")
    (save / "latest_checkpointed_iteration.txt").write_text(str(last))
    again = train(setting, "resumed", "--load", str(save))
    rest: Losses = {term: whole[term][last:] for term in TERMS}
    label = f"steps {last + 1} to {STEPS} after a resume, worst relative difference"
    check = Check.at_most(label, worst(again, rest), TRAINING_FP32)
    return Found([check], {"whole": whole, "resumed": again})


def layouts(setting: Setting) -> Found:
    """Two ranks against one."""
    if setting.device == "cuda" and setting.gpus < 2:
        raise NotRun("needs two GPUs")
    write_models(setting.work)
    found, one = Found(), train(setting, "one")
    for name, flags in list(LAYOUTS.items())[: 1 if setting.quick else None]:
        several = train(setting, name, *flags.split(), ranks=2)
        label = f"{name} against one rank in fp32, worst relative difference"
        found.add(Check.at_most(label, worst(several, one), TRAINING_FP32))
        found.details[name] = several
    return found
