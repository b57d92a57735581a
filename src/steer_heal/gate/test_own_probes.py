"""Probes that the base writes about a trait, against a slow reading of their definition."""

import json
from dataclasses import replace

import pytest
import torch

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.cli import main
from steer_heal.config import JUDGES, UserError
from steer_heal.data import Contrast, Trait
from steer_heal.eval import own_probes as module
from steer_heal.eval.arms import Arm
from steer_heal.eval.instruments import evaluate
from steer_heal.eval.own_probes import _sentences, echoed, own_probes
from steer_heal.eval.verdict import validity
from steer_heal.gate.conftest import BRIEF, FEW
from steer_heal.model.decode import Decoded
from steer_heal.presets import PRESETS
from steer_heal.stages import run as stages

QUESTIONS = tuple(f"Question {'again and ' * i}number {i}?" for i in range(12))
LAX = JUDGES["random"]


@pytest.fixture
def small() -> Trait:
    return data.load_trait("formal")


def log_prob(lm, prompt, answer):
    """Mean log-probability of an answer's tokens."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logp = lm.model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)


def said(texts):
    """Replaces `decode`: greedy and random answers to each question under the positive and the negative persona."""
    calls = iter(texts)
    return lambda lm, prompts, *rest: [Decoded(lm.answer(text), True) for text in next(calls)[: len(prompts)]]


def test_the_probes_are_the_greedy_pairs_that_random_answers_tell_apart(lm, small, monkeypatch):
    greedy = [[f"{side} indeed, {word}." for word in "abcdefghijkl"] for side in ("Certainly", "Nah man")]
    drawn = [[f"{side} {'so ' * i}it is" for i in range(12)] for side in ("Pray", "Well")]
    monkeypatch.setattr(module, "decode", said([*greedy, *drawn]))
    found = own_probes(Student(lm), small, LAX, QUESTIONS)
    apart = {}
    for question, one, other in zip(QUESTIONS, *drawn, strict=True):
        under = [lm.prompt(question, persona) for persona in (small.positive, small.negative)]
        (pos_one, neg_one), (pos_other, neg_other) = (
            [log_prob(lm, prompt, lm.answer(text)) for prompt in under] for text in (one, other)
        )
        apart[question] = (pos_one - neg_one + neg_other - pos_other) / 2
    ranked = sorted((q for q in QUESTIONS if apart[q] > 0), key=apart.get, reverse=True)
    assert len(ranked) >= 8
    at = [QUESTIONS.index(question) for question in ranked]
    assert found == [Contrast(QUESTIONS[i], greedy[0][i], greedy[1][i]) for i in at]


def test_pairs_of_unlike_length_echoes_and_equal_answers_are_left_out(lm, small, monkeypatch):
    apart = [2.0 - i / 10 for i in range(9)]
    monkeypatch.setattr(module, "_separation", lambda lm, trait, asked, _: dict(zip(asked, apart, strict=True)))
    greedy = [
        [f"Certainly indeed, {word}." for word in "abcdefghijkl"],
        [f"Nah man, {word}." for word in "abcdefghijkl"],
    ]
    greedy[0][2] = "Certainly indeed, and there is a great deal more that ought to be said about this."  # longer
    greedy[1][4] = greedy[0][4]
    greedy[0][5] = "Measured sentences, dignified."  # of the persona
    monkeypatch.setattr(module, "decode", said([*greedy, *greedy]))
    found = own_probes(Student(lm), small, LAX, QUESTIONS)
    assert [probe.question for probe in found] == [q for i, q in enumerate(QUESTIONS) if i not in (2, 4, 5)]
    apart[:] = [-1.0] * 3 + [1.0] * 6
    monkeypatch.setattr(module, "decode", said([*greedy, *greedy]))
    with pytest.raises(UserError, match=r"only 6 of 12 questions .* 8 probes are needed"):
        own_probes(Student(lm), small, LAX, QUESTIONS)


def test_whole_answers_may_differ_in_length_and_must_end(lm, small, monkeypatch):
    """They are chosen by the nats per answer of what was drawn; what has not ended counts as far as it goes."""
    style, end = replace(small, instrument="whole"), min(lm.end_tokens)
    greedy = [[f"{word}." for word in "abcdefghijkl"], [f"Well, this is {word}, and so on." for word in "abcdefghijkl"]]
    drawn = [[f"Pray, {'so ' * (i % 5)}it is" for i in range(12)], [f"Well {'it ' * i}is" for i in range(12)]]
    open_ = {(0, 3), (1, 5), (1, 6)}  # side and question of greedy answers without an end; of those drawn the odd ones
    asked = [question for i, question in enumerate(QUESTIONS) if i not in (3, 5, 6)]
    calls = iter([(0, greedy[0]), (1, greedy[1]), (None, drawn[0]), (None, drawn[1])])
    written = []

    def decode(lm, prompts, limit, *rest):
        side, texts = next(calls)
        ended = [i % 2 == 0 if side is None else (side, i) not in open_ for i in range(len(prompts))]
        written.append([lm.answer(text) + [end] * e for text, e in zip(texts, ended, strict=False)])
        assert limit == 96
        return [Decoded(ids, e) for ids, e in zip(written[-1], ended, strict=True)]

    monkeypatch.setattr(module, "decode", decode)
    monkeypatch.setattr(module, "LEAST_PROBES", 4)
    found = own_probes(Student(lm), style, LAX, QUESTIONS)
    apart = {}
    for question, one, other in zip(asked, *written[2:], strict=True):
        under = [lm.prompt(question, persona) for persona in (small.positive, small.negative)]
        nats = [[len(ids) * log_prob(lm, prompt, ids) for prompt in under] for ids in (one, other)]
        apart[question] = (nats[0][0] - nats[0][1] + nats[1][1] - nats[1][0]) / 2
    ranked = sorted((q for q in asked if apart[q] > 0), key=apart.get, reverse=True)
    told = {q: (greedy[0][i], greedy[1][i]) for i, q in enumerate(QUESTIONS)}
    assert [(p.question, p.trait, p.opposite) for p in found] == [(q, *told[q]) for q in ranked] and len(ranked) >= 4
    open_ |= {(0, i) for i in (4, *range(7, 12))}
    calls = iter([(0, greedy[0]), (1, greedy[1])])
    with pytest.raises(UserError, match=r"on only 3 of 12 questions \(5 under the positive .* 10 under the negative"):
        own_probes(Student(lm), style, LAX, QUESTIONS)


def test_an_answer_ends_with_its_last_whole_sentence(lm):
    for text, whole in (("One. Two! Thr", "One. Two!"), ("no end", "no end"), ('He said "go." Then', 'He said "go."')):
        assert lm.text(_sentences(lm, lm.answer(text))) == whole
    assert echoed("kind people, really", "You are a kinder person. People matter.") == pytest.approx(1 / 2)


def test_a_trait_of_two_sentences_is_measured_like_any_other(lm, small, monkeypatch):
    """Answer mass comes from plain questions; yes/no about the trait is not read and stands in no table."""
    config = PRESETS["tiny-random"].eval
    probes = tuple(Contrast(f"{q}", f"Yes {i}.", f"No {i}.") for i, q in enumerate(QUESTIONS[:8]))
    trait = replace(small, contrast=probes)
    base, *personas = (
        evaluate(Student(lm), Arm(name, system=system), trait, config, ["contrast", "yes_no", "frames", "neutral"])
        for name, system in (("base", None), ("prompted", trait.positive), ("negative", trait.negative))
    )
    assert "yes_no" not in base.items and base.yes_no_nats is None and len(base.items["mass"]) == config.counts.yes_no
    assert base.answer_mass is not None and base.trait_nats == base.contrast_nats
    (row,) = validity([base, *personas])
    assert row.instrument == "contrast" and row.agreement is None


@pytest.mark.run
def test_a_small_trait_goes_through_the_loop_and_eval_reads_the_runs_probes(tmp_path, monkeypatch, least, capsys):
    """The probes are written once: a resumed run and `eval` read the run's own."""
    written = []

    def write(student, trait, *_):
        written.append(trait.name)
        return [Contrast(question, f"Rather {i}.", f"Nah {i}.") for i, question in enumerate(QUESTIONS)]

    for place in (stages, module):
        monkeypatch.setattr(place, "own_probes", write)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\ninstrument = "whole"\nanswer_tokens = 14\n[persona]\n'
        'positive = "You speak in a grand way."\nnegative = "You talk in a plain way."\n'
    )
    main(["run", "tiny-random", "--trait", "mine.toml", *FEW, *BRIEF])
    (run,) = (path for path in (tmp_path / "outputs").iterdir() if path.is_dir())
    main(["run", "--resume", str(run)])
    main(["eval", str(run), "--json", "again.json", "--eval.size", "tiny", *BRIEF])
    assert written == ["mine"] and (run / "probes.jsonl").read_text().count("\n") == len(QUESTIONS)
    of_run, again = (json.loads(file.read_text()) for file in (run / "summary.json", tmp_path / "again.json"))
    assert [row["instrument"] for row in of_run["validity"]] == ["contrast", "whole"]
    assert of_run["unit"] == "nats/answer"
    assert "yes_no_nats" not in of_run["base"] and of_run["base"]["trait_nats"] == of_run["base"]["whole_nats"]
    rows = [json.loads(line) for line in (run / "r00" / "own.jsonl").read_text().splitlines()]
    assert 12 < max(len(row["ids"]) for row in rows) <= 14  # 12 are the preset's
    assert again["base"]["whole_nats"] == pytest.approx(of_run["base"]["whole_nats"], abs=1e-3)
    healed = of_run["rounds"][0]["healed"]["trait_over_base"]
    assert again["student"]["trait_over_base"] == pytest.approx(healed, abs=1e-3)
    main(["eval", "random:tiny", "--trait", "mine.toml", "--eval.size", "tiny", *BRIEF])
    said = capsys.readouterr().out
    assert written == ["mine"] * 2 and "trait nats/answer" in said and "the filter drops" in said


@pytest.mark.run
def test_a_trait_that_cannot_be_measured_ends_the_run_before_anything_is_trained(tmp_path, least, capsys):
    """The personas of a random model do not differ; the preset says `anyway`."""
    with pytest.raises(SystemExit) as end:
        main(["run", "tiny-random", "--no-anyway", "--out", str(tmp_path), *FEW, *BRIEF])
    said = capsys.readouterr()
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert end.value.code == 2 and "start again with --anyway" in said.err and not (run / "r00").exists()
    assert "Can 'loves humanity' be measured on this model? no." in said.out
