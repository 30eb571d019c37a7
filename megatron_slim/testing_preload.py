"""What the server process of `testing.run_distributed` imports once, before it forks ranks; not for import."""

from __future__ import annotations

import importlib

from megatron_slim import device

device.install()
for _module in (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.tokenizers.text",  # transformers: 5 s, and every rank would import it for its NullTokenizer
    "megatron_slim.training.pretrain",
):
    importlib.import_module(_module)
