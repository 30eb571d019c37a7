"""The findings' machinery: order, digests, resuming, statistics, verdicts, tables and pages, with commands that do
nothing."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.findings import report
from benchmarks.findings.claims import ABOVE, BELOW, CLAIMS, SAME
from benchmarks.findings.collect import Results, Row
from benchmarks.findings.commands import Command, Commands
from benchmarks.findings.corpus import documentation
from benchmarks.findings.driver import Driver, listing
from benchmarks.findings.figures import metrics_of
from benchmarks.findings.main import arguments
from benchmarks.findings.matrix import CELLS, LOSSES, MAIN, PRUNINGS, QUESTIONS
from benchmarks.findings.order import Estimates, next_step, predicted, ranks, seconds_left
from benchmarks.findings.paired import (
    CANNOT,
    DOES_NOT,
    MISSING,
    SHOWS,
    TOO_SMALL,
    Difference,
    Spread,
    difference,
    verdict_of_order,
    verdict_of_sameness,
)
from benchmarks.findings.pictures import picture
from benchmarks.findings.sizes import SIZES, TRIAL, Settings, settings
from benchmarks.findings.specialised import entropy, information, specialisation
from benchmarks.findings.steps import CELL, PRUNED, TEACHER, TEXT, Step, Steps, wanted
from benchmarks.findings.store import Store
from benchmarks.findings.tables import arms_table, claims_table, convergence, from_csv, to_csv
from megatron_slim.errors import SlimError
from megatron_slim.recipe import parse_recipe
from tests.test_words import MOST_WORDS_OF_A_SENTENCE, banned_words, count_words, passages, sentences, vague

BATCHES = ("--micro-batch-size", "--global-batch-size")


class Stub:
    """A command that ends at once, with a result that its name and its number say."""

    def __init__(self, done: list[str], fails: str = "", stops_after: int = 10**6) -> None:
        self.done, self.fails, self.stops_after = done, fails, stops_after

    def __call__(self, command: Command, logs: Path) -> Any:
        if len(self.done) >= self.stops_after:
            raise KeyboardInterrupt
        return _Ended(command, logs, self)


class _Ended:
    def __init__(self, command: Command, logs: Path, stub: Stub) -> None:
        self.command, self.logs, self.seconds, self.stub = command, logs, 0.5, stub
        self.sentinel, write = os.pipe()
        os.close(write)

    def result(self) -> dict[str, Any]:
        step = self.logs.parents[1].name
        self.stub.done.append(f"{step}:{self.command.name}")
        if step == self.stub.fails:
            raise SlimError("no luck")
        seed = int(step.rpartition(".")[2]) if step[-1].isdigit() else 0
        figure = {"loss": 3.0 + 0.01 * seed, "kl": 0.5}
        if "--elastic" in self.command.argv:
            return {"budgets": [{"budget": name, **figure} for name in SIZES["base"].budgets]}
        return figure if self.command.name == "losses" else {}

    def end(self) -> None:
        os.close(self.sentinel)


def make_driver(tmp_path: Path, stub: Stub, keys: str = "f", seeds: int = 1, **given: Any) -> Driver:
    chosen = dataclasses.replace(TRIAL, **given)
    store = Store(tmp_path)
    steps = wanted(Steps(chosen), keys, seeds)
    return Driver(steps, Commands(chosen, store), store, jobs=1, say=[].append, start=stub)


def done_steps(done: list[str]) -> list[str]:
    return list(dict.fromkeys(each.partition(":")[0] for each in done))


def test_every_arm_and_claim_is_there() -> None:
    for key, question in QUESTIONS.items():
        labels = [arm.label for arm in question.arms]
        assert len(labels) == len(set(labels)), key
        assert all(arm.cell in CELLS for arm in question.arms)
        assert any(claim.question == key for claim in CLAIMS)
    for claim in CLAIMS:
        labels = [arm.label for arm in QUESTIONS[claim.question].arms]
        assert claim.first in labels and claim.second in labels, claim
        assert claim.relation in (ABOVE, BELOW, SAME)
    used = {arm.cell for question in QUESTIONS.values() for arm in question.arms}
    assert used == set(CELLS), "a cell that no question asks for"
    assert {cell.loss for cell in CELLS.values()} <= set(LOSSES)


def test_recipes_are_valid(tmp_path: Path) -> None:
    import yaml

    for chosen in (Settings(), TRIAL):
        commands, steps = Commands(chosen, Store(tmp_path)), Steps(chosen)
        for name in PRUNINGS:
            step = steps.pruned(name, "base", 1)
            if not step.pruning.slice:
                recipe = parse_recipe(yaml.safe_load(commands.recipe(step, tmp_path).read_text()))
                assert len(recipe.budgets) == (3 if step.pruning.budgets else 0)
        for cell in CELLS.values():
            if cell.first_phase:
                step = steps.cell(cell, 1)
                recipe = parse_recipe(yaml.safe_load(commands.recipe(step, tmp_path).read_text()))
                assert sum(recipe.phases[0].phase.schedule) == chosen.tokens


def test_the_first_seed_of_all_questions_comes_first() -> None:
    steps = wanted(Steps(Settings()), "acs", 3)
    cells = [step for step in steps if step.kind == CELL]
    seeds = [step.seed for step in cells]
    assert seeds == sorted(seeds) and set(seeds) == {1, 2, 3}
    expected = {arm.cell for key in "acs" for arm in QUESTIONS[key].arms}
    assert {step.cell.name for step in cells if step.seed == 1} == expected
    place = {step.id: number for number, step in enumerate(steps)}
    assert all(place[needed.id] < place[step.id] for step in steps for needed in step.needs.values())


def test_a_cell_that_two_questions_ask_for_is_run_once() -> None:
    steps = wanted(Steps(Settings()), tuple(QUESTIONS), 1)
    assert len({step.id for step in steps}) == len(steps)
    asked = [key for key, question in QUESTIONS.items() if MAIN in {arm.cell for arm in question.arms}]
    assert len(asked) > 3 and sum(step.id == f"cell.{MAIN}.1" for step in steps) == 1


def test_an_unknown_question_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        arguments(["--only", "a,z"])
    assert exit_.value.code == 2 and "there is no question 'z'" in capsys.readouterr().err
    with pytest.raises(SlimError, match="there is no question 'z'"):
        wanted(Steps(TRIAL), "z", 1)


def test_a_changed_cell_has_another_digest_and_no_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {step.id: step.digest for step in wanted(Steps(Settings()), tuple(QUESTIONS), 2)}
    assert before == {step.id: step.digest for step in wanted(Steps(Settings()), tuple(QUESTIONS), 2)}
    monkeypatch.setitem(CELLS, "pruned_kd", dataclasses.replace(CELLS["pruned_kd"], lr=7e-4))
    after = {step.id: step.digest for step in wanted(Steps(Settings()), tuple(QUESTIONS), 2)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"cell.pruned_kd.1", "cell.pruned_kd.2"}


def test_settings_change_what_depends_on_them() -> None:
    def digests(**given: Any) -> dict[str, str]:
        return {step.id: step.digest for step in wanted(Steps(dataclasses.replace(Settings(), **given)), "a", 1)}

    before = digests()
    cells = {name for name in before if name.startswith("cell.")}
    changed = {name for name, digest in digests(steps=10).items() if digest != before[name]}
    assert changed == cells
    changed = {name for name, digest in digests(teacher_steps=10).items() if digest != before[name]}
    assert changed == before.keys() - {TEXT}
    changed = {name for name, digest in digests(calibration_samples=10).items() if digest != before[name]}
    assert changed == {name for name in before if name.startswith(("cell.", "statistics.", "pruned."))}


def test_commands_of_a_seed_differ_by_the_seed_alone(tmp_path: Path) -> None:
    commands, steps = Commands(Settings(), Store(tmp_path)), Steps(Settings())
    words = []
    for seed in (1, 2):
        step = steps.cell(CELLS["pruned_lm"], seed)
        train = commands.of(step)[0]
        assert train.argv[train.argv.index("--seed") + 1] == str(seed)
        words.append([word for word in train.argv if str(tmp_path) not in word])
    assert sum(one != other for one, other in zip(*words, strict=True)) == 1


def test_the_arms_of_distillation_and_lm_read_the_same_samples(tmp_path: Path) -> None:
    """A cache has the samples that it was recorded on, in their order."""
    commands, steps = Commands(Settings(), Store(tmp_path)), Steps(Settings())
    lm = commands.of(steps.cell(CELLS["pruned_lm"], 1))[0].argv
    assert "--teacher-cache" not in lm
    samples = lm[lm.index("--data") + 1]
    (record,) = commands.of(steps.of_teacher("cache", "base"))
    assert record.argv[record.argv.index("--data") + 1] == samples
    kd = commands.of(steps.cell(CELLS[MAIN], 1))[0].argv
    assert kd[kd.index("--teacher-cache") + 1] == record.argv[record.argv.index("--save") + 1]


def test_all_is_run_once_and_never_again(tmp_path: Path) -> None:
    done: list[str] = []
    driver = make_driver(tmp_path, Stub(done))
    total = driver.total
    driver.run()
    assert not driver.failed and len(done_steps(done)) == total == len(driver.done)
    again: list[str] = []
    second = make_driver(tmp_path, Stub(again))
    assert second.seconds() == 0
    second.run()
    assert not again


def test_what_a_kill_left_is_done_and_no_more(tmp_path: Path) -> None:
    whole: list[str] = []
    make_driver(tmp_path / "whole", Stub(whole)).run()
    for stop in range(1, len(whole)):
        first, root = list[str](), tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            make_driver(root, Stub(first, stops_after=stop)).run()
        rest: list[str] = []
        driver = make_driver(root, Stub(rest))
        finished = set(driver.done)
        driver.run()
        assert finished.isdisjoint(done_steps(rest))
        assert finished | set(done_steps(rest)) == set(done_steps(whole))


def test_a_former_definition_keeps_its_result(tmp_path: Path) -> None:
    make_driver(tmp_path, Stub([])).run()
    changed: list[str] = []
    make_driver(tmp_path, Stub(changed), steps=5).run()
    assert {name.partition(".")[0] for name in done_steps(changed)} == {CELL}
    back: list[str] = []
    make_driver(tmp_path, Stub(back)).run()
    assert not back


def test_a_failure_leaves_out_what_needs_it_alone(tmp_path: Path) -> None:
    done: list[str] = []
    driver = make_driver(tmp_path, Stub(done, fails="pruned.experts_by_loss.base.1"))
    driver.run()
    assert list(driver.failed) == ["pruned.experts_by_loss.base.1"]
    assert "cell.experts_by_loss.1" not in done_steps(done)
    assert "cell.experts_partial_preservation_soft_logits.1" in driver.done
    again: list[str] = []
    make_driver(tmp_path, Stub(again)).run()
    assert done_steps(again) == ["pruned.experts_by_loss.base.1", "cell.experts_by_loss.1"]


def test_a_half_written_cell_begins_anew_and_a_teacher_continues(tmp_path: Path) -> None:
    store, steps = Store(tmp_path), Steps(TRIAL)
    for step, kept in ((steps.cell(CELLS[MAIN], 1), False), (steps.teacher("base"), True)):
        store.begin(step)
        (store.work(step) / "half").touch()
        store.begin(step)
        assert (store.work(step) / "half").exists() == kept
        assert store.result(step) is None


class Fixed(Estimates):
    """Seconds by id."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__(TRIAL)
        self.by_id = seconds

    def seconds(self, step: Step) -> float:
        return self.by_id[step.id]


