"""Recording a teacher: what is recorded, in parts, by several processes, and after a kill."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_slim.mcore

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_slim.checkpoint.convert import open_checkpoint
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.errors import CheckpointError, DataError, SlimError
from megatron_slim.sample_set import write_samples
from megatron_slim.teacher_cache import record as recording
from megatron_slim.teacher_cache.cache import TeacherCache, open_cache
from megatron_slim.teacher_cache.names import CACHE, HEAD, RECORDING
from megatron_slim.teacher_cache.record import RecordOptions, record
from megatron_slim.teacher_cache.recording import divide
from megatron_slim.teacher_cache.recording_pass import Recorded
from megatron_slim.teacher_cache.stored_states import decode
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint
from tests.conftest import Outcome
from tests.evaluation.test_perplexity import load
from tests.mtp_oracle import load_mtp, mtp_hidden

SHAPE = tiny_shape(vocab_size=131)
SAMPLES, LENGTH = 7, 12
TOKENS = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (SAMPLES, LENGTH + 1))
WHOLE = Recorded.whole(TOKENS, {"data": "drawn"})
# Random weights guess.
OPTIONS = RecordOptions(kind="fp32", dtype=torch.float32, micro_batch_size=2, check_teacher=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher"
    return write_tiny_checkpoint(path, SHAPE, seed=1, dtype=torch.float32)


def recorded(model: Path, save: Path, **changed: Any) -> TeacherCache:
    found = record(open_checkpoint(model), WHOLE, save, replace(OPTIONS, **changed))
    assert found is not None
    return found


def states(cache: TeacherCache) -> torch.Tensor:
    """[samples, heads, positions, hidden]."""
    content = torch.stack([cache.read(index, cache.heads) for index in range(len(cache.samples))])
    return decode(content, cache.kind, cache.hidden_size)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """In shards of three, two and two samples."""
    return recorded(model, tmp_path_factory.mktemp("whole") / "cache", round_tokens=3 * LENGTH)


def test_states_are_those_of_transformers(model: Path, whole: TeacherCache) -> None:
    """Of both heads, in fp32: two implementations differ by a few ulps of numbers of about 1."""
    other, ids = load(model), torch.from_numpy(TOKENS[:, :-1])
    with torch.no_grad():
        main = other.model(ids).last_hidden_state
        mtp = mtp_hidden(load_mtp(other), main, ids)
    found = states(whole)
    assert found.shape == (SAMPLES, 2, LENGTH, SHAPE.hidden_size)
    torch.testing.assert_close(found[:, 0], main, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 1, :-1], mtp, rtol=1e-4, atol=1e-5)
    head = load_file(whole.path / HEAD)["weight"]
    assert torch.equal(head, other.lm_head.weight)


def test_what_a_cache_says(whole: TeacherCache) -> None:
    assert [each.samples for each in whole.shards] == [range(3), range(3, 5), range(5, 7)]
    assert np.array_equal(whole.samples.tokens, TOKENS) and whole.samples.loss_mask.all()
    assert not whole.samples.documents and whole.samples.about == {"data": "drawn"}
    assert whole.samples.position_ids.tolist() == [list(range(LENGTH))] * SAMPLES
    assert whole.figures["kl_of_rounding"] == whole.figures["largest_kl_of_rounding"] == 0
    assert whole.read(4, 1).shape == (1, LENGTH, 4 * SHAPE.hidden_size)
    assert read_shape(whole.path) == SHAPE  # for planning
    whole.verify_head()
    whole.samples.verify(SHAPE.vocab_size)


def test_another_process_gets_the_path(whole: TeacherCache) -> None:
    whole.read(0, 1)  # opens a file
    sent = pickle.dumps(whole)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).read(5, 2), whole.read(5, 2))


def test_shards_and_processes_change_no_state(model: Path, whole: TeacherCache, tmp_path: Path) -> None:
    one = recorded(model, tmp_path / "one", micro_batch_size=1)
    assert len(one.shards) == 1
    # Products of other numbers of rows: the last bit.
    torch.testing.assert_close(states(one), states(whole), rtol=1e-4, atol=1e-5)
    run_distributed(2, record_rank, str(model), str(tmp_path / "two"), initialise=False)
    two, other = open_cache(tmp_path / "two"), recorded(model, tmp_path / "other", round_tokens=2 * LENGTH)
    assert [each.samples for each in two.shards] == [each.samples for each in other.shards]
    assert files(two.path) == files(other.path)


def record_rank(model: str, save: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(THREADS)
    found = record(
        open_checkpoint(model), WHOLE, Path(save), replace(OPTIONS, round_tokens=2 * LENGTH, rank=rank, world=world)
    )
    assert (found is None) == (rank > 0)


THREADS = torch.get_num_threads()
KILLED = r"exit code -9|SIGKILL|died"


def killed_at_an_event(model: str, save: str, number: int) -> int:
    """Record and be killed at the n-th operation on the directory; returns how many there were if it is later."""
    events = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(save):
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    torch.set_num_threads(THREADS)
    recorded(Path(model), Path(save), round_tokens=3 * LENGTH)
    return events


def check_kills(model: Path, whole: TeacherCache, folder: Path, numbers: Callable[[int], list[int]]) -> None:
    (total,) = run_distributed(1, killed_at_an_event, str(model), str(folder / "all"), 10**9, initialise=False)
    assert total > 30
    for number in numbers(total):
        save = folder / f"cache-{number}"
        with pytest.raises(RuntimeError, match=KILLED):
            run_distributed(1, killed_at_an_event, str(model), str(save), number, initialise=False)
        finished = (save / CACHE).exists()  # then it was killed while it tidied up
        if not finished:
            recorded(model, save, round_tokens=3 * LENGTH)
        open_cache(save)
        found = files(save)
        for name in (RECORDING, f".{CACHE}.lock") if finished else ():
            found.pop(name, None)
        assert found == files(whole.path), f"killed at operation {number}"


def test_killed_and_taken_up(model: Path, whole: TeacherCache, tmp_path: Path) -> None:
    check_kills(model, whole, tmp_path, lambda total: [total // 2])


@pytest.mark.slow
def test_killed_anywhere_and_taken_up(model: Path, whole: TeacherCache, tmp_path: Path) -> None:
    check_kills(model, whole, tmp_path, lambda total: [*range(1, total + 1, 3)])


class Broken(Exception):
    pass


@pytest.fixture
def unfinished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recording that ended after its first shard."""
    finish, count = recording.RecordingPass.finish, 0

    def stop(self: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise Broken
        finish(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recording.RecordingPass, "finish", stop)
        with pytest.raises(Broken):
            recorded(model, tmp_path / "cache", round_tokens=3 * LENGTH)
    yield tmp_path / "cache"


def test_what_is_finished_stays(model: Path, whole: TeacherCache, unfinished: Path) -> None:
    kept = (unfinished / "states-00000.bin").stat()
    with pytest.raises(DataError, match="was not finished; run the same megatron-slim record again"):
        open_cache(unfinished)
    seen: list[tuple[int, ...]] = []
    # Without a number of tokens shards are those that it was begun with.
    recorded(model, unfinished, announce=lambda *sizes: seen.append(sizes))
    assert seen == [(4 * LENGTH, 4 * 2 * LENGTH * 4 * SHAPE.hidden_size, 2)]
    assert (unfinished / "states-00000.bin").stat().st_mtime_ns == kept.st_mtime_ns
    assert files(unfinished) == files(whole.path)


def test_states_that_were_lost_are_recorded_again(model: Path, whole: TeacherCache, unfinished: Path) -> None:
    (unfinished / "states-00000.bin").unlink()
    recorded(model, unfinished)
    assert files(unfinished) == files(whole.path)


def test_a_shard_whose_description_is_damaged_is_recorded_again(
    model: Path, whole: TeacherCache, unfinished: Path
) -> None:
    (unfinished / "states-00000.json").write_text("{")
    recorded(model, unfinished)
    assert files(unfinished) == files(whole.path)


@pytest.mark.parametrize("content", ["{", "[]", '{"inputs": {}}'])
def test_a_damaged_beginning(model: Path, unfinished: Path, content: str) -> None:
    (unfinished / RECORDING).write_text(content)
    with pytest.raises(
        SlimError, match=r"not a description of a recording \(.*\); remove the directory and record again"
    ):
        recorded(model, unfinished)


def test_other_inputs_are_refused(model: Path, unfinished: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", SHAPE, seed=2, dtype=torch.float32)
    for path, changed, what in (
        (model, {"kind": "bf16"}, "kind fp32, this run has bf16"),
        (model, {"micro_batch_size": 1}, "micro_batch_size 2, this run has 1"),
        (other, {}, "was begun with teacher "),
        (
            model,
            {"round_tokens": 24},
            "with --shard-tokens 36, this run has --shard-tokens 24; leave",
        ),
    ):
        with pytest.raises(SlimError, match=what):
            recorded(path, unfinished, **changed)
    assert (unfinished / RECORDING).is_file()
    (unfinished / "mine.txt").touch()
    with pytest.raises(SlimError, match=r"holds something else \(mine.txt\)"):
        recorded(model, unfinished)


def test_sample_sets_and_caches_without_a_description_are_spared(model: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    write_samples(samples, WHOLE.tokens, WHOLE.loss_mask, WHOLE.position_ids, documents=False, about={})
    cache = recorded(model, tmp_path / "cache").path
    (cache / CACHE).unlink()
    for path in (samples, cache):
        before = files(path)
        with pytest.raises(SlimError, match=r"holds something else \((loss_mask|config)"):
            recorded(model, path)
        assert files(path) == before
    for file in cache.glob("states-*"):  # so is one that was killed before it had begun
        file.unlink()
    assert recorded(model, cache).path == cache


def test_the_planner_finds_the_teacher_in_a_cache(whole: TeacherCache) -> None:
    found = read_shape(whole.path)
    assert (found.hidden_size, found.vocab_size, found.mtp_num_layers) == (whole.hidden_size, SHAPE.vocab_size, 1)


def test_no_room_for_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "bytes_to_write", lambda *_: 10**18)
    with pytest.raises(SlimError, match=r"needs 1000000000.0 GB, .* are free"):
        recorded(model, tmp_path / "cache")
    assert not (tmp_path / "cache" / RECORDING).exists()


def test_a_teacher_that_guesses_or_is_broken(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"guessing gives 4.875; .* or pass --no-teacher-check"):
        recorded(model, tmp_path / "guesses", check_teacher=True)
    broken = write_tiny_checkpoint(tmp_path / "broken", SHAPE, seed=1, dtype=torch.float32)
    from safetensors.torch import save_file

    (file,) = (each for each in broken.glob("*.safetensors") if "model.norm.weight" in load_file(each))
    tensors = load_file(file)
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="hidden states are not finite; its weights are broken"):
        recorded(broken, tmp_path / "cache")


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 1e-4), ("fp8", 2e-2)])
def test_rounded_states(model: Path, whole: TeacherCache, tmp_path: Path, kind: str, bound: float) -> None:
    """The KL of rounding that a cache states is that of its states, in fp64; of random weights it is large."""
    cache = recorded(model, tmp_path / "cache", kind=kind)
    weight = load_file(cache.path / HEAD)["weight"].double()
    rows = states(whole)[:, 0].double(), states(cache)[:, 0].double()
    exact, rounded = ((each @ weight.T).log_softmax(-1) for each in rows)
    divergence = ((exact - rounded) * exact.exp()).sum(-1)
    assert 0 < cache.figures["kl_of_rounding"] < bound
    assert cache.figures["kl_of_rounding"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert cache.figures["largest_kl_of_rounding"] == pytest.approx(float(divergence.max()), rel=1e-3)


def test_what_is_measured_does_not_depend_on_the_batch(model: Path, tmp_path: Path) -> None:
    """The first tokens that count of a shard, in whichever sample they are: the first has none here."""
    mask = np.ones((SAMPLES, LENGTH), np.uint8)
    mask[0], mask[2, 3:] = 0, 0
    samples = replace(WHOLE, loss_mask=mask)
    found = []
    for size in (1, 3, 7):
        options = replace(OPTIONS, kind="fp8", micro_batch_size=size)
        cache = record(open_checkpoint(model), samples, tmp_path / str(size), options)
        assert cache is not None and cache.figures["measured_tokens"] == mask.sum()
        found.append([cache.figures[name] for name in ("teacher_loss", "kl_of_rounding", "largest_kl_of_rounding")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)
    mask[:] = 0
    cache = record(open_checkpoint(model), samples, tmp_path / "none", OPTIONS)
    assert cache is not None and cache.figures["measured_tokens"] == mask.size


def test_documents_do_not_see_each_other(model: Path, tmp_path: Path) -> None:
    """States of two documents in one sample are those of each alone; without MTP's last position, which sees none."""
    first, second = 5, LENGTH - 5
    positions = np.concatenate([np.arange(first), np.arange(second)])[None].repeat(SAMPLES, 0)
    mask = np.ones((SAMPLES, LENGTH))
    mask[:, first - 1] = 0
    packed = record(open_checkpoint(model), Recorded(TOKENS, mask, positions, True, {}), tmp_path / "packed", OPTIONS)
    assert packed is not None and packed.samples.documents
    for start, stop in ((0, first), (first, LENGTH)):
        alone = Recorded.whole(TOKENS[:, start : stop + 1], {})
        cache = record(open_checkpoint(model), alone, tmp_path / f"alone-{start}", OPTIONS)
        assert cache is not None
        torch.testing.assert_close(
            states(packed)[:, :, start : stop - 1], states(cache)[:, :, :-1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", ["states-00001.bin", HEAD])
def test_damage_is_found(model: Path, tmp_path: Path, name: str) -> None:
    cache = recorded(model, tmp_path / "cache", round_tokens=3 * LENGTH)
    content = bytearray((cache.path / name).read_bytes())
    content[-5] ^= 1
    (cache.path / name).write_bytes(content)
    found = open_cache(cache.path)
    found.read(2, 2)
    with pytest.raises(DataError, match="not what was written; record the teacher again"):
        found.read(4, 2)
        found.verify_head()
    (cache.path / name).write_bytes(content[:-1])
    with pytest.raises(DataError):
        open_cache(cache.path).verify_head()


def test_a_cache_that_is_none(model: Path, whole: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a teacher's cache; make one with megatron-slim record"):
        open_cache(tmp_path)
    for key, value, what in (("format", 9, "format 9, this"), ("kind", "int4", "not a desc"), ("shards", 2, "5 of 7")):
        cache = recorded(model, tmp_path / key, round_tokens=3 * LENGTH)
        content = json.loads((cache.path / CACHE).read_text())
        (cache.path / CACHE).write_text(json.dumps(content | {key: value}))
        with pytest.raises(DataError, match=what):
            open_cache(cache.path)


def test_the_command(model: Path, tool: Callable[..., Outcome], tmp_path: Path) -> None:
    data = tmp_path / "set"
    data.mkdir()
    mask = np.random.default_rng(1).integers(0, 2, (SAMPLES, LENGTH))
    positions = np.arange(LENGTH)[None].repeat(SAMPLES, 0)
    given = write_samples(data, TOKENS, mask, positions, documents=True, about={"conversations": 7})
    common = ("--teacher", model, "--no-teacher-check", "--micro-batch-size", 2, "--json")
    found = tool("tools/record_teacher.py", *common, "--data", data, "--save", tmp_path / "a", "--states", "fp8")
    assert found.code == 0, found.stderr
    assert found.json["tokens"] == SAMPLES * LENGTH and found.json["states"] == "fp8"
    assert "84 tokens in 1 shard, " in found.stderr and "about " in found.stderr
    assert open_cache(tmp_path / "a").samples.digests == given.digests
    np.save(tmp_path / "data.npy", TOKENS)
    found = tool("tools/record_teacher.py", *common, "--data", tmp_path / "data.npy", "--save", tmp_path / "b")
    assert found.code == 0 and np.array_equal(open_cache(tmp_path / "b").samples.tokens, TOKENS)
    wrong = (
        (("--data", data, "--save", tmp_path / "a"), "output already exists"),
        (("--data", data, "--save", tmp_path / "c", "--seq-length", 8), "a sample set, of which --seq-length takes no"),
        (("--data", tmp_path / "no", "--save", tmp_path / "c"), "no such data"),
        (("--data", data, "--save", tmp_path / "no" / "c"), "parent directory of the output does not exist"),
    )
    for flags, what in wrong:
        assert what in tool("tools/record_teacher.py", *common, *flags).error
    assert not (tmp_path / "c").exists()


def test_samples_are_divided_alike() -> None:
    for samples, most, workers in ((10, 4, 1), (10, 4, 3), (3, 100, 8), (1, 1, 1), (1000, 7, 16)):
        found = divide(samples, most, workers)
        assert [row for part in found for row in part] == list(range(samples))
        sizes = {len(part) for part in found}
        assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
        assert len(found) % workers == 0 or len(found) == samples


def test_from_python(model: Path, whole: TeacherCache, tmp_path: Path) -> None:
    import megatron_slim as slim

    found = slim.record(
        model,
        TOKENS,
        tmp_path / "cache",
        states="fp32",
        dtype=torch.float32,
        micro_batch_size=2,
        shard_tokens=3 * LENGTH,
        check_teacher=False,
    )
    assert found["tokens"] == SAMPLES * LENGTH and found["bytes"] == SAMPLES * 2 * whole.sample_bytes
    for name in ("states-00001.bin", "tokens.npy", HEAD):
        assert (tmp_path / "cache" / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_matrix_is_as_long_as_it_is(model: Path, tool: Callable[..., Outcome], tmp_path: Path) -> None:
    """In positions, which are one fewer than tokens."""
    for width, more, message in (
        (1, (), "samples of one token leave nothing to predict"),
        (16, ("--seq-length", 16), "has samples of 15, --seq-length is 16; leave it out"),
    ):
        np.save(tmp_path / "tokens.npy", np.zeros((3, width), dtype=np.int64))
        given = ("--teacher", model, "--data", tmp_path / "tokens.npy", "--save", tmp_path / "cache", *more)
        assert tool("tools/record_teacher.py", *given).error.endswith(message)
        assert not (tmp_path / "cache").exists()
