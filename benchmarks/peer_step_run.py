"""One side of `peer_step.py` in a process of its own: transformers' model, or the batches that our run trains on."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kd_step import LR

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RECORD = "--record"
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.999), 1e-8, 0.01, 1.0  # Megatron's defaults
KD_LAMBDA = 0.75


def record(file: Path, argv: list[str]) -> None:
    """Train as `megatron-slim distill` does, and write the token ids of all micro-batches, [n, b, S + 1]."""
    import numpy as np
    import torch

    from megatron_slim.training import pretrain, steps

    found: list[Any] = []
    fetch = steps.next_batch  # type: ignore[attr-defined]

    def fetch_and_keep(*args: Any, **kwargs: Any) -> Any:
        batch = fetch(*args, **kwargs)
        tokens, labels = batch["tokens"], batch["labels"]
        assert tokens is not None and labels is not None
        found.append(torch.cat([tokens, labels[:, -1:]], dim=1).numpy())
        return batch

    steps.next_batch = fetch_and_keep  # type: ignore[attr-defined]
    pretrain.main(argv)
    np.save(file, np.stack(found))


def parse_args() -> argparse.Namespace:
    """Command line of transformers' side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--micro-batches", type=int, required=True, help="of a step")
    parser.add_argument("--experts", help="transformers' experts_implementation; default: its own")
    return parser.parse_args()


def load(directory: Path, args: argparse.Namespace) -> Any:
    """A model of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    given = {} if args.experts is None else {"experts_implementation": args.experts}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **given)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW in its fastest form, with weight decay where Megatron has it."""
    import torch

    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)


def losses_of(student: Any, teacher: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with the next token, and with the teacher's distribution, of one micro-batch [b, S + 1]."""
    import torch
    import torch.nn.functional as F

    inputs, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    logits = student(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1)
    lm = F.cross_entropy(logits, labels)
    if teacher is None:
        return lm, torch.zeros(())
    with torch.no_grad():
        p = teacher(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1).softmax(-1)
    return lm, F.cross_entropy(logits, p)


def steps(args: argparse.Namespace) -> Iterator[tuple[float, float, float]]:
    """Seconds and losses of every step of training."""
    import numpy as np
    import torch

    batches = torch.from_numpy(np.load(args.batches)).long()
    student = load(args.student, args).train()
    teacher = None if args.teacher is None else load(args.teacher, args).eval()
    optimizer, share = optimizer_of(student), 1 / args.micro_batches
    for step in batches.split(args.micro_batches):
        started = time.perf_counter()
        optimizer.zero_grad()
        sums = [0.0, 0.0]
        for tokens in step:
            lm, kd = losses_of(student, teacher, tokens)
            (share * (lm if teacher is None else (1 - KD_LAMBDA) * lm + KD_LAMBDA * kd)).backward()
            sums[0] += float(lm.detach()) * share
            sums[1] += float(kd.detach()) * share
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        yield time.perf_counter() - started, sums[0], sums[1]


if __name__ == "__main__":
    if RECORD in sys.argv[1:2]:
        record(Path(sys.argv[2]), sys.argv[3:])
    else:
        print(json.dumps(list(steps(parse_args()))))
