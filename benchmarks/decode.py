#!/usr/bin/env python3
"""Measure greedy decoding against transformers' `generate`, and speculative decoding against greedy.

All run in one process and in turns, in fp32, and must give the same tokens. Without --load the model is the demo's
teacher with random weights, whose drafts are hardly ever accepted: then only greedy decoding is compared. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import read_config, shape_of
from megatron_slim.cli.tool import run_tool
from megatron_slim.command_line import positive, tool_parser

if TYPE_CHECKING:
    from megatron_slim.generation.decoder import Decoder

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples/slimqwen/demo_teacher"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = tool_parser(__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, metavar="DIR", help="a trained Hugging Face checkpoint")
    parser.add_argument("--prompts", type=Path, help="as of `megatron-slim evaluate --acceptance`; default: random ids")
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="of each prompt")
    parser.add_argument("--new-tokens", type=positive, default=256, help="after each prompt")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8], help="prompts at the same time")
    parser.add_argument("--draft-tokens", type=positive, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--repeats", type=positive, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--threads", type=positive, help="default: torch's; ours takes one for models this small")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: seconds of cores, where others use them too (one thread)"
    )
    return parser.parse_args(argv)


def random_model(directory: Path) -> Path:
    """The demo's teacher with random weights."""
    import torch

    from megatron_slim.testing import write_tiny_checkpoint

    return write_tiny_checkpoint(directory, shape_of(read_config(DEMO)), dtype=torch.float32)


def in_turns(
    contestants: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each after a round that does not count, and what that round gave."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found = {name: run() for name, run in contestants.items()}
    for _ in range(repeats):
        for name, run in contestants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}, found


def transformers_greedy(directory: Path, new_tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """Transformers' `generate` with its cache, of prompts of one length."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens

    return run


def compare(args: argparse.Namespace, decoder: Decoder, theirs: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """All contestants on a batch of prompts."""
    from megatron_slim.generation.greedy import greedy
    from megatron_slim.generation.speculative import speculative

    new = args.new_tokens
    contestants: dict[str, Callable[[], Any]] = {
        "transformers": partial(theirs, prompts),
        "greedy": partial(greedy, decoder, prompts, max_new_tokens=new),
    }
    counts = args.draft_tokens if args.load is not None and decoder.weights.mtp is not None else []
    for count in counts:
        run = partial(speculative, decoder, prompts, max_new_tokens=new, draft_tokens=count)
        contestants[f"speculative_{count}"] = run
    seconds, found = in_turns(contestants, args.repeats, CLOCKS[args.clock])
    assert found["greedy"] == found["transformers"], "other tokens than transformers"
    results: dict[str, Any] = {
        "tokens_per_second": {name: len(prompts) * new / each for name, each in seconds.items()},
        "over_transformers": seconds["transformers"] / seconds["greedy"],
    }
    for count in counts:
        texts = found[f"speculative_{count}"]
        assert [text.tokens for text in texts] == found["greedy"], "other tokens than greedy decoding"
        rounds = [accepted for text in texts for accepted in text.accepted(count)]
        results.setdefault("mean_accepted_length", {})[count] = 1 + statistics.mean(rounds)
        ratio = seconds["greedy"] / seconds[f"speculative_{count}"]
        results.setdefault("speculative_over_greedy", {})[count] = ratio
    return results


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every batch size."""
    import torch

    from megatron_slim.checkpoint.convert import open_checkpoint
    from megatron_slim.evaluation.prompts import read_prompts
    from megatron_slim.generation.decoder import Decoder

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        load = args.load or random_model(Path(folder))
        decoder, theirs = Decoder(open_checkpoint(load), torch.float32), transformers_greedy(load, args.new_tokens)
    largest = max(args.batches)
    if args.prompts is not None:
        prompts = read_prompts(args.prompts, load, number=largest, length=args.prompt_tokens)
    else:
        generator, size = torch.Generator().manual_seed(0), (largest, args.prompt_tokens)
        prompts = torch.randint(0, decoder.shape.vocab_size, size, generator=generator).tolist()
    results: dict[str, Any] = {"clock": args.clock, "threads": torch.get_num_threads(), "new_tokens": args.new_tokens}
    for batch in args.batches:
        results[f"batch_{batch}"] = found = compare(args, decoder, theirs, prompts[:batch])
        print(
            f"batch {batch}: " + ", ".join(f"{name} {each:.0f}/s" for name, each in found["tokens_per_second"].items())
        )
        for name, value in found.items():
            if name != "tokens_per_second":
                print(f"  {name}: {value}")
    return results


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_args(argv)
    run_tool(lambda: measure(args), as_json=args.json)


if __name__ == "__main__":
    main()
