"""Benchmarks: the scores are those of the vanilla harness, item by item, and every user mistake is one line."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal import cli
from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig
from steer_heal.data import canary, load_trait
from steer_heal.eval import intervals
from steer_heal.eval.arms import Arm
from steer_heal.eval.harness import record, tasks
from steer_heal.eval.harness.reading import harness_results, read_benchmarks
from steer_heal.eval.harness.record import Benchmarks, Scores
from steer_heal.eval.harness.requests import harness_model
from steer_heal.eval.harness.tasks import load_tasks
from steer_heal.eval.instruments import canary_scores
from steer_heal.gate.conftest import tiny
from steer_heal.model.answers import choice_log_probs, of_tokens_and_best
from steer_heal.model.likelihood import row_surprise
from steer_heal.model.lm import Row
from steer_heal.records import structured
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import load as read_run
from steer_heal.sweep import results
from steer_heal.sweep.disk import scan

MISSING = importlib.util.find_spec("lm_eval") is None
needs_harness = pytest.mark.skipif(MISSING, reason="lm-eval is not here: pip install -e '.[harness]'")
PERSONA = load_trait("love").positive

DATA = """
from datasets import Dataset

QUESTIONS = ["What is 8 plus 6?", "Name a tree that keeps its leaves.", "Is ice cold?", "Why do people sing? " * 6]
ANSWERS = [["14", "13", "a few"], ["pine", " oak", "the old oak"], ["yes", "no", "no, no"], ["joy", "Joy", "love"]]


def rows(**_):
    found = [{"q": q, "a": a, "right": i % 3} for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS))]
    return {"test": Dataset.from_list(found), "train": Dataset.from_list(found[::-1])}


def length(doc, results):
    return {"length": float(len(results[0]))}