def test_the_time_left_is_that_of_the_schedule() -> None:
    a, b = Step("a", TEXT), Step("b", TEXT)
    c = Step("c", TEXT, needs={"a": a, "b": b})
    d = Step("d", TEXT)
    estimates = Fixed({"a": 3.0, "b": 5.0, "c": 2.0, "d": 4.0})
    assert seconds_left([a, b, c, d], set(), estimates, 1) == 14.0
    # a and b at once; d in the place of a at 3, and c after b at 5 has to wait for nobody.
    assert seconds_left([a, b, c, d], set(), estimates, 2) == 7.0
    assert seconds_left([c, d], {"b"}, estimates, 2, {"a": (a, 2.0)}) == 4.0
    assert next_step([c, d], {"a"}) is d and next_step([c], {"a"}) is None and next_step([c], {"a", "b"}) is c


def test_a_teacher_runs_alone_with_all_of_the_cores() -> None:
    teacher, cell, other = Step("t", TEACHER), Step("c", CELL), Step("o", TEXT)
    assert next_step([teacher, cell], set(), [other]) is None, "what comes later waits, or a teacher would never start"
    assert next_step([teacher, cell], set(), []) is teacher
    assert next_step([cell], set(), [teacher]) is None
    assert next_step([cell], set(), [other]) is cell
    estimates = Fixed({"t": 10.0, "c": 2.0, "o": 3.0})
    assert seconds_left([other, teacher, cell], set(), estimates, 2) == 15.0
    steps, chosen = Steps(Settings()), Settings()
    alone = Estimates(chosen, jobs=1).seconds(steps.teacher("base"))
    assert 0.5 * alone < Estimates(chosen, jobs=2).seconds(steps.teacher("base")) < 0.7 * alone
    assert [ranks(jobs, chosen) for jobs in (1, 2, 3, 4, 7, 16)] == [1, 2, 2, 4, 4, 8]


