#!/usr/bin/env bash
# megatron-core 0.19.2: GPTDataset keeps the loss mask of the first sample it serves, and then writes that sample's
# padding into it. Every later sample loses the same positions, whatever it holds there.
#
# Expected: the loss mask of a sample depends on that sample alone.
# Seen: a sample of 16 ids counts 16 positions alone, and 1 after a sample of which 1 counts.
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

LENGTH, DOCUMENTS, SAMPLES, PAD = 16, 8, 7, 0
tokenizer = SimpleNamespace(eod=9, pad=PAD, vocab_size=10, unique_identifiers={"name": "numbers"})


def dataset():
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=(["numbers"], None), split="100,0,0", tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )
    documents = np.arange(DOCUMENTS, dtype=np.int32)
    return GPTDataset(IndexedDataset("numbers"), "numbers", documents, SAMPLES, Split.train, config)


builder = IndexedDatasetBuilder("numbers.bin", dtype=np.int32)
for document in range(DOCUMENTS):
    ids = torch.full((LENGTH,), PAD if document == 0 else 5, dtype=torch.int32)
    builder.add_document(ids, [LENGTH])
builder.finalize("numbers.idx")


def counted(data, sample):
    return int(data[sample]["loss_mask"].sum())


alone = [counted(dataset(), sample) for sample in range(SAMPLES)]
padded, whole = alone.index(min(alone)), alone.index(LENGTH)
used = dataset()
after = [counted(used, padded), counted(used, whole)][1]
print(f"a sample counts {alone[whole]} of {LENGTH} positions alone, {after} after one that counts {alone[padded]}")
assert alone[whole] == LENGTH and after == alone[padded] < LENGTH, "the behaviour has changed"
PY