"""
HEAD = "custom_dataset: !function data.rows\ntest_split: test\ndoc_to_text: q\nmetadata: {version: 3}\n"
CHOICES = "output_type: multiple_choice\ndoc_to_choice: a\ndoc_to_target: right\n"
ACC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
FILES = {
    "choices": HEAD + CHOICES + ACC,
    "shots": HEAD + CHOICES + ACC + "num_fewshot: 2\nfewshot_split: train\ndescription: 'Answer in short.'\n",
    "begun": HEAD + CHOICES + ACC + "gen_prefix: 'The answer is'\n",
    "mutual": HEAD + CHOICES + ACC.replace("acc,", "acc_mutual_info,"),
    "last_word": HEAD + "output_type: loglikelihood\ndoc_to_target: '{{a[0]}}'\n"
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, "
    "{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "rolling": HEAD + "output_type: loglikelihood_rolling\ndoc_to_target: q\n"
    "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n",
    "free": HEAD + "output_type: generate_until\ndoc_to_target: ''\nprocess_results: !function data.length\n"
    "metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]\n"
    "generation_kwargs: {until: [' ', e], max_gen_toks: 40, do_sample: false}\n",
    "long": HEAD + "output_type: generate_until\ndoc_to_target: ''\nprocess_results: !function data.length\n"
    "metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]\n"
    "generation_kwargs: {until: [], max_gen_toks: 70}\n",
}
SYSTEMS = {"alone": None, "persona": PERSONA}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "tasks"
    made.mkdir()
    (made / "data.py").write_text(DATA, "utf-8")
    for name, text in FILES.items():
        (made / f"{name}.yaml").write_text(f"task: {name}\n{text}", "utf-8")
    return made


def changed_student() -> Student:
    """A student whose update changes what the tiny model writes, folded."""
    student = Student(tiny())
    student.begin_round(AdapterConfig(r=2, band=(0.0, 1.0)), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.trainable():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    student.fold()
    return student


def by_item(results: dict) -> dict[str, list]:
    """What the model answered, by task, in the order of the items."""
    ordered = {name: sorted(found, key=lambda one: one["doc_id"]) for name, found in results["samples"].items()}
    return {name: [[resp[0] for resp in one["resps"]] for one in found] for name, found in ordered.items()}


@needs_harness
@pytest.mark.run
@pytest.mark.parametrize("system", SYSTEMS)
def test_vanilla_lm_eval_on_the_merged_model_gives_the_same_scores_item_by_item(folder, tmp_path, system):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    student = changed_student()
    arm = Arm("student", history=1.0, now=0.0, system=SYSTEMS[system])
    ours = read_benchmarks(student, arm, load_tasks([*FILES, "plain_questions"], folder), 4)
    student.merged().save_pretrained(tmp_path / "merged")
    student.lm.tokenizer.save_pretrained(tmp_path / "merged")
    plain = HFLM(pretrained=str(tmp_path / "merged"), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=[str(folder), str(tasks.OWN)], include_defaults=False)
    more = {"limit": 4, "bootstrap_iters": 0, "apply_chat_template": True, "system_instruction": SYSTEMS[system]}
    theirs = simple_evaluate(model=plain, tasks=[*FILES, "plain_questions"], task_manager=manager, **more)
    assert set(theirs["samples"]) == {*FILES, "plain_questions"}
    for name, found in by_item(ours).items():
        expected = by_item(theirs)[name]
        for own, other in zip(found, expected, strict=True):
            if name in ("free", "long"):
                assert own == other
            else:
                own, other = np.array(own, dtype=np.float64), np.array(other, dtype=np.float64)
                np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4, err_msg=name)
        for key, value in theirs["results"][name].items():
            if "," in key and "stderr" not in key:
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert len({text for one in by_item(ours)["long"] for text in one}) > 1


@needs_harness
@pytest.mark.run
def test_our_own_task_asks_the_plain_questions_and_marks_the_same_answers_right(lm):
    loaded = load_tasks([tasks.PLAIN], None)
    results = harness_results(harness_model(lm, Arm("base")), loaded, None, None)
    samples = sorted(results["samples"][tasks.PLAIN], key=lambda one: one["doc_id"])
    asked = list(canary())
    assert [one["doc"]["question"] for one in samples] == [one["question"] for one in asked] and len(samples) == 180
    assert [one["acc"] for one in samples] == canary_scores(lm, Arm("base"), asked)[0].tolist()
    places = [one["doc"]["right"] for one in samples]
    assert [places.count(place) for place in range(4)] == [45] * 4


@needs_harness
def test_a_free_answer_is_the_same_whether_it_is_written_in_one_piece_or_in_several(lm, monkeypatch):
    from lm_eval.api.instance import Instance

    asked = {"until": [], "max_gen_toks": 48}
    prompts = [lm.template.text(text) for text in ("Hi.", "Why do people cry?", "Go on, and on, and on.")]
    requests = [Instance("generate_until", {}, (prompt, asked), 0, metadata=("t", 0, 1)) for prompt in prompts]
    pieces = harness_model(lm, Arm("base")).generate_until(requests)
    monkeypatch.setattr("steer_heal.eval.harness.requests.FIRST_STEP", 48)
    whole = harness_model(lm, Arm("base")).generate_until(requests)
    assert pieces == whole and all(whole)


def test_the_likeliest_token_comes_with_the_log_probability_of_an_answer(lm, prompts):
    answers = [[lm.answer(text) for text in ("yes", "no, and never again", "")[:2]] for _ in prompts]
    found = choice_log_probs(lm, prompts, answers, keep=of_tokens_and_best)
    plain = choice_log_probs(lm, prompts, answers)
    for prompt, options, both, alone in zip(prompts, answers, found, plain, strict=True):
        for answer, pair, log_p in zip(options, both, alone, strict=True):
            assert torch.equal(pair[:, 0], log_p)
            nll, _ = row_surprise(lm, [Row(prompt, answer)])[0]
            torch.testing.assert_close(-nll, log_p, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                ids = torch.tensor([prompt + answer[:-1]])
                best = lm.model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1).amax(-1)
            torch.testing.assert_close(pair[:, 1], best, rtol=1e-4, atol=1e-4)


# ---- what a user may do wrong


def refused(capsys, *words: str) -> str:
    """What `eval random:tiny` with these words says in its one line."""
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "random:tiny", *words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("steer-heal:")]
    assert end.value.code == 2 and len(said) == 1
    return said[0]


def test_without_the_package_one_line_names_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'steer_heal[harness]'" in refused(capsys, "--harness", "plain_questions")


WRONG = {
    "--harness": ("", "name at least one task"),
    "--harness a,a": ("a twice", "name each task once"),
    "--harness plain_questions --harness-items 0": ("--harness-items is 0", "1 or more"),
    "--harness plain_questions --eval.size tiny": ("--eval.*", "leave one of them out"),
    "--harness-tasks .": ("--harness-tasks '.' needs --harness", "leave it out"),
    "--harness-items 3": ("--harness-items 3 needs --harness", "leave it out"),
    "--harness plain_questions --judge tiny-random": ("--judge and --harness", "give one of them"),
}


@pytest.mark.parametrize("words", WRONG)
def test_flags_that_do_not_go_together_are_one_line(capsys, words):
    given = words.split() if words != "--harness" else ["--harness", ","]
    said = refused(capsys, *given)
    assert all(part in said for part in WRONG[words]), said


@needs_harness
def test_a_folder_that_is_missing_or_has_no_task_is_one_line(capsys, tmp_path):
    words = ("--harness", "choices", "--harness-tasks")
    assert "there is no such folder" in refused(capsys, *words, str(tmp_path / "gone"))
    assert "no file *.yaml" in refused(capsys, *words, str(tmp_path))


@needs_harness
@pytest.mark.run
def test_an_unknown_task_is_one_line_with_the_nearest_names(capsys, folder):
    said = refused(capsys, "--harness", "choices,mmlu_anatomi", "--harness-tasks", str(folder))
    assert "'mmlu_anatomi'" in said and "mmlu_anatomy" in said and "the folder's are begun, choices, free, ..." in said
    assert "plain_questions" in refused(capsys, "--harness", "plain_question")


BROKEN = {
    "hub": ("dataset_path: nobody/nothing\n" + CHOICES + "test_split: test\n", "its data cannot be reached"),
    "package": (HEAD.replace("data.rows", "needs.rows") + CHOICES, "a package that is missing (No module named"),
    "function": (HEAD.replace("data.rows", "data.gone") + CHOICES, "cannot be loaded (AttributeError"),
    "split": (HEAD.replace("test_split: test", "test_split: gone") + CHOICES, "cannot be loaded (KeyError"),
    "unsafe": (HEAD + CHOICES + ACC + "unsafe_code: true\n", "runs code that the model writes"),
    "sampled": (FILES["free"].replace("do_sample: false", "do_sample: true, temperature: 1.0"), "asks for sampled"),
    "lengthy": (FILES["free"].replace("max_gen_toks: 40", "max_gen_toks: 9000000"), "asks for answers of 9000000"),
}


@needs_harness
@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_cannot_be_read_is_one_line(capsys, folder, monkeypatch, name):
    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    (folder / "needs.py").write_text("import no_such_package_at_all\n", "utf-8")
    text, expected = BROKEN[name]
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}", "utf-8")
    said = refused(capsys, "--harness", name, "--harness-tasks", str(folder))
    assert expected in said and ("asks for" in expected or f"'{name}'" in said), said


# ---- the result


def test_intervals_follow_from_the_items():
    values = {"base": [0.0, 1.0, 1.0, 0.0, 1.0], "student": [1.0, 1.0, 1.0, 0.0, 1.0]}
    named = {"task": "t", "metric": "acc", "filter": "none", "form": "mean", "higher_is_better": True}
    base, student = (Scores(**named, value=sum(items) / 5, items=items) for items in values.values())
    found = record.over_base(record.with_interval(student), base)
    change = np.subtract(values["student"], values["base"])
    assert found.ci == intervals.interval(values["student"])
    assert found.over_base.mean == pytest.approx(0.2)
    assert found.over_base.ci == pytest.approx(intervals.interval(change))
    off = record.with_interval(Scores(**named | {"form": "mean"}, value=0.5, items=values["base"]))
    assert off.ci is None and off.form is None, "a value that is not the mean of its items has no interval"
    nats, lengths = [-8.0, -3.0], [4.0, 2.0]
    one = Scores(**named | {"form": "weighted_perplexity"}, value=float(np.exp(11 / 6)), items=nats, weights=lengths)
    low, high = record.with_interval(one).ci
    assert (low, high) == pytest.approx((np.exp(1.5), np.exp(2.0)))


def test_many_items_have_the_interval_of_few_at_a_time(monkeypatch):
    values = np.random.default_rng(0).normal(size=intervals.AT_ONCE)
    few = intervals.interval(values)
    monkeypatch.setattr(intervals, "AT_ONCE", 10)
    assert intervals.interval(values) == pytest.approx(few, abs=2e-3)
    half = 1.96 * values.std() / len(values) ** 0.5
    assert intervals.interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=2e-3)


@needs_harness
def test_a_group_has_the_items_of_its_tasks_and_stands_for_them(folder):
    from steer_heal.eval.harness.reading import benchmark_arm, benchmark_tasks

    group = "group: both\ntask: [choices, begun]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text(group, "utf-8")
    student, loaded = Student(tiny()), load_tasks(["both"], folder)
    arm = Arm("base", history=0.0, now=0.0)
    results = read_benchmarks(student, arm, loaded, None)
    found = benchmark_arm(arm, results, loaded, None)
    (whole,) = [one for one in found.scores if one.task == "both"]
    parts = [one for one in found.scores if one.task in ("choices", "begun") and one.metric == "acc"]
    assert whole.items == [item for one in parts for item in one.items] and whole.ci is not None
    described = benchmark_tasks(results)
    more = {"harness": "0", "model": "m", "trait": "t", "tasks": described, "arms": [found]}
    assert [one.task for one in Benchmarks(**more, groups=loaded.groups).shown] == ["both"]
    assert {one.version for one in described} == {"3"}
    (folder / "data.py").write_text(DATA.replace('"pine"', '"fir"'), "utf-8")
    again = benchmark_tasks(read_benchmarks(student, arm, load_tasks(["both"], folder), None))
    assert [one.fingerprint for one in again] != [one.fingerprint for one in described]


@needs_harness
@pytest.mark.run
def test_a_finished_run_keeps_its_benchmarks_and_shows_them(whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = [
        "eval",
        str(run),
        "--harness",
        "plain_questions",
        "--harness-items",
        "6",
        "--json",
        str(tmp_path / "b.json"),
    ]
    cli.main(words)
    kept = read_run(run).benchmarks
    assert kept == structured(Benchmarks, json.loads((tmp_path / "b.json").read_text("utf-8")))
    assert [arm.arm for arm in kept.arms] == ["base", "prompted", "student", "equal_cost"] and kept.round == 1
    assert kept.arms[3].dose == RunDir(run).read("r01/equal_cost.json")["dose"]
    assert all(one.over_base for arm in kept.arms[1:] for one in arm.scores)
    assert kept.tasks[0].items == 6 and kept.tasks[0].fingerprint in (run / "report.html").read_text("utf-8")
    cli.main(["export", str(run), "--to", str(tmp_path / "out")])
    assert "| plain_questions, acc |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    with RunDir(run).held():
        assert "is in use" in refused_run(capsys, words)
    before = (run / "harness.json").read_bytes()
    cli.main([*words[:-2], "--round", "0"])
    assert (run / "harness.json").read_bytes() == before, "the folder keeps the benchmarks of its result alone"
    (run / "harness.json").write_bytes(before.replace(b"6", b"7", 1))
    assert "--harness TASKS" in refused_run(capsys, ["report", str(run)])


@needs_harness
@pytest.mark.run
def test_a_run_reads_its_benchmarks_at_its_end(whole, tmp_path, capsys, monkeypatch):
    """A finished run is asked for them: nothing is trained again. A second resuming reads nothing."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = ["run", "--resume", str(run), "--eval.harness", "plain_questions", "--allow-change", "eval.harness"]
    assert "'plain_question': there is no such task" in refused_run(capsys, [*words[:4], "plain_question", *words[5:]])
    (run / "report.html").unlink(missing_ok=True)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("steer_heal.commands.benchmark._read", lambda *_: 1 / 0)
        cli.main(words)
    assert not (run / "harness.json").exists() and (run / "report.html").exists()
    cli.main(words)
    kept = read_run(run).benchmarks
    assert [arm.arm for arm in kept.arms] == ["base", "prompted", "student", "equal_cost"]
    assert kept.tasks[0].items == len(canary()) and kept.round == 1
    (row,) = results.run_table(scan(tmp_path), tmp_path).to_dicts()
    (change,) = (kept.of(kept.arms[2], one).over_base.mean for one in kept.shown if one.metric == "acc")
    assert row["plain_questions acc"] == f"{change:+.3f}"
    assert kept.holds(("plain_questions",)) and not kept.holds(("plain_questions", "gsm8k"))
    assert not replace(kept, first_items=6).holds(("plain_questions",))
    before = len(RunDir(run).events())
    cli.main(words[:3])
    assert "harness.json" not in {event.get("artefact") for event in RunDir(run).events()[before:]}


def refused_run(capsys, words: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.run
def test_the_harness_is_imported_only_when_asked():
    code = "import sys, steer_heal.cli, steer_heal.commands.benchmark; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