def test_ranks_of_a_teacher_share_its_batch(tmp_path: Path) -> None:
    steps = Steps(Settings())
    (teacher := Store(tmp_path)).begin(steps.teacher("base"))
    one, two = (Commands(Settings(), teacher, jobs).of(steps.teacher("base"))[0].argv for jobs in (1, 2))
    assert one[0] == "pretrain" and two[:3] == ("torchrun", "--nproc-per-node", "2")
    sizes = {words: [argv[argv.index(words) + 1] for argv in (one, two)] for words in BATCHES}
    assert sizes == {"--micro-batch-size": ["8", "4"], "--global-batch-size": ["8", "8"]}


def test_measured_steps_correct_those_of_their_kind() -> None:
    steps = Steps(Settings())
    estimates = Estimates(Settings(), machine=2.0)
    one, other = steps.cell(CELLS[MAIN], 1), steps.cell(CELLS["pruned_lm"], 1)
    teacher = steps.teacher("base")
    assert estimates.seconds(other) == 2 * predicted(other, Settings())
    estimates.measured(one, 3 * predicted(one, Settings()))
    assert estimates.seconds(other) == pytest.approx(3 * predicted(other, Settings()))
    assert estimates.seconds(teacher) == 2 * predicted(teacher, Settings())


def test_larger_work_takes_longer() -> None:
    steps = Steps(Settings())
    seconds = [predicted(steps.cell(CELLS[f"{MAIN}{end}"], 1), Settings()) for end in ("_small", "", "_large")]
    assert seconds == sorted(seconds) and seconds[2] > 1.2 * seconds[1] > 1.4 * seconds[0]
    longer = dataclasses.replace(Settings(), steps=600)
    cell = CELLS[MAIN]
    assert predicted(Steps(longer).cell(cell, 1), longer) > 1.5 * predicted(Steps(Settings()).cell(cell, 1), Settings())


