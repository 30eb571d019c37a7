"""Cached decoding, plain and speculative, against transformers' `generate` and against models without caches.

All in fp32 with random weights: the two best logits of a step differ by 1e-4 or more, results of kernels by a few 1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_slim.architecture.rope import Yarn
from megatron_slim.architecture.shape import FAMILIES, FULL_ATTENTION, LINEAR_ATTENTION, ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist, open_checkpoint
from megatron_slim.generation.decoder import Decoder
from megatron_slim.generation.greedy import greedy
from megatron_slim.generation.speculative import draft_everywhere, speculative
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from tests.generation import reference
from tests.generation.models import prompts
from tests.sizes import ODD

LENGTHS = (5, 1, 70, 5, 2)  # one alone, two alike, one of more than a segment
NEW, DRAFTS = 24, 5

SHAPES = {
    **{family: tiny_shape(family) for family in FAMILIES},
    "odd, grouped heads, gates that do not add up to 1": tiny_shape(
        **ODD, linear_conv_kernel_dim=3, moe_shared_expert_intermediate_size=80
    ),
    "many experts, of which few are visited, and YaRN": tiny_shape(
        num_moe_experts=24, rotary_percent=0.5, kv_channels=32, rope_scaling=Yarn(4.0, 32, 1.3)
    ),
    "Qwen3-MoE, one key-value head, gates that do not add up to 1": tiny_shape(
        "qwen3_moe", num_layers=3, num_query_groups=1, num_moe_experts=7, moe_router_topk=3, norm_topk_prob=False
    ),
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelShape]:
    shape = SHAPES[request.param]
    path = tmp_path_factory.mktemp("model") / "hf"
    return write_tiny_checkpoint(path, shape, seed=3, dtype=torch.float32), shape


def decoder(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(open_checkpoint(path), dtype)


@pytest.mark.one_case
def test_texts_are_those_of_transformers(model: tuple[Path, ModelShape]) -> None:
    path, shape = model
    given, theirs, ours = prompts(shape.vocab_size, LENGTHS), reference.Transformers(path), decoder(path)
    wanted = [theirs.generate(prompt, NEW, eos_token_id=None) for prompt in given]
    assert greedy(ours, given, max_new_tokens=NEW) == wanted
    assert [greedy(ours, [prompt], max_new_tokens=NEW)[0] for prompt in given] == wanted
    if shape.mtp_num_layers:
        for count in (1, 2, DRAFTS):
            found = speculative(ours, given, max_new_tokens=NEW, draft_tokens=count)
            assert [text.tokens for text in found] == wanted


def test_hidden_states_are_the_same_in_pieces_of_any_length(model: tuple[Path, ModelShape]) -> None:
    path, shape = model
    tokens, ours = torch.tensor(prompts(shape.vocab_size, (90,))), decoder(path)
    with torch.no_grad():
        wanted = reference.Transformers(path, torch.float64).trunk(tokens[0])
    for length in (1, 7, 90):
        cache, found = ours.new_cache(1, 90, drafting=False), []
        with ours.running(1):
            for piece in tokens.split(length, 1):
                found.append(ours.read(piece, cache))
                cache.keep(None, piece.shape[1])
        # Seen: up to 5.4e-5 of values of up to 4, and of transformers in fp32 as much; on processors without AVX-512.
        torch.testing.assert_close(torch.cat(found, 1)[0].double(), wanted, rtol=0, atol=2e-4)


def test_rejected_tokens_leave_no_trace(model: tuple[Path, ModelShape]) -> None:
    path, shape = model
    ours, batch = decoder(path), 3
    tokens = torch.tensor(prompts(shape.vocab_size, (20,) * batch))
    cache, plain = (ours.new_cache(batch, 30, drafting=False) for _ in range(2))
    with ours.running(batch):
        for each in (cache, plain):
            ours.read(tokens[:, :10], each)
            each.keep(None, 10)
        ours.read(tokens[:, 10:16], cache)
        cache.keep([1, 4, 6], 6)
        assert cache.lengths == [11, 14, 16]
        for row, kept in enumerate(cache.lengths):
            alone = plain.select([row])
            ours.read(tokens[row : row + 1, 10:kept], alone)
            alone.keep(None, kept - 10)
            wanted = ours.read(tokens[row : row + 1, 17:20], alone)
            found = ours.read(tokens[row : row + 1, 17:20], cache.select([row]))
            # Seen: up to 3e-5 where nothing is left; a token too many in a state moves the result by 3 or more.
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_end_of_text(tmp_path: Path) -> None:
    shape = SHAPES["qwen3_next"]
    path = write_tiny_checkpoint(tmp_path, shape, seed=3, dtype=torch.float32)
    given, ours, theirs = prompts(shape.vocab_size, LENGTHS), decoder(path), reference.Transformers(path)
    texts = greedy(ours, given, max_new_tokens=NEW)
    ends = {texts[0][7], texts[2][3]}
    found = greedy(ours, given, max_new_tokens=NEW, eos=ends)
    assert found == [theirs.generate(prompt, NEW, eos_token_id=sorted(ends)) for prompt in given]
    assert len(found[0]) <= 8 and len(found[2]) <= 4
    drafted = speculative(ours, given, max_new_tokens=NEW, draft_tokens=DRAFTS, eos=ends)
    assert [text.tokens for text in drafted] == found
    assert len(drafted[2].accepted(DRAFTS)) == 0  # no draft of five tokens fits into four


def test_both_formats_give_the_same_texts(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "hf", SHAPES["qwen3_next"], seed=3)
    hf_to_torch_dist(path, tmp_path / "dist")
    given = prompts(128, LENGTHS)
    hf, dist = (
        speculative(decoder(each), given, max_new_tokens=NEW, draft_tokens=3) for each in (path, tmp_path / "dist")
    )
    assert hf == dist


def test_bf16_runs_and_is_near(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "hf", SHAPES["qwen3_next"], float32=("A_log", "dt_bias"))
    tokens, found = torch.tensor(prompts(128, (30,))), []
    for dtype in (torch.float32, torch.bfloat16):
        ours = decoder(path, dtype)
        with ours.running(1):
            found.append(ours.read(tokens, ours.new_cache(1, 30, drafting=False)).float())
        assert len(speculative(ours, tokens.tolist(), max_new_tokens=8, draft_tokens=2)[0].tokens) == 8
    assert not found[0].equal(found[1])
    # Eight bits of mantissa, over four layers: seen 0.02 of the norm.
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of few tokens, whose random drafts are right now and then."""
    shape = tiny_shape(vocab_size=12, num_layers=2, layer_types=(LINEAR_ATTENTION, FULL_ATTENTION))
    return write_tiny_checkpoint(tmp_path_factory.mktemp("drafting") / "hf", shape, seed=5, dtype=torch.float32)


