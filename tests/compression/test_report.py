"""The report of a compression run: its numbers against the files, a page without a network, the card, bad input."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_slim import convert
from megatron_slim.architecture.flops import student_flops, teacher_flops
from megatron_slim.compression import card
from megatron_slim.compression.card import MARKER
from megatron_slim.compression.report import write_report
from megatron_slim.compression.report_curves import MAX_POINTS, read_curves
from megatron_slim.compression.report_inputs import read_compression_run
from megatron_slim.distillation.terms import LOSS_TERMS
from megatron_slim.errors import SlimError
from megatron_slim.testing import tiny_shape, write_tiny_checkpoint
from megatron_slim.training.run_figures import KINDS, Interval, Progress, RunConstants, figures

ROOT = Path(__file__).resolve().parents[2]
NAMES = [term.name for term in LOSS_TERMS.values()]
SEQ_LENGTH, BATCH, ITERATIONS = 8, 2, 20
TEACHER, STUDENT = tiny_shape(), tiny_shape(num_moe_experts=4, moe_router_topk=2)
FLOPS = {
    "student": student_flops(STUDENT, SEQ_LENGTH).total,
    "teacher": teacher_flops(TEACHER, SEQ_LENGTH, runs_mtp=True).total,
}
SIZES = {
    "num_layers": 8,
    "hidden_size": 192,
    "num_moe_experts": 16,
    "moe_router_topk": 4,
    "parameters": 7429408,
    "active_parameters": 3087456,
    "bytes": 29717632,
}
KINDS_OF_A_PHASE = ("prune", "evaluate-pruned", "train", "export", "evaluate")
Tool = Callable[..., Any]


def evaluation(loss: float, **more: Any) -> dict[str, Any]:
    """What `megatron-slim evaluate --json` prints."""
    sizes = {"tokens": 24480, "samples": 96, "seq_length": 256, "dtype": "float32", "load": "model"}
    return {"loss": loss, "perplexity": float(np.exp(loss)), "mtp_loss": [loss + 0.1], **sizes, **more}


def acceptance(first: float) -> dict[str, Any]:
    rates = {"acc": [first / 2**k for k in range(5)], "mean_accepted_length": 1 + 2 * first, "drafts": 1234}
    return {**rates, "per_position": rates}


def results_of(phase: int) -> dict[str, Any]:
    """By kind of step; the second phase halves the experts again."""
    after = [SIZES | {"num_moe_experts": 16 >> k, "parameters": 7429408 - 1000000 * k} for k in range(3)]
    return {
        "prune": {"before": after[phase - 1], "after": after[phase], "load": "x", "plan_sha256": "0" * 64},
        "evaluate-pruned": evaluation(5.1957 + phase),
        "train": {},
        "export": {"format": "hf", "verified": True, "parameters": 1, "bytes": 14000000 // phase},
        "evaluate": evaluation(
            4.1442 + phase / 10,
            kl=0.1234,
            kl_stderr=0.0011,
            top1_agreement=0.8125,
            loss_stderr=0.0123,
            perplexity_stderr=0.8574,
            mtp_loss_stderr=[0.0131],
            loss_difference=0.1791,
            loss_difference_stderr=0.0021,
            top1_agreement_stderr=None,
            mtp_kl=[0.2345],
            mtp_kl_stderr=[0.0034],
            mtp_top1_agreement=[0.7654],
            acceptance=acceptance(0.62),
            teacher_acceptance=acceptance(0.71),
            tasks={"hellaswag": {"metrics": {"acc": {"value": 0.4512, "stderr": 0.0049}}, "documents": 10}},
            clients={
                "transformers": {"version": "5.24.0", "loads": True, "note": "logits agree"},
                "vllm": {"version": "0.32.0", "loads": False, "note": "no GPU"},
            },
        ),
    }


def write_events(directory: Path, start: int, count_on: bool) -> None:
    """Ten logs of a phase, as `training.run_log` writes them; iterations of the phases before are counted on or not."""
    begun = start if count_on else 0
    run = RunConstants(
        ranks=1,
        pipeline=1,
        chunks=1,
        layers=4,
        seq_length=SEQ_LENGTH,
        flops=FLOPS,
        iterations=begun + ITERATIONS,
        start=begun,
        tokens_before=begun * BATCH * SEQ_LENGTH,
    )
    ones, tokens = np.ones((1, 1, len(KINDS))), np.full((5, 4), 5.0)
    interval = Interval(2, 2 * BATCH, 0.5, np.zeros(1), np.ones(1), ones, np.ones((len(NAMES), 3)), tokens)
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for iteration in range(begun + 2, begun + ITERATIONS + 1, 2):
            for number, term in enumerate(NAMES):
                writer.add_scalar(term, number + 10.0 / iteration, iteration)
            for tag, value in figures(run, interval, Progress(iteration, BATCH * iteration, 1.0, None)).items():
                writer.add_scalar(tag, value, iteration)


def make_run(save: Path, phases: int = 1, done: int | None = None, count_on: bool = True, **changes: Any) -> Path:
    """A run of which so many steps are done, the one after them running; all without ``done``."""
    (save / "results").mkdir(parents=True)
    teacher = save.parent / f"{save.name}-teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    named = [("teacher/evaluate", "evaluate-teacher", None, evaluation(4.0651))]
    for phase in range(1, phases + 1):
        results = results_of(phase)
        named += [(f"phase-{phase}/{kind}", kind, phase, results[kind]) for kind in KINDS_OF_A_PHASE]
    named.append(("report", "report", None, None))
    done = len(named) - 1 if done is None else done
    steps = []
    for number, (name, kind, phase, result) in enumerate(named):
        state = "done" if number < done else "running" if number == done else "waiting"
        file = f"results/{name.replace('/', '-')}.json"
        command = [kind, "--save", f"out of {name}", "--seed", "3"]
        step = {"name": name, "kind": kind, "phase": phase, "state": state, "command": command, "result": file}
        steps.append(
            {**step, "output": name, "attempts": int(number <= done), "seconds": 100.0 if number < done else 0.0}
        )
        if number < done and result is not None:
            (save / file).write_text(json.dumps(result))
        if kind == "train" and number <= done:
            write_events(save / f"phase-{phase}/training", (phase - 1) * ITERATIONS, count_on)
    if done == len(named) - 1:
        (save / "model").mkdir()
        (save / "model/config.json").write_text('{"model_type": "qwen3_next"}')
    document = {
        "version": 1,
        "megatron_slim": "0.1.0",
        "recipe": {"target": {"num_moe_experts": 8}, "version": 1},
        "inputs": {
            "teacher": str(teacher),
            "data": ["train"],
            "valid_data": ["valid"],
            "calibration_data": "train",
            "evaluation_data": None,
        },
        "settings": {"calibrate": {"seed": 7}, "train": {"global_batch_size": BATCH}, "evaluate": {}},
        "steps": steps,
    }
    (save / "run.json").write_text(json.dumps(document | changes))
    return save


class Page(html.parser.HTMLParser):
    """Tables of a page by heading, its text, and everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.heading, self.inside = "", ""
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        if tag in ("h1", "h2"):
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        for key, value in attributes:
            if key == "href" and tag == "a":
                self.links.append(str(value))
            elif key in ("src", "href", "srcset", "data", "action", "poster") or key.startswith("on"):
                self.loaded.append(str(value))
        if tag in ("script", "link", "iframe", "object", "base", "i", "b"):
            self.loaded.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in ("h1", "h2"):
            self.heading += data
        elif self.inside in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        elif self.inside not in ("style", "title"):
            self.texts[self.heading] = self.texts.get(self.heading, "") + data

    def column(self, heading: str, model: str) -> dict[str, str]:
        """Cells of a model by row."""
        columns, *rows = self.tables[heading]
        return {row[0]: row[columns.index(model)] for row in rows}


