"""What the server process of `testing.run_distributed` imports once, before it forks ranks; not for import."""

from __future__ import annotations

import gc
import importlib

# Nothing of what is imported becomes garbage: looking for it takes a sixth of the time here, and as much in every rank.
gc.disable()

import megatron_slim.mcore  # noqa: E402

import torch  # noqa: E402

from megatron_slim.compat import forked_ranks  # noqa: E402

for _module in (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.tokenizers.text",  # transformers: 5 s, and every rank would import it for its NullTokenizer
    "megatron_slim.training.pretrain",
):
    importlib.import_module(_module)

# The first optimizer of a process imports torch's compiler, a third of the CPU time of a short run on one rank.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
# Megatron makes 100,000 documents of mock data and shuffles millions of samples, of which a test reads twenty.
importlib.import_module("megatron.core.datasets.gpt_dataset").MockGPTLowLevelDataset.size = 1000

forked_ranks.share()
gc.freeze()
gc.enable()