@pytest.mark.parametrize("theirs", [reference.Transformers, reference.Megatron], ids=["transformers", "megatron"])
def test_drafts_and_rounds_are_those_of_uncached_models(drafting: Path, theirs: Any) -> None:
    model, ours = theirs(drafting), decoder(drafting)
    given = prompts(12, (6, 1, 3), seed=1)
    texts = speculative(ours, given, max_new_tokens=20, draft_tokens=DRAFTS)
    accepted = 0
    for prompt, text in zip(given, texts, strict=True):
        assert reference.greedy(model, prompt, 20) == text.tokens
        everywhere = draft_everywhere(ours, prompt, text.tokens, DRAFTS).tolist()
        wanted = [reference.draft(model, [*prompt, *text.tokens[:n]], DRAFTS) for n in range(1, 21 - DRAFTS)]
        assert everywhere == wanted
        by_hand = reference.rounds(model, prompt, text.tokens, DRAFTS)
        assert [each[0] for each in by_hand] == [each[0] for each in text.rounds]
        fitting = [each for each in by_hand if each[0] + DRAFTS <= 20]
        assert fitting == [each for each in text.rounds if each[0] + DRAFTS <= 20]
        assert [each for _, each in fitting] == text.accepted(DRAFTS)
        accepted += sum(each for _, each in fitting)
    assert accepted > 0  # else the comparison would say little


def test_layers_with_different_numbers_of_experts(tmp_path: Path) -> None:
    """transformers cannot be asked for them."""
    kinds = (LINEAR_ATTENTION, FULL_ATTENTION)
    shape = tiny_shape(vocab_size=12, num_layers=2, layer_types=kinds, experts_per_layer=(12, 3))
    path = write_tiny_checkpoint(tmp_path / "hf", shape, seed=5, dtype=torch.float32)
    given, theirs = prompts(12, (6, 1, 3), seed=1), reference.Megatron(path)
    texts = speculative(decoder(path), given, max_new_tokens=12, draft_tokens=DRAFTS)
    assert [text.tokens for text in texts] == [reference.greedy(theirs, prompt, 12) for prompt in given]


class _BeforeNorm(reference.Transformers):
    """Feeds back what the block gives before its norm."""

    def mtp(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert self.block is not None
        found: list[torch.Tensor] = []
        norm = self.block.layers[0].post_norm
        hook = norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0][0]))
        super().mtp(hidden, tokens)
        hook.remove()
        return found[0]

    def best(self, hidden: torch.Tensor) -> int:
        assert self.block is not None
        return super().best(self.block.layers[0].post_norm(hidden))


def test_the_reference_sees_what_is_fed_back(drafting: Path) -> None:
    """With hidden states from before the norm the first drafts are the same, and later ones are not."""
    texts = [[*prompt, 3] for prompt in prompts(12, (6,) * 12, seed=2)]
    right, wrong = (
        [reference.draft(model, text, DRAFTS) for text in texts]
        for model in (reference.Transformers(drafting), _BeforeNorm(drafting))
    )
    assert [draft[0] for draft in right] == [draft[0] for draft in wrong]
    assert right != wrong
