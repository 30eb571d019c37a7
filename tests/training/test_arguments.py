"""The command line that Megatron gets: shape from config.json, defaults, nothing contradicted."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import megatron_slim.mcore

import pytest
import torch

from megatron_slim.architecture.layer_specs import transformer_config
from megatron_slim.architecture.mtp_keys import without_mtp_keys
from megatron_slim.architecture.parallelism import padded_vocab_size
from megatron_slim.checkpoint.convert import hf_to_torch_dist
from megatron_slim.checkpoint.described import read_shape
from megatron_slim.distillation.terms import KD_LAMBDA, MTP_BETA
from megatron_slim.errors import SlimError
from megatron_slim.files import read_json, to_json
from megatron_slim.testing import tiny_hf_config, tiny_shape, write_tiny_checkpoint
from megatron_slim.training import build, pretrain
from megatron_slim.training.arguments import complete_argv, shape_directory
from megatron_slim.training.slim_arguments import add_slim_arguments, schedule_of

SHAPE = tiny_shape(num_layers=4, layer_types=("linear_attention", "full_attention") * 2, vocab_size=120)


@pytest.fixture
def config_directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(SHAPE)))
    return tmp_path


def value_of(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_the_shape_becomes_megatrons_flags(config_directory: Path) -> None:
    argv, shape = complete_argv(["--hf-config", str(config_directory)])
    assert shape == SHAPE
    assert value_of(argv, "--num-layers") == "4" and value_of(argv, "--vocab-size") == "120"
    # Megatron's count of operations needs the MTP block, a full-attention layer, at the end of the pattern.
    assert value_of(argv, "--linear-attention-freq") == "[1,0,1,0,0]"
    assert "--attention-output-gate" in argv and "--untie-embeddings-and-output-weights" in argv


def test_flags_of_what_a_family_lacks_are_not_given_and_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(tiny_hf_config(tiny_shape("qwen3_moe"))))
    given = ["--hf-config", str(tmp_path)]
    argv, _ = complete_argv(given)
    assert value_of(argv, "--num-experts") == "8" and value_of(argv, "--rotary-percent") == "1.0"
    assert not [word for word in argv if word.startswith(("--linear", "--experimental", "--mtp", "--moe-shared"))]
    for flag in ("--attention-output-gate", "--apply-layernorm-1p", "--mtp-num-layers=1", "--linear-key-head-dim=16"):
        assert flag not in argv
        with pytest.raises(SlimError, match=f"{flag.split('=')[0]} cannot be given"):
            complete_argv([*given, flag])


def test_what_config_json_decides_cannot_be_given(config_directory: Path) -> None:
    with pytest.raises(SlimError, match=r"--hidden-size, --num-layers cannot be given; the model's shape comes from"):
        complete_argv(["--hf-config", str(config_directory), "--num-layers", "3", "--hidden-size=64"])
    for flag in ("--use-rope-scaling", "--rotary-scaling-factor=4", "--position-embedding-type=yarn", "--rope-type"):
        with pytest.raises(SlimError, match=f"{flag.split('=')[0]} cannot be given"):
            complete_argv(["--hf-config", str(config_directory), flag])


def test_defaults_give_way_to_the_command_line(config_directory: Path) -> None:
    argv, _ = complete_argv(["--hf-config", str(config_directory), "--moe-aux-loss-coeff", "0.5"])
    assert "--moe-router-load-balancing-type=global_aux_loss" in argv
    assert not [word for word in argv if word.startswith("--moe-aux-loss-coeff")]
    argv, _ = complete_argv(["--hf-config", str(config_directory), "--moe-router-load-balancing-type=none"])
    assert "--moe-router-load-balancing-type=global_aux_loss" not in argv
    assert f"--moe-aux-loss-coeff={SHAPE.router_aux_loss_coef}" in argv


def test_where_the_shape_comes_from(tmp_path: Path) -> None:
    """--hf-config, else a run to resume, else the checkpoint to start from, of either format."""
    hf = write_tiny_checkpoint(tmp_path / "hf", tiny_shape(), dtype=torch.float32)
    hf_to_torch_dist(hf, tmp_path / "run")
    start = ["--pretrained-checkpoint", str(hf)]
    assert shape_directory([*start]) == hf
    assert shape_directory([*start, "--load", str(tmp_path / "not-yet")]) == hf
    assert shape_directory([*start, f"--load={tmp_path / 'run'}"]) == tmp_path / "run" / "hf"
    shutil.copytree(tmp_path / "run" / "hf", tmp_path / "begun" / "hf")
    assert shape_directory([*start, "--load", str(tmp_path / "begun")]) == hf  # that one has saved nothing
    assert shape_directory([*start, "--load", str(tmp_path / "run"), "--hf-config", "x"]) == Path("x")
    with pytest.raises(SlimError, match="no model shape"):
        shape_directory(["--lr", "1"])


def test_a_published_config_does_not_say_mtp_but_its_tensors_do(tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "hf", tiny_shape())
    (path / "config.json").write_text(to_json(without_mtp_keys(read_json(path / "config.json"))))
    assert read_shape(path).mtp_num_layers == 1
    for flag, depth in (([], 1), (["--without-mtp"], 0)):
        _, shape = complete_argv(["--pretrained-checkpoint", str(path), *flag])
        assert shape.mtp_num_layers == depth


def test_schedules_of_the_paper_are_the_defaults() -> None:
    args = add_slim_arguments(argparse.ArgumentParser()).parse_args([])
    kd_lambda, mtp_beta = schedule_of(KD_LAMBDA, args), schedule_of(MTP_BETA, args)
    assert (kd_lambda.at(0, 10), kd_lambda.at(9, 10)) == (1.0, 0.75)
    assert (mtp_beta.at(0, 10), mtp_beta.at(9, 10)) == pytest.approx((0.3, 0.1))
    assert (kd_lambda.shape, mtp_beta.shape) == ("linear", "cosine")


@pytest.mark.parametrize(("vocab", "padded"), [(151936, 151936), (120, 128), (128, 128), (129, 256)])
def test_the_vocabulary_is_padded_alike_everywhere(vocab: int, padded: int) -> None:
    assert padded_vocab_size(tiny_shape(vocab_size=vocab)) == padded


def test_load_balancing_keeps_its_weight_under_data_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four ranks has a quarter of the global loss, and averaging gradients divides by four once more."""
    monkeypatch.setattr(build.parallel_state, "get_data_parallel_world_size", lambda: 4)
    several = {"moe_router_load_balancing_type": ["global_aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]}
    assert build.load_balancing_fields(transformer_config(SHAPE)) == {"moe_aux_loss_coeff": 0.004}
    config = transformer_config(SHAPE, moe_router_load_balancing_type="seq_aux_loss")
    assert build.load_balancing_fields(config) == {"moe_aux_loss_coeff": 0.001}
    assert build.load_balancing_fields(transformer_config(SHAPE, **several)) == {"moe_aux_loss_coeff": [0.4, 0.2]}


def test_megatrons_arguments_are_listed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's own --help fails in argparse, on a bare percent sign."""
    pretrain.main(["--help-megatron"])
    shown = capsys.readouterr().out
    assert "--tensor-model-parallel-size" in shown and "--teacher-load" in shown