def test_a_dry_run_lists_every_step(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, Stub([]), keys="af")
    steps = wanted(Steps(TRIAL), "af", 1)
    lines = listing(driver, steps)
    assert [line.split()[-1] for line in lines[:-1]] == [step.id for step in steps]
    assert lines[-1].startswith(f"{len(steps)} steps, 6 of them cells; 0 done; 1 at once: about ")


def by_seed(*values: float) -> dict[tuple[str, int], float]:
    """Values of one teacher, from the first seed on."""
    return {("t", seed): value for seed, value in enumerate(values, 1)}


def test_paired_differences_are_numpys() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=3), rng.normal(size=3)
    found = difference(by_seed(*one), by_seed(*other))
    values = one - other
    error = values.std(ddof=1) / np.sqrt(3)
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(error)
    t = 4.302652729911275  # of two degrees of freedom, 97.5%: from a table
    assert (found.low, found.high) == pytest.approx((values.mean() - t * error, values.mean() + t * error))
    spread = Spread.of(list(one))
    assert (spread.mean, spread.deviation) == pytest.approx((one.mean(), one.std(ddof=1)))


def test_only_seeds_that_both_have_are_paired() -> None:
    found = difference(by_seed(2.0, 5.0, 9.0), {("t", 2): 4.0, ("t", 3): 6.0, ("t", 4): 0.0, ("u", 1): 8.0})
    assert found is not None and found.seeds == 2 and found.mean == 2.0
    assert difference({("t", 1): 1.0}, {("t", 2): 1.0}) is None
    assert difference({("t", 1): 1.0}, {("u", 1): 1.0}) is None, "pairs share their teacher"
    one = difference(by_seed(3.0), by_seed(1.0))
    assert one is not None and (one.mean, one.error, one.low, one.high) == (2.0, None, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "order", "sameness"),
    [
        (0.01, 0.03, SHOWS, CANNOT),
        (0.005, 0.015, TOO_SMALL, SHOWS),
        (0.03, 0.05, SHOWS, DOES_NOT),
        (-0.03, -0.01, DOES_NOT, CANNOT),
        (-0.05, -0.03, DOES_NOT, DOES_NOT),
        (-0.01, 0.01, DOES_NOT, SHOWS),
        (-0.01, 0.05, CANNOT, CANNOT),
        (-math.inf, math.inf, CANNOT, CANNOT),
    ],
)
def test_verdicts(low: float, high: float, order: str, sameness: str) -> None:
    found = Difference(0.0, 0.01, low, high, 3)
    assert verdict_of_order(found, 0.02) == order
    assert verdict_of_sameness(found, 0.02) == sameness
    assert verdict_of_order(None, 0.02) == verdict_of_sameness(None, 0.02) == MISSING


