#!/usr/bin/env bash
# megatron-core 0.19.2: rotary positions of packed documents (cu_seqlens) begin anew at each document if the table of angles
# has as many rows as the longest document, or any other number but one: where it has as many rows as all packed tokens
# together, they run on over the documents. Nothing reports it. A model that makes its table for its sequence length, which
# is what the documents are packed into, has that number of rows.
#
# Expected: a document is rotated alike, whatever the length of the table.
# Seen: two documents of 4 tokens. With tables of 4, 7 and 9 rows the second is rotated as the first is, with 8 it is not.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment"
with_packages torch==2.13.0 megatron-core==0.19.2

run_python <<'PY'
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig

LENGTH, HEADS, SIZE = 4, 2, 8
config = TransformerConfig(
    num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, apply_rope_fusion=False
)


class OneRank:
    def size(self):
        return 1

    def rank(self):
        return 0


torch.manual_seed(0)
document = torch.randn(LENGTH, HEADS, SIZE)
packed = torch.cat([document, document])
bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
alike = {}
for rows in (LENGTH, LENGTH + 3, 2 * LENGTH, 2 * LENGTH + 1):
    frequencies = torch.outer(torch.arange(rows).float(), 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE))
    angles = torch.cat([frequencies, frequencies], dim=-1)[:, None, None]
    rotated = apply_rotary_pos_emb(packed, angles, config, cu_seqlens=bounds, cp_group=OneRank())
    alike[rows] = torch.equal(rotated[:LENGTH], rotated[LENGTH:])
    print(f"a table of {rows} rows: the second document is rotated {'as' if alike[rows] else 'other than'} the first")
assert alike == {4: True, 7: True, 8: False, 9: True}, "the behaviour has changed"
PY
