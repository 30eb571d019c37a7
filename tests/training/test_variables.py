"""Variables of a run as Megatron's arguments."""

from __future__ import annotations

import argparse
import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slim.errors import SlimError
from megatron_slim.testing import run_distributed, write_random_samples
from megatron_slim.training import variables

SCRIPT = Path(__file__).resolve().parents[2] / "examples/slimqwen/pretrain_distill.sh"
# Of these a rank knows nothing: they say which processes there are.
PROCESSES = set(variables.GROUPS["processes"]) - {"TP", "PP", "EP"} | {"DRY_RUN"}
GIVEN = {
    "STUDENT": "pruned",
    "HF_CONFIG": "config",
    "TEACHER": "big",
    "TEACHER_CACHE": "recorded",
    "DATA": "0.3 a 0.7 b",
    "VALID_DATA": "v",
    "SAVE": "run",
    "TP": "2",
    "PP": "3",
    "EP": "4",
    "SEQ_LENGTH": "5",
    "MICRO_BATCH_SIZE": "6",
    "GLOBAL_BATCH_SIZE": "7",
    "TRAIN_ITERS": "8",
    "LR": "9.5",
    "MIN_LR": "1e-1",
    "LR_WARMUP_ITERS": "0",
    "SAVE_INTERVAL": "11",
    "EVAL_INTERVAL": "12",
    "EVAL_ITERS": "0",
    "LOG_INTERVAL": "14",
    "PRECISION": "bf16",
    "PROGRESSIVE": "1",
    "CARRY_OPTIMIZER": "1",
    "STAGE_WARMUP": "0",
}


def test_examples_in_the_docs() -> None:
    assert doctest.testmod(variables).failed == 0


def test_every_variable_says_something() -> None:
    assert GIVEN.keys() | {"TOKENS"} == variables.VARIABLES.keys() - PROCESSES
    whole = variables.megatron_arguments(GIVEN)
    for name in GIVEN:
        assert variables.megatron_arguments({key: GIVEN[key] for key in GIVEN.keys() - {name}}) != whole, name
    for name in PROCESSES:
        assert variables.megatron_arguments(GIVEN | {name: "1"}) == whole


def test_what_a_script_is_given_arrives() -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DRY_RUN": "1", **GIVEN}
    done = subprocess.run(["bash", SCRIPT, "--clip-grad", "2"], env=environment, capture_output=True, text=True)
    words = done.stdout.split()
    found = variables.expand(words[words.index("megatron_slim.cli.pretrain") + 1 :], "pretrain")
    assert found == [*variables.megatron_arguments(GIVEN), "--clip-grad", "2"], done.stderr


def test_data_of_a_cache_are_divided_as_others() -> None:
    named, own = (variables.megatron_arguments(given) for given in ({"DATA": "a"}, {"TEACHER_CACHE": "a"}))
    split = [words[words.index("--split") + 1] for words in (named, own)]
    assert split[0] == split[1] and "--data-path" not in own and own[own.index("--teacher-cache") + 1] == "a"


def test_validation_data_leave_a_cache_as_the_data_of_training() -> None:
    words = variables.megatron_arguments({"TEACHER_CACHE": "a cache", "VALID_DATA": "b"})
    assert words[words.index("--train-data-path") + 1 :][:3] == ["a cache", "--valid-data-path", "b"]


def test_a_typing_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        variables.expand(["--teachr", "x", "--", "--lr", "1"], "megatron-slim pretrain")
    assert capsys.readouterr().err == "error: unrecognized arguments: --teachr x; see megatron-slim pretrain --help\n"
    assert variables.expand(["--teachr", "x"], "") == ["--teachr", "x"]  # Megatron's parser says so


