"""Conversion of a layer of each kind at the published sizes, and these layers on the device from both formats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Check, Found, NotRun, Setting
from benchmarks.models import PUBLISHED, model_bytes, shape_of, write_model
from benchmarks.processes import ROOT, python, run

# One Gated DeltaNet layer, one of full attention, and the MTP block, which is another: 10 GB. The vocabulary is not the
# point.
LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "vocab_size": 1024,
}
TINY = {"hidden_size": 64, "num_experts": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def conversion(setting: Setting) -> Found:
    """Time of a verified conversion to torch_dist; weights on the device are the same bits from both formats."""
    config = PUBLISHED | LAYERS | (TINY if setting.quick else {})
    nbytes = model_bytes(shape_of(config))
    if (free := shutil.disk_usage(setting.work).free) < 3 * nbytes:
        raise NotRun(f"{free / 1e9:.0f} GB free at {setting.work}, {3 * nbytes / 1e9:.0f} needed")
    source, result = setting.work / "hf", setting.work / "torch_dist"
    write_model(source, config, sparse=False)
    outcome = run(
        python(ROOT / "tools/convert_checkpoint.py", "--load", source, "--save", result, "--to", "torch_dist")
    )
    found = Found(details={"bytes": nbytes})
    found.add(Check("conversion, verified, s", outcome.seconds), Check("GB/s", nbytes / 1e9 / outcome.seconds))
    found.add(Check.at_most("weights on the device that differ between the formats", differing(source, result), 0))
    return found


def differing(source: Path, result: Path) -> int:
    """Number of weights of all layers that are not the same bits."""
    from megatron_slim.compat import runtime

    runtime.init_single_process()
    import torch

    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.streaming.block import block_config, build_block

    checkpoints = [open_checkpoint(path) for path in (source, result)]
    config, count = block_config(checkpoints[0].shape, torch.bfloat16), 0
    for block in checkpoints[0].shape.blocks:
        one, other = (build_block(checkpoint, block, config).state_dict() for checkpoint in checkpoints)
        assert one.keys() == other.keys()
        tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
        count += sum(not torch.equal(one[name], other[name]) for name in tensors)
    return count