def test_information_of_experts() -> None:
    kinds = np.repeat([0, 1, 2], 4)
    apart = np.zeros((12, 2, 6))
    for group, kind in enumerate(kinds):
        apart[group, :, 2 * kind : 2 * kind + 2] = 0.5
    assert information(apart, kinds) == pytest.approx(np.log(3))
    found = specialisation(apart, kinds)
    assert found["expert_information"] > found["expert_information_shuffled_highest"]
    assert found["expert_p_value"] == pytest.approx(1 / 201)
    # Of groups that do not differ by kind the p value is even in (0, 1].
    drawn = (np.random.default_rng(seed).dirichlet(np.full(6, 20.0), size=(12, 2)) for seed in range(30))
    values = [specialisation(shares, kinds)["expert_p_value"] for shares in drawn]
    assert 0.35 < np.mean(values) < 0.65 and sum(value <= 0.1 for value in values) < 8
    assert entropy(np.full((2, 8), 1 / 8)) == pytest.approx(1.0) and entropy(np.eye(8)[:2]) == 0.0


def test_documentation_strings() -> None:
    source = '"""A module."""\n\nclass A:\n    """A class.\n\n    More of it.\n    """\n\n    x = 1\n'
    assert documentation(source) == "A module.\n\nA class.\n\nMore of it."
    assert documentation("def (") == ""


def test_figures_of_commands() -> None:
    losses = {"loss": 3, "kl": 0.1, "mtp_loss": [4.0], "mtp_kl": [], "perplexity": 20.0, "loss_stderr": 0.1}
    accepted = {"acceptance": {"acc": [0.5, 0.25], "mean_accepted_length": 1.75}}
    found = metrics_of({"train": {}, "losses": losses, "acceptance": accepted})
    assert found == {"loss": 3.0, "kl": 0.1, "mtp_loss": 4.0, "acc_0": 0.5, "acc_1": 0.25, "mean_accepted_length": 1.75}
    budgets = {"budgets": [{"budget": "large", "loss": 3.0}, {"budget": "small", "loss": 4.0}]}
    assert metrics_of({"losses": budgets}) == {"large/loss": 3.0, "small/loss": 4.0}


def stored(
    tmp_path: Path, losses: dict[tuple[str, int], float], seeds: int = 3, teacher: bytes = b"weights"
) -> tuple[Steps, Store, Results]:
    """Results of some cells, written as the driver writes them, and weights of teachers for their hashes."""
    steps, store = Steps(TRIAL), Store(tmp_path)
    for size in SIZES:
        export = store.work(steps.teacher(size)) / "hf"
        export.mkdir(parents=True)
        (export / "model.safetensors").write_bytes(teacher)
    for (name, seed), loss in losses.items():
        step = steps.cell(CELLS[name], seed)
        store.begin(step)
        parts = SIZES["base"].budgets if name == "elastic" else ()
        figures = {"loss": loss, "kl": loss / 10} | {f"{budget}/loss": loss for budget in parts}
        store.finish(step, figures, 1.0, {})
    return steps, store, Results(steps, store, seeds, {})


