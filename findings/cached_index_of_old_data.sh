#!/usr/bin/env bash
# megatron-core 0.19.2: GPTDataset finds its cached sample index by the data set's path, and by nothing that changes when
# the data set is rewritten. Documents of other lengths under the same name are then cut into samples at the old
# places: samples are of wrong lengths, and the error is about a mask and names neither cache nor data.
#
# Expected: a data set that was rewritten has the samples of one that was never there before.
# Seen: under a new name 12 samples; under the old name IndexError: The shape of the mask [16] at index 0 does not match ...
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2

run_python <<'PY'
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

SAMPLES, DOCUMENTS = 12, 8
tokenizer = SimpleNamespace(eod=0, pad=0, vocab_size=100, unique_identifiers={"name": "numbers"})


def samples(prefix, lengths):
    """Writes documents of these lengths, each of one number, and reads them as samples of 16."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for number, length in enumerate(lengths, start=1):
        builder.add_document(torch.full((length,), number, dtype=torch.int32), [length])
    builder.finalize(f"{prefix}.idx")
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, blend=([prefix], None), split="1,0,0", tokenizer=tokenizer,
        path_to_cache="cache", reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(DOCUMENTS, dtype=np.int32)
    data = GPTDataset(IndexedDataset(prefix), prefix, documents, SAMPLES, Split.train, config)
    return torch.stack([data[index]["tokens"] for index in range(SAMPLES)])


short, long = [25, 30] * 4, [30, 25] * 4
samples("numbers", short)
found = len(samples("never-there", long))
try:
    samples("numbers", long)
    ending = "nothing wrong"
except IndexError as error:
    ending = f"IndexError: {error}"
print(f"under a new name {found} samples; under the old name {ending}")
assert found == SAMPLES and "shape of the mask" in ending, "the behaviour has changed"
PY