def page_of(save: Path) -> Page:
    return Page(write_report(save).read_text(encoding="utf-8"))


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run")
    page, numbers = page_of(save), json.loads((save / "report.json").read_text())
    assert page.column("Sizes", "teacher")["parameters"] == "7,429,408"
    after = page.column("Sizes", "phase 1")
    assert (after["parameters"], after["experts"], after["bytes"]) == ("6,429,408", "8", "14.000M")
    assert page.column("Sizes", "left")["experts"] == "50.0%"
    teacher, pruned, student = (page.column("Evaluation", model) for model in ("teacher", "pruned", "student"))
    assert (teacher["loss"], pruned["loss"], student["loss"]) == ("4.0651", "6.1957", "4.2442 ±0.0123")
    assert (teacher["to the teacher"], pruned["to the teacher"]) == ("", "+2.1306")
    assert (student["to the teacher"], student["MTP loss"]) == ("+0.1791 ±0.0021", "4.3442 ±0.0131")
    assert student["perplexity"] == f"{np.exp(4.2442):.2f} ±0.86" and "24,480 tokens" in page.texts["Evaluation"]
    assert "standard errors over samples" in page.texts["Evaluation"]
    (model,) = [each for each in numbers["evaluations"] if each["model"] == "student"]
    assert (model["mtp_kl_stderr"], model["loss_difference_stderr"]) == ([0.0034], 0.0021)
    agreement = page.column("Agreement with the teacher", "student")
    assert agreement == {
        "KL": "0.1234 ±0.0011",
        "same likeliest token": "0.8125",
        "MTP KL": "0.2345 ±0.0034",
        "MTP same likeliest token": "0.7654",
    }
    drafts = page.column("Acceptance of MTP drafts", "student")
    assert [drafts[f"acc_{k}"] for k in range(5)] == [f"{0.62 / 2**k:.4f}" for k in range(5)]
    assert (drafts["mean accepted length"], drafts["drafts"]) == ("2.2400", "1,234")
    assert page.column("Acceptance of MTP drafts", "teacher")["acc_0"] == "0.7100"
    assert page.column("Tasks", "student") == {"hellaswag, acc": "0.4512 ±0.0049"}
    assert page.tables["Clients that load the export"][1:] == [
        ["transformers", "5.24.0", "yes", "logits agree"],
        ["vllm", "0.32.0", "no", "no GPU"],
    ]