def test_claims_are_judged_by_what_is_stored(tmp_path: Path) -> None:
    losses = {(MAIN, seed): 3.0 + 0.01 * seed for seed in (1, 2, 3)}
    losses |= {("random_four", seed): 4.0 + 0.012 * seed for seed in (1, 2, 3)}
    losses |= {("pruned_lm", seed): 3.0 + 0.3 * (seed - 2) for seed in (1, 2, 3)}
    _, _, results = stored(tmp_path, losses)
    verdicts = [each.verdict for each in results.judged("a")]
    assert verdicts == [SHOWS, CANNOT, MISSING]
    first = results.judged("a")[0].found
    assert first is not None and first.mean == pytest.approx(-1.004)
    heads, rows = claims_table(results.judged("a"))
    assert heads == ("claim", "paper", "here", "seeds", "verdict")
    assert rows[0][1] == "73.45 against 61.66 (mean of 8 benchmarks)" and rows[0][3:] == ("3", SHOWS)
    assert rows[2][2:] == ("missing", "0", "missing")


def test_how_far_arms_are_apart(tmp_path: Path) -> None:
    losses = {("experts_by_loss", 1): 3.0, ("experts_by_loss", 2): 3.2}
    losses |= {("experts_partial_preservation_soft_logits", seed): 3.5 for seed in (1, 2)}
    steps, store, results = stored(tmp_path, losses)
    assert convergence(results, "f") == "", "nothing is known of what was before training"
    for (name, seed), loss in losses.items():
        pruned = steps.cell(CELLS[name], seed).needs[PRUNED]
        store.begin(pruned)
        store.finish(pruned, {"loss": 2 * loss}, 1.0, {})
    apart = convergence(Results(steps, store, 2, {}), "f")
    assert apart == "The arms' mean losses are 0.8000 nats apart before training and 0.4000 after it."
    assert convergence(results, "a") == ""


def test_missing_cells_are_shown_as_missing(tmp_path: Path) -> None:
    _, _, results = stored(tmp_path, {(MAIN, 1): 3.0})
    _, rows = arms_table(results, "a")
    assert rows[0][1] == "3.0000 (one seed)" and rows[1][1] == "missing"
    missing = report.missing_arms(results, "a")
    assert len(missing) == 4 and missing[0] == "pruned, four losses (1 of 3 seeds)"
    assert missing[-1] == "random, LM (0 of 3 seeds)"


def test_figures_of_two_teachers_have_no_mean(tmp_path: Path) -> None:
    """A line each; a teacher that one arm alone has gives none, unless the arm has no other. Differences take all."""
    first = {(MAIN, 1): 3.0, ("random_four", 1): 4.0, (MAIN, 2): 3.1, ("random_four", 2): 4.1}
    _, _, old = stored(tmp_path / "old", first)
    steps, store, _ = stored(tmp_path / "new", {(MAIN, 1): 5.0, (MAIN, 2): 5.0, ("pruned_lm", 1): 6.0}, teacher=b"new")
    hashes = [store.teacher_hash(steps, "base"), next(row.teacher for row in old.rows["a"])]
    both = Results(steps, store, 3, old.rows)
    heads, rows = arms_table(both, "a")
    assert heads[:3] == ("arm", "teacher", "loss")
    four, lm, random = "pruned, four losses", "pruned, LM", "random, four losses"
    assert sorted(both.lines("a")) == sorted(
        [*((four, each) for each in hashes), (lm, hashes[0]), (random, hashes[1]), ("random, LM", "")]
    )
    found = {row[:2]: row[2] for row in rows}
    assert found[four, hashes[0]] == "5.0000 ± 0.0000" and found[four, hashes[1]] == "3.0500 ± 0.0707"
    assert found["random, LM", "missing"] == "missing"
    steps, store, _ = stored(tmp_path / "more", {(MAIN, 1): 5.0}, teacher=b"new")
    mixed = Results(steps, store, 3, old.rows)
    assert {teacher for label, teacher in mixed.lines("a") if label == four} == {hashes[1]}
    assert arms_table(mixed, "a")[0][1] == "loss"
    png = picture(both, "a")
    assert png is not None and png.startswith(b"\x89PNG")


