"""``--sft``: conversations are packed before a run, once, and the run is that on the sample set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import megatron_slim.mcore

import pytest

from megatron_slim.chats import ChatOptions, make_samples
from megatron_slim.command_line import DROP
from megatron_slim.errors import DataError, SlimError
from megatron_slim.sample_set import is_sample_set, open_samples
from megatron_slim.testing import reserved_port, tiny_shape
from megatron_slim.training.chat_data import make_sample_sets
from megatron_slim.training.pretrain import main
from megatron_slim.training.spec import resolve
from tests.chat_templates import CHATML, CHATS, THINKING, WITH_TOOLS, message, without_markers, write_tokenizer
from tests.training.conftest import SIZES, Workplace

ROOT = Path(__file__).resolve().parents[2]
VOCAB, SEQ = 288, 256
TERMS = ("lm loss", "logits distillation loss", "teacher lm loss", "mtp lm loss", "mtp distillation loss", "grad-norm")
FLAGS = f"--micro-batch-size 1 --seq-length {SEQ} --eval-iters 0 --train-iters 2".split()
FLAGS += "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0".split()


@pytest.fixture(scope="module")
def models(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    sizes = SIZES | {"vocab_size": VOCAB}
    student = tiny_shape(**sizes, hidden_size=48, num_moe_experts=4)
    return workplace.with_models(tmp_path_factory.mktemp("chats"), student, tiny_shape(**sizes))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", without_markers(CHATML))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(chat) for chat in (*CHATS.values(), *WITH_TOOLS.values()) for _ in range(4)))
    return path


def test_sft_is_the_run_on_the_sample_set(models: Workplace, tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """Two ranks, of which one packs the file; a run that follows finds what was made."""
    flags = [*FLAGS, "--sft", "--train-data-path", str(corpus), "--tokenizer-model", str(tokenizer)]
    found = models.train("sft", 2, *flags, "--tokenizer-type", "HuggingFaceTokenizer")
    (made,) = [path for path in tmp_path.iterdir() if is_sample_set(path)]
    assert made.name.startswith("chats.jsonl-")
    before = (made / "tokens.npy").stat().st_mtime_ns
    make_samples([corpus], tmp_path / "set", ChatOptions(tokenizer, SEQ))
    assert open_samples(tmp_path / "set").digests == open_samples(made).digests
    expected = models.train("sft-set", 2, *FLAGS, "--train-data-path", str(tmp_path / "set"))
    again = models.train("sft-again", 1, *flags)
    assert (made / "tokens.npy").stat().st_mtime_ns == before
    for term in TERMS:
        assert found[term] == expected[term], term
        assert again[term] == pytest.approx(found[term], rel=2e-5), term
    # A sample set with --sft is used as it is.
    of_set = models.train("sft-of-set", 2, *FLAGS, "--sft", "--train-data-path", str(tmp_path / "set"))
    assert all(of_set[term] == expected[term] for term in TERMS)


@pytest.mark.slow
def test_where_sets_are_made(models: Workplace, tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """In --data-cache-path; one for each file, length and tokenizer; mixed with sets, and validated on one."""
    cache, other = tmp_path / "deep" / "cache", tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().splitlines()[0])
    make_samples([corpus], tmp_path / "set", ChatOptions(tokenizer, SEQ))
    flags = [*FLAGS, "--sft", "--data-cache-path", str(cache), "--tokenizer-model", str(tokenizer), "--eval-iters", "1"]
    parts = ["--train-data-path", "0.5", str(corpus), "0.2", str(other), "0.3", str(tmp_path / "set")]
    parts += ["--valid-data-path", str(other), "--test-data-path", str(other)]
    models.train("sft-cache", 1, *flags, *parts)
    sets = sorted(path.name for path in cache.iterdir() if is_sample_set(path))
    assert [name.rsplit("-", 1)[0] for name in sets] == ["chats.jsonl", "other.jsonl"]
    models.train("sft-longer", 1, *flags, "--seq-length", "512", "--train-data-path", str(corpus), *parts[-4:])
    assert len([path for path in cache.iterdir() if is_sample_set(path)]) == 4


def test_flags_of_packing(models: Workplace, tmp_path: Path) -> None:
    """The set is that which preprocess makes with the same flags, under a name of its own."""
    tokenizer, corpus = write_tokenizer(tmp_path / "thinking", without_markers(THINKING)), tmp_path / "chats.jsonl"
    corpus.write_text("\n".join(map(json.dumps, CHATS.values())))
    base = "--micro-batch-size 1 --global-batch-size 4 --train-iters 1 --seq-length 64 --sft --eval-iters 0 --lr 1e-3 "
    base += f"--pretrained-checkpoint {models.student} --tokenizer-model {tokenizer} --train-data-path {corpus}"
    made: dict[str, dict[str, str]] = {}
    for flags, options in (
        ("--unroll", ChatOptions(tokenizer, 64, unroll=True)),
        ("--unroll --too-long drop", ChatOptions(tokenizer, 64, too_long=DROP, unroll=True)),
    ):
        spec = resolve(f"{base} {flags}".split())
        make_sample_sets(spec.args)
        (directory,) = spec.args.chats
        make_samples([corpus], tmp_path / flags, options)
        made[directory.name] = dict(open_samples(directory).digests)
        assert made[directory.name] == open_samples(tmp_path / flags).digests
    one, other = made.values()
    assert one != other
    with pytest.raises(DataError, match="or --skip-bad-lines"):
        make_sample_sets(resolve(base.split()).args)
    without = [word for word in base.split() if word != "--sft"]
    for flags in (["--unroll"], ["--too-long", "drop"]):
        with pytest.raises(DataError, match=f"{flags[0]} is for conversations, with --sft; leave it out"):
            resolve([*without, *flags])


REFUSED: dict[str, tuple[str, str]] = {
    "no tokenizer": ("--train-data-path chats.jsonl", "--sft needs a tokenizer with a chat template; give --tokenizer"),
    "no file": ("--train-data-path no.jsonl --tokenizer-model t", "no.jsonl: no such file"),
    "no conversations": ("--train-data-path corpus", "--sft finds no conversations in the data; give .jsonl files or"),
    "documents too": (
        "--train-data-path 1 chats.jsonl 1 corpus --tokenizer-model t",
        ": is a sample set, which does not go with documents such as corpus; give data of one kind",
    ),
    "pairs": (
        "--train-data-path chats.jsonl --tokenizer-model t --micro-batch-size 2",
        "--micro-batch-size 2: documents that do not see each other go through layers one sample at a time",
    ),
    "marks": (
        "--train-data-path chats.jsonl --tokenizer-model t --eod-mask-loss --null-tokenizer-eod-id 0",
        "--eod-mask-loss does not go with a sample set: samples say themselves which tokens count",
    ),
    "a bad line": (
        "--train-data-path bad.jsonl --tokenizer-model t",
        "bad.jsonl:2: has no list of messages under 'messages'",
    ),
    "another tokenizer": (
        "--train-data-path chats.jsonl --tokenizer-model t --tokenizer-type NullTokenizer",
        "--tokenizer-type cannot be given",
    ),
    "another vocabulary": (
        "--train-data-path chats.jsonl --tokenizer-model t --pretrained-checkpoint small",
        "is beyond the vocabulary of 120",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    models: Workplace,
    workplace: Workplace,
    tokenizer: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    options, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    (tmp_path / "bad.jsonl").write_text(corpus.read_text().splitlines()[0] + '\n{"text": "a"}')
    for link, target in {"t": tokenizer, "student": models.student, "small": workplace.student}.items():
        (tmp_path / link).symlink_to(target)
    argv = f"{' '.join(FLAGS)} --global-batch-size 4 --lr 1e-3 --sft --pretrained-checkpoint student {options}"
    with pytest.raises(SlimError) as caught:
        main(argv.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)
    made = [path.name for path in tmp_path.iterdir() if is_sample_set(path)]
    assert made == [] or name == "another vocabulary"  # which only the tokens show


@pytest.mark.slow
def test_by_the_command_line(models: Workplace, tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """In processes of its own, from JSON lines to a checkpoint; and one line where there is nothing to train on."""
    words = ["--student", models.student, "--teacher", models.teacher, "--data", corpus, "--save", tmp_path / "run"]
    words += ["--train-iters", 2, "--global-batch-size", 2, "--seq-length", SEQ, "--eval-iters", 0, "--log-interval", 1]
    words += ["--nproc-per-node", 2, "--no-teacher-check", "--sft", "--tokenizer-model", tokenizer]
    command = [sys.executable, "-m", "megatron_slim", "distill", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = []
    for text in (None, json.dumps({"messages": [message("user", "a")]})):
        if text is not None:
            corpus.write_text(text)
        with reserved_port() as port:
            env["MASTER_PORT"] = str(port)
            found.append(subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False))
    done, refused = found
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "iter_0000002").is_dir()
    assert any(map(is_sample_set, (tmp_path / "run" / "data-cache").iterdir()))
    assert " of them in the loss; truncated: " in done.stdout + done.stderr
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "no conversation in which a token counts; without an answer that fits: 1" in line