def test_losses_before_and_after_quantization(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run")
    document = json.loads((save / "run.json").read_text())
    step = {"name": "phase-1/evaluate-fp8", "kind": "evaluate-fp8", "phase": 1, "state": "done"}
    document["steps"].insert(-1, step | {"command": ["evaluate"], "result": "fp8.json"})
    (save / "run.json").write_text(json.dumps(document))
    (save / "fp8.json").write_text(json.dumps(evaluation(4.2492)))
    page = page_of(save)
    assert page.column("Evaluation", "student")["loss"] == "4.2442 ±0.0123"
    quantized = page.column("Evaluation", "student, FP8")
    assert (quantized["loss"], quantized["to the teacher"]) == ("4.2492", "+0.1841")
    assert "Loss of the student in FP8 4.2492 (+0.0050 to its own)." in page.texts["Compression of run-teacher"]
    assert "student, FP8" not in page.tables["Acceptance of MTP drafts"][0]


def test_all_of_it_can_be_repeated(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert "The run is finished." in page.texts["Compression of run-teacher"]
    assert page.texts["Recipe"].strip().startswith("version: 1\n")
    assert yaml.safe_load(page.texts["Recipe"]) == {"version": 1, "target": {"num_moe_experts": 8}}
    assert "# phase-1/train\nmegatron-slim train --save 'out of phase-1/train' --seed 3" in page.texts["Commands"]
    assert ["calibrate.seed", "7"] in page.tables["Seeds"] and ["phase-1/prune --seed", "3"] in page.tables["Seeds"]
    assert "licence of the teacher apache-2.0" in page.texts["Inputs and licence"]
    assert ["megatron_slim", "0.1.0"] in page.tables["Versions"]
    assert page.tables["Time of the steps"][2] == ["phase-1/prune", "done", "1", "2 min"]
    assert "Time of all steps: 10 min" in page.texts["Cost of training"]


def test_tokens_and_operations(tmp_path: Path) -> None:
    """Operations as `architecture.flops` counts them, from rates that the run logged in single precision."""
    save = make_run(tmp_path / "run", phases=2)
    page, numbers = page_of(save), json.loads((save / "report.json").read_text())
    tokens = 2 * ITERATIONS * BATCH * SEQ_LENGTH
    assert numbers["cost"]["tokens"] == tokens
    assert numbers["cost"]["flops"] == pytest.approx(tokens * sum(FLOPS.values()), rel=1e-6)
    rows = {row[0]: row[1:] for row in page.tables["Cost of training"][1:]}
    assert rows["all"] == ["640", f"{numbers['cost']['flops']:.3g}"] and rows["phase 2"][0] == "320"


@pytest.mark.parametrize("count_on", [True, False])
def test_losses_of_two_phases_are_on_one_axis_of_tokens(tmp_path: Path, count_on: bool) -> None:
    """Whether the second phase counts on from the first, as progressive schedules do, or starts from 0."""
    save = make_run(tmp_path / "run", phases=2, count_on=count_on)
    (first, second), why = read_curves(read_compression_run(save))
    one = BATCH * SEQ_LENGTH
    assert (first.before, second.before, why) == (0.0, ITERATIONS * one, "")
    for number, term in enumerate(NAMES):
        for phase, curves in enumerate((first, second)):
            begun = phase * ITERATIONS
            iterations = np.arange(2, ITERATIONS + 1, 2)
            assert curves.losses[term][:, 0].tolist() == pytest.approx((one * (begun + iterations)).tolist(), rel=1e-6)
            logged = number + 10.0 / (iterations + begun * count_on)
            assert curves.losses[term][:, 1].tolist() == pytest.approx(logged.tolist(), rel=1e-6)
    page = page_of(save)
    assert page.column("Loss terms in training", "phase 1 last")["lm loss"] == "0.5000"
    assert page.column("Evaluation", "phase 2 student")["loss"] == "4.3442 ±0.0123"
    assert page.tables["Sizes"][0] == ["", "teacher", "phase 1", "phase 2", "left"]
    assert page.column("Sizes", "left")["experts"] == "25.0%"


@pytest.mark.parametrize("done", range(7))
def test_a_run_in_the_middle(tmp_path: Path, done: int) -> None:
    """Whatever is not there yet is stated as not measured; while it trains there are curves already."""
    save = make_run(tmp_path / "run", phases=2, done=done)
    page = page_of(save)
    state = page.texts["Compression of run-teacher"]
    running = json.loads((save / "run.json").read_text())["steps"][done]["name"]
    assert f"{done} of 11 steps done. {running}: running." in state
    for heading, needed in {"Sizes": 2, "Evaluation": 1, "Tasks": 6, "Agreement with the teacher": 6}.items():
        assert ("Not measured." in page.texts.get(heading, "")) == (done < needed), heading
    assert ("Loss terms in training" in page.tables) == (done >= 3)
    assert not (save / "model").exists()


def test_nothing_is_loaded_and_nothing_is_run(tmp_path: Path) -> None:
    """Names of a checkpoint and outputs of commands are foreign: shown as they are, in the page and in the card."""
    bad = "</pre><script>alert(1)</script><i onload=x>|`"
    save = make_run(tmp_path / "run", recipe={"version": 1, "name": bad}, megatron_slim=bad)
    document = json.loads((save / "run.json").read_text())
    document["inputs"] |= {"teacher": f"/none/{bad}", bad: bad}
    document["steps"][1] |= {"command": [bad], "name": bad}
    (save / "run.json").write_text(json.dumps(document | {"device": bad}))
    results = results_of(1)["evaluate"]
    results |= {"tasks": {bad: {bad: [0.5, None]}}, "clients": {bad: {"version": bad, "loads": True, "note": bad}}}
    (save / "results/phase-1-evaluate.json").write_text(json.dumps(results | {"dtype": bad}))
    text = write_report(save).read_text()
    page = Page(text)
    assert [source[:22] for source in page.loaded] == ["data:image/png;base64,"] and page.links == []
    assert "url(" not in text and "@import" not in text and not re.search("https?:", text)
    assert "default-src 'none'" in text
    assert page.tables["Clients that load the export"][1] == [bad, bad, "yes", bad]
    written = (save / "model/README.md").read_text()
    assert not re.search(r"<(?!!--)", written.partition("## Recipe")[0].partition(MARKER)[2])
    assert f"{bad}, {bad}" in page.column("Tasks", "student")


def test_the_plan_of_real_commands(tool: Tool, tmp_path: Path) -> None:
    """Commands of this package on a tiny model: their files are what is read."""
    teacher, save = write_tiny_checkpoint(tmp_path / "teacher", TEACHER), make_run(tmp_path / "run")
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).integers(0, TEACHER.vocab_size, (4, 16)))
    recipe = {"version": 1, "target": {"num_layers": 3, "hidden_size": 48, "num_moe_experts": 4}}
    recipe["depth"] = {"method": "block_influence"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    data = ("--calibration-data", tmp_path / "samples.npy", "--recipe", tmp_path / "recipe.yaml", "--json")
    pruned = tool("tools/prune_checkpoint.py", "--load", teacher, "--save", save / "phase-1/pruned", *data)
    measured = [
        tool("tools/evaluate.py", "--load", load, "--data", tmp_path / "samples.npy", "--json").json
        for load in (teacher, save / "phase-1/pruned")
    ]
    names = ("phase-1-prune", "teacher-evaluate", "phase-1-evaluate-pruned")
    for name, result in zip(names, (pruned.json, *measured), strict=True):
        (save / f"results/{name}.json").write_text(json.dumps(result))
    shown = ("--stats", save / "phase-1/pruned", "--save", save / "phase-1/plan")
    assert tool("tools/show_plan.py", save / "phase-1/pruned", *shown).code == 0
    page = page_of(save)
    assert page.column("Sizes", "phase 1")["hidden size"] == "48"
    assert page.column("Sizes", "phase 1")["parameters"] == f"{pruned.json['parameters']:,}"
    loss = f"{measured[1]['loss']:.4f} ±{measured[1]['loss_stderr']:.4f}"
    assert page.column("Evaluation", "pruned")["loss"] == loss
    assert page.column("Evaluation", "pruned")["to the teacher"] == f"{measured[1]['loss'] - measured[0]['loss']:+.4f}"
    plan = json.loads((save / "phase-1/pruned/plan.json").read_text())
    (gone,) = set(range(4)) - set(plan["kept_layers"])
    assert page.tables["Removed layers, phase 1"][1][0] == str(gone)
    assert page.tables["Ranked axes, phase 1"][1][:4] == ["hidden dimensions", "residual stream", "48", "64"]
    assert pruned.json["plan_sha256"] in page.texts["Ranked axes, phase 1"]
    assert page.links == ["phase-1/plan/index.html"] and (save / page.links[0]).is_file()
    assert {"torch", "transformers"} <= {row[0] for row in page.tables["Versions"]}


def test_long_curves_are_drawn_as_means(tmp_path: Path) -> None:
    from megatron_slim.compression.report_curves import thinned

    values = np.stack([np.arange(950.0), np.arange(950.0) ** 2], axis=1)
    few = thinned(values)
    assert len(few) == 190 <= MAX_POINTS and few[0].tolist() == [2.0, 6.0] and few[-1, 0] == 947.0


def test_the_card(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run")
    (save / "model/tokenizer.json").write_text("{}")
    write_report(save)
    text = (save / "model/README.md").read_text()
    _, matter, body = text.split("---\n", 2)
    assert yaml.safe_load(matter) == {
        "base_model": "run-teacher",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron_slim", "mixture-of-experts", "pruning", "distillation", "qwen3_next"],
    }
    assert "| loss | 4.0651 | 6.1957 | 4.2442 ±0.0123 |" in body and "| experts | 16 | 8 | 50.0% |" in body
    assert "| acc\\_" not in body and "| acc_0 | 0.7100 | 0.6200 |" in body
    assert "AutoTokenizer" in body and "vllm serve" in body and "Licence of run-teacher: apache-2.0." in body
    assert "\n## Sizes\n" in body and "\n\n\n\n" not in body


def test_the_card_of_a_model_that_sees_pictures(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from tests.vlm import write_vlm

    save = make_run(tmp_path / "run")
    shutil.rmtree(save / "model")
    write_vlm(save / "model")
    write_report(save)
    _, matter, body = (save / "model/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(matter)["pipeline_tag"] == "image-text-to-text"
    assert "Measure tasks with pictures" in body and "AutoModelForImageTextToText.from_pretrained" in body
    assert type(AutoModelForImageTextToText.from_pretrained(save / "model")).__name__.startswith("Qwen3_5Moe")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A run whose export was quantized by this package's command, from a tiny model."""
    save = make_run(tmp_path / "run")
    shutil.rmtree(save / "model")
    write_tiny_checkpoint(save / "model", STUDENT)
    found = convert(save / "model", save / "model-fp8", to="hf", quantize="fp8")
    results = {"quantize": found, "evaluate-fp8": evaluation(4.2492, loss_stderr=0.0124)}
    document = json.loads((save / "run.json").read_text())
    for kind, result in results.items():
        (save / f"results/{kind}.json").write_text(json.dumps(result))
        step = {"name": f"phase-1/{kind}", "kind": kind, "phase": 1, "state": "done", "command": [kind]}
        document["steps"].insert(-1, step | {"result": f"results/{kind}.json"})
    (save / "run.json").write_text(json.dumps(document))
    return save


def test_the_card_of_the_export_in_fp8(quantized: Path) -> None:
    page = page_of(quantized)
    plain, card_of_fp8 = ((quantized / model / "README.md").read_text() for model in ("model", "model-fp8"))
    assert "quantized" not in plain and "FP8 (E4M3)" not in plain
    _, matter, body = card_of_fp8.split("---\n", 2)
    keys = yaml.safe_load(matter)
    assert (keys["base_model"], keys["base_model_relation"]) == ("run", "quantized") and "fp8" in keys["tags"]
    assert keys["license"] == "apache-2.0" and keys["tags"][-1] == "qwen3_next"
    assert "# base_model: the run's name, to be replaced" in matter
    assert body.startswith(MARKER) and ", in FP8\n" in body and "128 x 128" in body
    assert "| loss | 4.0651 | 6.1957 | 4.2442 ±0.0123 | 4.2492 ±0.0124 |" in body
    found = json.loads((quantized / "results/quantize.json").read_text())
    worst = found["quantization"]["worst"]
    rows = {
        "bytes": f"{found['bytes']:,}",
        "weights in FP8": str(found["quantization"]["tensors"]),
        "of these with smaller blocks at the edges": str(found["quantization"]["partial_blocks"]),
        "largest relative RMS error": f"{100 * worst['relative_rms']:.2f}%",
        "tensor with this error": worst["tensor"],
    }
    assert all(f"| {name} | {value} |" in body for name, value in rows.items())
    assert page.column("Quantization", "FP8") == rows
    assert "[quantization_report.md](quantization_report.md)" in body
    assert (quantized / "model-fp8/quantization_report.md").is_file()
    assert "Clients that load" not in body and "Clients that load" in plain
    assert "--dequantize-fp8" in body and "accelerate" in body and "vllm serve" in body


def test_a_card_in_fp8_without_results(quantized: Path) -> None:
    for kind in ("quantize", "evaluate-fp8"):
        (quantized / f"results/{kind}.json").write_text("{}")
    write_report(quantized)
    assert "| bytes | not measured |" in (quantized / "model-fp8/README.md").read_text()
    (quantized / "results/quantize.json").write_text('{"quantization": {"worst": 3}}')
    with pytest.raises(SlimError, match="not what the step prints: quantization; remove it and run phase-1/quantize"):
        write_report(quantized)


def test_the_citation_is_that_of_the_project() -> None:
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = " ".join(card.CITATION.split())
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert paper["title"] in cited and names in cited and str(paper["year"]) in cited
    assert paper["identifiers"][0]["value"] in cited and paper["url"] == card.PAPER


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run")
    model = save / "model"
    write_report(save)
    ours = (model / "README.md").read_text()
    assert MARKER in ours and not (model / "MODEL_CARD.md").exists()
    (model / "README.md").write_text(ours.replace("4.2442", "old"))
    write_report(save)
    assert (model / "README.md").read_text() == ours, "replaced"
    (model / "README.md").write_text("# theirs\n")
    for _ in range(2):
        write_report(save)
        assert (model / "README.md").read_text() == "# theirs\n" and (model / "MODEL_CARD.md").read_text() == ours
    (model / "MODEL_CARD.md").write_text("theirs, too")
    with pytest.raises(SlimError, match=r"MODEL_CARD\.md: is not a card of ours"):
        write_report(save)
    assert (model / "MODEL_CARD.md").read_text() == "theirs, too"


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({}, "not stated"),
        ({"LICENSE": "  Apache License\n Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE": "All rights reserved"}, "other, LICENSE"),
        ({"README.md": "# no front matter", "LICENSE": "MIT License\nPermission is hereby granted, free"}, "mit"),
        ({"README.md": "---\nlicense: [\n---\n"}, "not stated"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"},
            "other, qwen, LICENSE",
        ),
    ],
)
def test_licence_of_the_teacher(tmp_path: Path, files: dict[str, str], stated: str) -> None:
    save = make_run(tmp_path / "run")
    (tmp_path / "run-teacher/README.md").unlink()
    for name, text in files.items():
        (tmp_path / "run-teacher" / name).write_text(text)
    page = page_of(save)
    assert page.texts["Inputs and licence"].rstrip().endswith(f"licence of the teacher {stated}")
    assert f"Licence of run-teacher: {stated}." in (save / "model/README.md").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", "{", "run.json: not readable as JSON"),
        ("run.json", '{"version": 2}', "run.json: not the state of a compression run of version 1"),
        ("run.json", '{"version": 1, "steps": []}', "run.json: missing or of another type: recipe, inputs, settings"),
        ("results/phase-1-prune.json", "[]", "phase-1-prune.json: is not a JSON object"),
        ("results/phase-1-prune.json", '{"after": 3}', "phase-1-prune.json: not what the step prints: after"),
        ("results/phase-1-export.json", '{"bytes": "1"}', "phase-1-export.json: not what the step prints: bytes"),
        ("results/phase-1-evaluate.json", '{"loss": "<b>"}', "not what the step prints: loss"),
        ("results/phase-1-evaluate.json", '{"tasks": {"a": {"b": [1]}}}', "not what the step prints: tasks"),
        ("results/phase-1-evaluate.json", '{"acceptance": {"acc": [1]}}', "not what the step prints: acceptance"),
        ("results/teacher-evaluate.json", "torn", "teacher-evaluate.json: not readable as JSON"),
        ("phase-1/pruned/plan.json", "{}", "not a plan"),
        ("model/slim_provenance.json", "{", "slim_provenance.json: not readable as JSON"),
    ],
)
def test_an_unreadable_file_is_one_line_and_leaves_nothing(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    save = make_run(tmp_path / "run")
    (save / file).parent.mkdir(exist_ok=True)
    (save / file).write_text(content)
    before = sorted(save.rglob("*"))
    with pytest.raises(SlimError) as caught:
        write_report(save)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(save.rglob("*")) == before


def test_damaged_steps_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match=r"run\.json: no such file"):
        write_report(tmp_path)
    save = make_run(tmp_path / "run")
    document = json.loads((save / "run.json").read_text())
    for change, message in ({"kind": 3}, "no name, kind or state"), ({"seconds": "1"}, "time or command of another"):
        steps = [document["steps"][0] | change, *document["steps"][1:]]
        (save / "run.json").write_text(json.dumps(document | {"steps": steps}))
        with pytest.raises(SlimError, match=message):
            write_report(save)


def test_damaged_events_are_not_measured(tmp_path: Path) -> None:
    save = make_run(tmp_path / "run")
    (events,) = (save / "phase-1/training/tensorboard").iterdir()
    events.write_bytes(b"not events")
    page = page_of(save)
    assert "Not measured." in page.texts["Losses over the tokens of training"]
    assert page.column("Evaluation", "student")["loss"] == "4.2442 ±0.0123"


def test_without_the_packages_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has everything else, and names what to install."""
    save = make_run(tmp_path / "run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = page_of(save)
    shown = page.texts["Losses over the tokens of training"]
    assert "Not measured. a curve of losses needs tensorboard, which is not installed" in shown
    assert page.loaded == [] and page.column("Evaluation", "student")["loss"] == "4.2442 ±0.0123"