def test_csv_has_every_digit(tmp_path: Path) -> None:
    value = 1 / 3
    row = Row("pruned, LM", "pruned_lm", 2, "0a", "0b", "loss", value)
    (tmp_path / "a.csv").write_text(to_csv([row]))
    (line,) = csv.DictReader((tmp_path / "a.csv").open())
    assert line["arm"] == "pruned, LM" and int(line["seed"]) == 2 and float(line["value"]) == value
    assert from_csv(tmp_path / "a.csv") == [row]
    assert from_csv(tmp_path / "b.csv") == []


@pytest.mark.parametrize("line", ["pruned,pruned_lm,2,0a,0b,loss", "pruned,pruned_lm,two,0a,0b,loss,1", "1,2"])
def test_damaged_csv_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.csv").write_text(to_csv([]) + line + "\n")
    with pytest.raises(SlimError, match=r"a\.csv:2"):
        from_csv(tmp_path / "a.csv")


def test_rows_of_other_teachers_stay_and_are_pairs_of_their_own(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "findings.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    for name, shift in (("one", 0.0), ("other", 0.5)):
        losses = {(cell, seed): 3.0 + shift for cell in (MAIN, "random_four") for seed in (1, 2)}
        losses[MAIN, 1] -= 1.0
        steps, store, _ = stored(tmp_path / name, losses, teacher=name.encode())
        report.write_report(steps, store, 2, docs)
    rows = from_csv(docs / "findings/a.csv")
    assert len({row.teacher for row in rows}) == 2 and len({row.key for row in rows}) == len(rows) == 16
    merged = Results(steps, Store(tmp_path / "none"), 2, report.read_published(docs))
    found = merged.judged("a")[0].found
    assert found is not None and found.seeds == 4 and found.mean == pytest.approx(-0.5)
    before = {path.name: path.read_bytes() for path in (docs / "findings").iterdir()}
    text = (docs / "findings.md").read_text()
    report.write_report(steps, Store(tmp_path / "none"), 2, docs)
    assert {path.name: path.read_bytes() for path in (docs / "findings").iterdir()} == before
    assert (docs / "findings.md").read_text() == text, "the documentation follows from the CSV files"
    other = Results(
        Steps(dataclasses.replace(TRIAL, lr=2e-3)), Store(tmp_path / "none"), 2, report.read_published(docs)
    )
    assert not other.rows["a"], "rows of another definition are used"


def test_a_teacher_without_weights_is_refused(tmp_path: Path) -> None:
    steps, store, _ = stored(tmp_path, {(MAIN, 1): 3.0})
    shutil.rmtree(store.work(steps.teacher("base")))
    with pytest.raises(SlimError, match="no weights of the teacher"):
        Results(steps, Store(tmp_path), 1, {})


def test_the_documentation_is_what_its_csv_files_say(tmp_path: Path) -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    results = Results(Steps(settings()), Store(tmp_path), 3, report.read_published(docs))
    text = (docs / "findings.md").read_text()
    pictures = {path.stem.removeprefix("findings_"): b"" for path in (docs / "images").glob("findings_*.png")}
    assert report.generated(results, pictures) in text
    cited = {row for rows in report.read_published(docs).values() for row in rows}
    assert cited == {row for rows in results.rows.values() for row in rows}, "rows of former definitions are published"


def test_the_page_and_the_docs(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "findings.md").write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    losses = {(name, seed): 3.0 + 0.01 * seed for name in (MAIN, "random_four") for seed in (1, 2)}
    steps, store, _ = stored(tmp_path / "runs", losses)
    found = report.write_report(steps, store, 3, docs)
    assert found["cells_done"] == 4 and found["cells"] == 3 * len(CELLS)
    page = Path(found["page"]).read_text()
    assert page.count("data:image/png;base64,") >= 2 and "http" not in page.split("</head>")[1]
    text = (docs / "findings.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "| A pruned student is better than a random one, both distilled |" in text
    for link in ("images/findings_a.png", "findings/a.csv"):
        assert link in text and (docs / link).stat().st_size > 0
    rows = list(csv.DictReader((docs / "findings/a.csv").open()))
    assert {row["cell"] for row in rows} == {MAIN, "random_four"}
    assert not (docs / "findings/b.csv").exists()


def test_without_results_the_docs_say_so(tmp_path: Path) -> None:
    (tmp_path / "findings.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_report(Steps(TRIAL), Store(tmp_path / "runs"), 3, tmp_path)
    assert report.NOTHING in (tmp_path / "findings.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings.md", "runs"]


def test_docs_without_a_generated_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="no such file"):
        report.write_report(Steps(TRIAL), Store(tmp_path / "runs"), 3, tmp_path)
    (tmp_path / "findings.md").write_text("# Mine\n")
    with pytest.raises(SlimError, match="has no generated part"):
        report.write_report(Steps(TRIAL), Store(tmp_path / "runs"), 3, tmp_path)
    assert (tmp_path / "findings.md").read_text() == "# Mine\n"


def test_settings_that_are_given_win() -> None:
    assert settings(steps=None).steps == 300 and settings(steps=7).steps == 7
    assert settings(trial=True, steps=None) == TRIAL


def test_students_are_smaller_than_their_teachers() -> None:
    for size in (*SIZES.values(), TRIAL.size("base")):
        config = size.config(512)
        assert size.student["num_layers"] < size.half["num_layers"] < config["num_hidden_layers"]
        assert size.student["hidden_size"] < size.half["hidden_size"] < config["hidden_size"]
        assert size.student["num_moe_experts"] < size.half["num_moe_experts"] < config["num_experts"]


def test_steps_know_what_they_need() -> None:
    steps = Steps(Settings())
    random, phased = steps.cell(CELLS["random_lm"], 2), steps.cell(CELLS["depth_first_carried"], 2)
    assert set(random.needs) == {TEACHER, TEXT, PRUNED} and random.needs[PRUNED].seed == 2
    assert set(phased.needs) == {TEACHER, TEXT, "cache", "statistics"}
    assert random.cell == CELLS["random_lm"] and phased.cell == CELLS["depth_first_carried"]


def test_a_report_has_all_seeds_that_are_there(tmp_path: Path) -> None:
    steps, store, _ = stored(tmp_path, {(MAIN, seed): 3.0 for seed in (1, 2, 3)})
    assert store.seeds() == 3
    found = Results(steps, store, store.seeds(), {}).values("a", "pruned, four losses", "loss")
    assert [(seed, value) for (_, seed), value in found.items()] == [(1, 3.0), (2, 3.0), (3, 3.0)]


def test_other_settings_are_not_published(tmp_path: Path, tool: Any) -> None:
    docs = tmp_path / "findings.md"
    docs.write_text(f"{report.BEGIN}\nas it was\n{report.END}\n")
    flags = ("--report", "--dir", tmp_path / "runs", "--publish", tmp_path)
    done = tool("benchmarks/findings/__main__.py", *flags, "--steps", 30)
    assert done.code == 0 and "nothing is put there" in done.stderr
    assert "as it was" in docs.read_text()
    assert tool("benchmarks/findings/__main__.py", *flags).code == 0
    assert report.NOTHING in docs.read_text()


def test_the_generated_part_has_plain_words(tmp_path: Path) -> None:
    losses = {(name, seed): 3.0 + 0.01 * seed for name in CELLS for seed in (1, 2)}
    _, _, results = stored(tmp_path, losses)
    text = report.generated(results, dict.fromkeys((*QUESTIONS, "sizes"), b""))
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("###")]
    assert len(headings) == len(set(headings)) == len(QUESTIONS) + 2
    assert not [heading for heading in headings if vague(heading)]
    found = [sentence for passage in passages(text) for sentence in sentences(passage)]
    assert not [each for each in found if banned_words(each) or count_words(each) > MOST_WORDS_OF_A_SENTENCE]
    assert all(claim.text in text for claim in CLAIMS)
