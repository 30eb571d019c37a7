"""Training runs of a tiny teacher and student, by Megatron's own loop."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_slim.architecture.shape import ModelShape
from megatron_slim.checkpoint.convert import hf_to_torch_dist
from megatron_slim.cli.terminal import messages_shown
from megatron_slim.testing import run_distributed, tiny_shape, write_tiny_checkpoint

SIZES = {"num_layers": 4, "layer_types": ("linear_attention", "full_attention") * 2, "vocab_size": 120}
FLAGS = (
    "--seq-length 32 --global-batch-size 4 --train-iters 5 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--log-interval 1 --tensorboard-log-interval 1 --eval-interval 1000 --eval-iters 1 --save-interval 1000 "
    "--use-distributed-optimizer"
).split()


def write_to(log: str) -> None:
    """Append what this process prints to a file."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)


def train(argv: list[str], log: str) -> None:
    """Body of one rank."""
    write_to(log)
    from megatron.training import get_tensorboard_writer

    from megatron_slim.training.pretrain import main

    try:
        with messages_shown("stdout"):
            main(argv)
    except SystemExit as exit_:  # how Megatron ends at --exit-interval
        assert not exit_.code, exit_.code
    if (writer := get_tensorboard_writer()) is not None:
        writer.flush()  # a rank of a test leaves without what else would write the last validation


def refusal(argv: list[str], log: str) -> str:
    """Body of one rank: what its training ends with, nothing if it goes to its end."""
    write_to(log)
    from megatron_slim.errors import SlimError
    from megatron_slim.training.pretrain import main

    try:
        with messages_shown("stdout"):
            main(argv)
    except SlimError as error:
        return str(error)
    return ""


def read_scalars(directory: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_console(log: Path) -> dict[int, dict[str, str]]:
    """What Megatron's lines say by iteration and name, but for times."""
    found: dict[int, dict[str, str]] = {}
    for line in log.read_text().splitlines():
        if match := re.search(r"\] iteration +(\d+)/ *\d+ \| (.*)", line):
            values = dict(part.strip().split(": ") for part in match[2].split(" | ") if ": " in part)
            found[int(match[1])] = {name: text.strip(" |") for name, text in values.items() if "elapsed" not in name}
    return found


# Parts of names of what is measured, and differs between equal runs.
MEASURED = "seconds memory throughput time tflops mfu pipeline".split()


@dataclass(frozen=True)
class Workplace:
    """Teacher and student on disk, and a way to train them."""

    root: Path
    teacher: Path
    student: Path

    def argv(
        self, name: str, *flags: str, distil: bool = True, start: bool = True, check_teacher: bool = False
    ) -> list[str]:
        """The command line of a run; ``flags`` win over the others."""
        argv = [*FLAGS, "--tensorboard-dir", str(self.root / "tensorboard" / name)]
        argv += ["--pretrained-checkpoint", str(self.student)] if start else []
        argv += ["--teacher-load", str(self.teacher)] if distil else []
        argv += [] if check_teacher else ["--no-teacher-check"]
        argv += [] if any("data-path" in flag or "data-args-path" in flag for flag in flags) else ["--mock-data"]
        return [*argv, *flags]

    def log(self, name: str) -> Path:
        """What the ranks of a run print."""
        return self.root / f"{name}.log"

    def new_log(self, name: str) -> Path:
        """`log` of a run that is to begin, without what one of the same name has left.

        pytest may leave a module and come back: its fixtures then run again, in the same workplace.
        """
        shutil.rmtree(self.root / "tensorboard" / name, ignore_errors=True)
        self.log(name).unlink(missing_ok=True)
        return self.log(name)

    def train(self, name: str, ranks: int, *flags: str, **options: bool) -> dict[str, list[float]]:
        """Train on ``ranks`` processes; what tensorboard got, by tag. ``options`` as `argv`."""
        run_distributed(ranks, train, self.argv(name, *flags, **options), str(self.new_log(name)), initialise=False)
        return read_scalars(self.root / "tensorboard" / name)

    def with_models(self, root: Path, student: ModelShape, teacher: ModelShape | None = None) -> Workplace:
        """One in ``root`` with tiny models of other sizes; without a teacher of its own it has this one's."""
        shapes = {"student": student} if teacher is None else {"teacher": teacher, "student": student}
        paths = {
            name: write_tiny_checkpoint(root / name, shape, seed=seed, dtype=torch.float32)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        return dataclasses.replace(self, root=root, **paths)

    def train_from_torch_dist(self, name: str, folder: Path, *flags: str) -> dict[str, list[float]]:
        """`train` on two processes with the student in Megatron's format, each of whose tensors must be found."""
        hf_to_torch_dist(self.student, folder / "student")
        start = ("--pretrained-checkpoint", str(folder / "student"), "--dist-ckpt-strictness", "raise_all")
        return self.train(name, 2, *start, *flags)


def assert_same_run(found: dict[str, list[float]], expected: dict[str, list[float]], terms: Iterable[str]) -> None:
    """Each of the five steps of two runs is the same, but for sums of fp32 in another order."""
    for term in terms:
        assert len(found[term]) == 5 and found[term] == pytest.approx(expected[term], rel=1e-5), term


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("training")
    teacher = tiny_shape(**SIZES)
    student = tiny_shape(**SIZES, hidden_size=48, num_moe_experts=4)
    write_tiny_checkpoint(root / "teacher", teacher, seed=1, dtype=torch.float32)
    write_tiny_checkpoint(root / "student", student, seed=3, dtype=torch.float32)
    return Workplace(root, root / "teacher", root / "student")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Student and teacher of five layers and seven, of other types: no number of stages divides either."""
    root = tmp_path_factory.mktemp("uneven")
    kinds = SIZES["layer_types"]
    sizes = {"vocab_size": 120, "linear_num_key_heads": 4}
    teacher = tiny_shape(layer_types=("linear_attention", *kinds, *kinds[:2]), moe_router_topk=3, **sizes)
    student = tiny_shape(layer_types=(*kinds, kinds[0]), hidden_size=48, num_moe_experts=4, **sizes)
    write_tiny_checkpoint(root / "teacher", teacher, seed=1, dtype=torch.float32)
    write_tiny_checkpoint(root / "student", student, seed=3, dtype=torch.float32)
    return Workplace(root, root / "teacher", root / "student")


@pytest.fixture(scope="session")
def reference(workplace: Workplace) -> dict[str, list[float]]:
    """The four-term run on one rank, two micro-batches of two sequences a step."""
    return workplace.train("one", 1, "--micro-batch-size", "2")