def parsed(argv: list[str]) -> dict[str, object]:
    """Body of a rank: what Megatron's parser makes of it."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_slim.training.slim_arguments import add_slim_arguments

    parser = add_slim_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    found = vars(parser.parse_args(argv))
    return {
        name: found[name] for name in ("tensor_model_parallel_size", "lr", "bf16", "train_data_path", "stage_warmup")
    }


def test_megatron_knows_all_of_them() -> None:
    (found,) = run_distributed(1, parsed, variables.megatron_arguments(GIVEN), initialise=False)
    assert [*found.values()] == [2, 9.5, True, ["0.3", "a", "0.7", "b"], 0]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "version: 1\ntarget: {num_layers: 2}\ntrain: {tokens: 1K, seq_length: 32, global_batch_size: 2, lr: 1e-3, "
        "tp: 2, eval_iters: 0, flags: [--kd-loss, jsd, --clip-grad, 2]}\n"
    )
    return file


def test_samples_have_their_own_length(tmp_path: Path) -> None:
    """It is the default, and tokens are counted by it."""
    for name, length in (("cache", 16), ("chats", 24)):
        write_random_samples(tmp_path / name, 4, length, 96)
    cache, chats = ["--teacher-cache", str(tmp_path / "cache")], ["--data", "0.5", str(tmp_path / "chats")]
    more = ["--global-batch-size", "2", "--tokens", "96", "--save", "run"]
    for given, length, steps in (
        ([], "4096", "1"),
        (cache, "16", "3"),
        (chats, "24", "2"),
        ([*cache, *chats], "16", "3"),
        ([*cache, "--seq-length", "8"], "8", "6"),
    ):
        found = variables.expand([*given, *more, "--"])
        assert found[found.index("--seq-length") + 1] == length and found[found.index("--train-iters") + 1] == steps


def test_a_recipe_says_what_is_not_given(recipe: Path) -> None:
    """As the same arguments by hand, in the order of precedence: defaults, recipe, variables, Megatron's own."""
    said = "--tokens 1000 --seq-length 32 --global-batch-size 2 --lr 0.001 --tp 2 --eval-iters 0".split()
    flags = ["--kd-loss", "jsd", "--clip-grad", "2"]
    alone = variables.expand(["--recipe", str(recipe), "--save", "run", "--"])
    assert alone == variables.expand(["--save", "run", *said, "--", *flags])
    assert alone[alone.index("--train-iters") + 1] == "16" == str(-(-1000 // 64))
    given = ["--lr", "0.5", "--global-batch-size", "4"]
    found = variables.expand(["--recipe", str(recipe), *given, "--", "--clip-grad", "3"])
    assert found == variables.expand([*said, *given, "--", *flags, "--clip-grad", "3"])
    assert found[found.index("--train-iters") + 1] == "8"
    steps = variables.expand(["--recipe", str(recipe), "--train-iters", "5", "--"])
    assert steps[steps.index("--train-iters") + 1] == "5"


def test_a_recipe_names_the_recorded_teacher_unless_a_teacher_is_given(tmp_path: Path, recipe: Path) -> None:
    file = tmp_path / "cached.yaml"
    file.write_text(recipe.read_text().replace("tp: 2", "tp: 2, teacher_cache: states"))
    values, _ = variables.with_recipe({"RECIPE": str(file)})
    assert values["TEACHER_CACHE"] == str(tmp_path / "states"), "relative to the recipe, as megatron-slim run has it"
    assert variables.with_recipe({"RECIPE": str(file), "TEACHER_CACHE": "c"})[0]["TEACHER_CACHE"] == "c"
    assert "TEACHER_CACHE" not in variables.with_recipe({"RECIPE": str(file), "TEACHER": "t"})[0]
    file.write_text(recipe.read_text().replace("tp: 2", "tp: 2, record: fp32"))
    assert not {"RECORD", "TEACHER_CACHE"} & variables.with_recipe({"RECIPE": str(file)})[0].keys(), (
        "megatron-slim run records"
    )


def test_the_script_gets_what_a_recipe_says(recipe: Path, tmp_path: Path) -> None:
    """Processes have to be known before there are any. The command line wins, and the environment does not."""
    words = ["--recipe", recipe, "--save", "run", "--student", "s", "--data", "d", "--precision", "fp32", "--lr", "0.5"]
    command = [sys.executable, "-m", "megatron_slim", "distill", *words, "--dry-run", "--clip-grad", "3"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPT.parents[2]), "EP": "2", "LR": "7"}
    environment["TRAIN_ITERS"] = "3"  # the recipe has another length
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    shown = done.stdout.split()
    assert shown[shown.index("--nproc-per-node") + 1] == "4", done.stderr
    found = variables.expand(shown[shown.index("megatron_slim.cli.pretrain") + 1 :])
    given = "--save run --student s --data d --precision fp32 --lr 0.5 --ep 2".split()
    assert found == variables.expand(["--recipe", str(recipe), *given, "--", "--clip-grad", "3"])
    wrong = subprocess.run([*command[:4], "--recipe", "nothing"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: nothing: no such file")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "1K", "--train-iters", "2"), "--tokens with --train-iters; leave one of the two out"),
        (("--tokens", "1K", "--progressive"), "--tokens with --progressive, where every phase has its own; leave one"),
    ],
)
def test_two_lengths_of_a_run(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SlimError) as caught:
        variables.expand([*words, "--"])
    assert message in str(caught.value)


def test_tokens_that_are_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        variables.expand(["--tokens", "many", "--"])
    assert "argument --tokens: 'many' is not a number of tokens, such as 40B or 4e10" in capsys.readouterr().err
