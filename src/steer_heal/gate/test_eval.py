"""Instruments against slow implementations of their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal.bake.student import Student
from steer_heal.data import (
    FOUNDATIONS,
    Contrast,
    bystanders,
    canary,
    load_trait,
    neutral,
    off_target,
    spread,
    vignettes,
)
from steer_heal.data.frames import HELD_OUT
from steer_heal.eval import instruments as module
from steer_heal.eval.arms import Arm
from steer_heal.eval.foundations import question
from steer_heal.eval.instruments import (
    NO,
    SOME_TEXT,
    YES,
    YES_NO_FORM,
    contrast_scores,
    dropped,
    evaluate,
    instruments,
    whole_scores,
)
from steer_heal.eval.intervals import across_seeds, interval, log_mean_over, reliability
from steer_heal.eval.reading import ArmReading, trait_over
from steer_heal.eval.relevance import relevance
from steer_heal.gate.conftest import by
from steer_heal.model.decode import decode
from steer_heal.presets import PRESETS

CONFIG = PRESETS["tiny-random"].eval


def log_prob(lm, prompt, answer):
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logp = lm.model(ids).logits[0].log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.fixture
def trait():
    return load_trait("love")


@pytest.mark.run
@pytest.mark.parametrize("system", [None, "You love people."])
def test_all_instruments_equal_one_item_at_a_time(lm, trait, system):
    got = evaluate(Student(lm), Arm("x", system=system), trait, CONFIG, instruments(CONFIG, at_end=True))

    def contrast(probe):
        prompt = lm.prompt(probe.question, system)
        a, b = lm.answer(probe.trait), lm.answer(probe.opposite)
        return log_prob(lm, prompt, a) / len(a) - log_prob(lm, prompt, b) / len(b)

    def spelled(prompt, word):
        return sum(math.exp(log_prob(lm, prompt, list(ids))) for ids in {tuple(lm.answer(s)) for s in word})

    log_odds, mass = [], []
    for probe in trait.yes_no[: CONFIG.counts.yes_no]:
        prompt = lm.prompt(YES_NO_FORM.format(question=probe.question), system)
        yes, no = spelled(prompt, YES), spelled(prompt, NO)
        log_odds.append((1 if probe.trait_answer == "yes" else -1) * math.log(yes / no))
        mass.append(yes + no)
    neutral_nll = []
    for text in neutral()[: CONFIG.counts.neutral]:
        ids = lm.answer(text)
        neutral_nll.append(-log_prob(lm, ids[:1], ids[1:]) / (len(ids) - 1))
    right, margin = [], []
    for q in spread(canary(), CONFIG.counts.canary):
        prompt = lm.prompt(q["question"], system)
        p = {a: math.exp(log_prob(lm, prompt, lm.answer(a))) for a in (q["right"], *q["wrong"])}
        right.append(max(p, key=p.get) == q["right"])
        margin.append(math.log(p[q["right"]] / sum(p[a] for a in q["wrong"])))
    profile = []
    for row in [next(v for v in vignettes() if v["foundation"] == name) for name in FOUNDATIONS]:
        both = []
        for order in (list(FOUNDATIONS), list(FOUNDATIONS)[::-1]):
            prompt = lm.prompt(question(row["see"], tuple(order)), system) + lm.answer("Answer:")
            p = {name: math.exp(log_prob(lm, prompt, lm.answer(f" {name}"))) for name in order}
            both.append([p[name] / sum(p.values()) for name in FOUNDATIONS])
        profile.append(np.mean(both, axis=0))
    items = got.items
    assert items["contrast"] == pytest.approx([contrast(p) for p in trait.contrast[: CONFIG.counts.contrast]], abs=1e-4)
    assert items["yes_no"] == pytest.approx(log_odds, abs=1e-4)
    assert items["mass"] == pytest.approx(mass, rel=1e-3)
    assert items["neutral_nll"] == pytest.approx(neutral_nll, abs=1e-4)
    assert items["canary"] == right and len(right) == CONFIG.counts.canary
    assert items["canary_log_odds"] == pytest.approx(margin, abs=1e-3)
    assert np.allclose(got.scenes, profile, rtol=1e-3, atol=1e-9)
    others = bystanders("love", CONFIG.counts.off_target)
    assert trait.name == "love" and others.keys() == off_target().keys() | {"care-over-authority", "calm"}
    for name, probes in others.items():
        assert len(probes) == CONFIG.counts.off_target
        expected = [contrast(p) for p in probes]
        assert items[f"off:{name}"] == pytest.approx(expected, abs=1e-4)

    def read_in(frame, user):
        """The frame written out for this model, whose template puts a system text before the first user turn."""
        texts = {"assistant": "You are a helpful assistant." + (f" {system}" if system else "")}
        lead = texts.get(frame.name, system)
        turns = [*(frame.before or ()), user + (' Reply as JSON with one key, "answer".' * (frame.name == "JSON"))]
        turns[0] = f"{lead}\n\n{turns[0]}" if lead else turns[0]
        roles = ("user", "model", "user")
        written = "".join(f"<start_of_turn>{r}\n{t}<end_of_turn>\n" for r, t in zip(roles, turns, strict=False))
        return lm.answer(f"<bos>{written}<start_of_turn>model\n" + '{"answer": "' * (frame.name == "JSON"))

    assert [frame.name for frame in HELD_OUT] == ["assistant", "second turn", "JSON"]
    for frame in HELD_OUT:
        few = CONFIG.counts.framed
        asking = [read_in(frame, YES_NO_FORM.format(question=probe.question)) for probe in trait.yes_no[:few]]
        mass_here = [spelled(prompt, YES) + spelled(prompt, NO) for prompt in asking]
        assert items[f"frame:{frame.name}:mass"] == pytest.approx(mass_here, rel=1e-3)
        right_here = []
        for q in spread(canary(), 2 * few):
            p = {a: log_prob(lm, read_in(frame, q["question"]), lm.answer(a)) for a in (q["right"], *q["wrong"])}
            right_here.append(max(p, key=p.get) == q["right"])
        assert items[f"frame:{frame.name}:canary"] == right_here
        said = [(read_in(frame, SOME_TEXT), lm.answer(text)) for text in neutral()[:few]]
        nll_here = [-log_prob(lm, prompt, ids) / len(ids) for prompt, ids in said]
        assert items[f"frame:{frame.name}:neutral_nll"] == pytest.approx(nll_here, abs=1e-4)
    asked, answers = ([getattr(d, key) for d in got.demos] for key in ("prompt", "text"))
    assert len(answers) == 4 and CONFIG.counts.relevance == 3
    likeliest, information = [], []
    for i, answer in enumerate(map(lm.answer, answers)):
        own, *others = (log_prob(lm, lm.prompt(asked[(i + k) % 4]), answer) / max(len(answer), 1) for k in (0, 1, 2))
        likeliest.append(bool(answer) and own > max(others))
        information.append(own - np.mean(others) if answer else 0.0)
    assert items["relevant"] == likeliest and got.relevant_share == np.mean(likeliest)
    assert items["relevance"] == pytest.approx(information, abs=1e-3)
    assert got.answer_mass == pytest.approx(np.mean(mass), rel=1e-3)
    assert got.neutral_ppl == pytest.approx(math.exp(np.mean(neutral_nll)), rel=1e-3)
    assert got.trait_nats == got.contrast_nats == pytest.approx(np.mean(items["contrast"]))
    assert got.profile.auth_nats == pytest.approx(math.log(np.mean(profile, axis=0)[3]), abs=1e-3)
    coherent = [d.dropped in ("", "boilerplate", "narrates") for d in got.demos]
    looped = [d.dropped in ("word_repeat", "char_repeat", "compress") for d in got.demos]
    assert got.coherent_share == np.mean(coherent) and got.looped_share == np.mean(looped)
    assert got.demo_words == np.mean([len(answer.split()) for answer in answers])
    assert got.ended_share == np.mean([d.ended for d in got.demos])
    assert dropped(got.demos, CONFIG.judge) == [d.dropped for d in got.demos]
    assert got.demo_ppl == pytest.approx(math.exp(np.mean([math.log(d.scores.ppl) for d in got.demos])))


def test_an_empty_answer_is_relevant_to_nothing(lm, trait):
    answered = evaluate(Student(lm), Arm("x"), trait, CONFIG, ["demos"]).demos
    demos = [replace(demo, text=text) for demo, text in zip(answered, ("", "An oak.", "They are sad."), strict=False)]
    own, information = relevance(lm, demos, 32)
    assert (own[0], information[0]) == (0.0, 0.0) and information[1:].all()


def test_neither_batch_size_nor_order_changes_a_score(lm, trait, vector):
    arm = Arm("steered", vector=vector, dose=0.3)
    probes = trait.contrast[:20]
    plain = contrast_scores(by(lm, 64), arm, probes)
    for size in (1, 5):
        assert np.allclose(plain, contrast_scores(by(lm, size), arm, probes), atol=1e-4)
    assert np.allclose(plain[::-1], contrast_scores(by(lm, 7), arm, probes[::-1]), atol=1e-4)
    assert not np.allclose(plain, contrast_scores(lm, Arm("base"), probes), atol=1e-2)


def test_swapped_answers_and_a_negative_direction_flip_the_sign(lm, trait):
    swapped = replace(trait, contrast=tuple(Contrast(c.question, c.opposite, c.trait) for c in trait.contrast))
    plain, other, negative = (
        evaluate(Student(lm), Arm("x"), t, CONFIG, ["contrast"]).items["contrast"]
        for t in (trait, swapped, replace(trait, direction=-1))
    )
    assert np.allclose(other, -np.array(plain), atol=1e-5) and np.allclose(negative, -np.array(plain), atol=1e-5)


def test_a_trait_of_whole_answers_is_the_sum_over_tokens_and_end(lm, trait):
    """Beside it the same pairs are read per token."""
    trait = replace(trait, instrument="whole", direction=-1)
    got = evaluate(Student(lm), Arm("x", system="You are kind."), trait, CONFIG, ["contrast"])
    expected = []
    for probe in trait.contrast[: CONFIG.counts.contrast]:
        prompt, ends = lm.prompt(probe.question, "You are kind."), sorted(lm.end_tokens)
        one, other = (
            np.logaddexp.reduce([log_prob(lm, prompt, [*lm.answer(text), end]) for end in ends])
            for text in (probe.trait, probe.opposite)
        )
        expected.append(other - one)
    assert got.items["whole"] == pytest.approx(expected, abs=1e-3)
    assert got.trait_nats == got.whole_nats == pytest.approx(np.mean(expected), abs=1e-3)
    per_token = contrast_scores(lm, Arm("x", system="You are kind."), trait.contrast[: CONFIG.counts.contrast])
    assert got.items["contrast"] == pytest.approx(-per_token, abs=1e-4)


def test_a_model_that_ends_sooner_moves_pairs_of_unlike_length_as_its_logits_say(lm):
    """The end's logit is raised everywhere, by a bias. The slow reading adds it to transformers' own logits."""
    draw, words = np.random.default_rng(4), [text.split() for text in neutral()[:4]]
    probes = tuple(
        Contrast(f"Question {i}?", " ".join(some[: draw.integers(1, 4)]), " ".join(some[: draw.integers(9, 20)]))
        for i, some in enumerate(words)
    )
    bias = torch.zeros(len(lm.model.get_output_embeddings().weight))
    bias[sorted(lm.end_tokens)] = 6.0
    sooner = replace(lm, after_head=lm.after_head._replace(bias=bias))

    def slowly(probe, text):
        prompt, answer = lm.prompt(probe.question), lm.answer(text)
        with torch.no_grad():
            log_p = (lm.model(torch.tensor([prompt + answer])).logits[0] + bias).log_softmax(-1)[len(prompt) - 1 :]
        told = sum(float(log_p[i, token]) for i, token in enumerate(answer))
        return told + float(log_p[len(answer), sorted(lm.end_tokens)].logsumexp(0))

    _, whole = whole_scores(sooner, Arm("x"), probes)
    assert whole == pytest.approx([slowly(p, p.trait) - slowly(p, p.opposite) for p in probes], abs=1e-3)
    assert (whole > whole_scores(lm, Arm("x"), probes)[1] + 1).all()


def test_a_trait_that_asks_for_longer_answers_gets_them_in_the_demo(lm, trait, monkeypatch):
    limits = []
    monkeypatch.setattr(module, "decode", lambda *given: limits.append(given[2]) or decode(*given))
    for asked in (None, CONFIG.counts.demo_tokens - 1, 40):
        evaluate(Student(lm), Arm("x"), replace(trait, answer_tokens=asked), CONFIG, ["demos"])
    assert limits == [CONFIG.counts.demo_tokens, CONFIG.counts.demo_tokens, 40]


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    draw = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for low, high in (interval(draw.normal(1.0, 2.0, 60)) for _ in range(200)))
    assert 0.88 <= hits / 200 <= 0.99


def test_a_paired_difference_is_sharper_than_its_two_arms():
    draw = np.random.default_rng(1)
    items = draw.normal(0, 3, 64)
    base, moved = (
        ArmReading(
            arm="x",
            instrument="yes_no",
            dose=0.0,
            read=["yes_no"],
            items={"yes_no": scores.tolist()},
            asked={"yes_no": "same"},
        )
        for scores in (items, items + 0.2 + draw.normal(0, 0.05, 64))
    )
    change = trait_over(moved, base)
    assert change.mean == pytest.approx(0.2, abs=0.03)
    assert np.diff(change.ci) < 0.05 < np.diff(interval(items))
    moved.asked["yes_no"] = "other"
    with pytest.raises(ValueError, match="different yes_no items"):
        trait_over(moved, base)


def test_the_interval_over_seeds_counts_both_sources_of_chance():
    draw = np.random.default_rng(2)
    alike = across_seeds(np.tile(draw.normal(0.3, 0.1, 50), (5, 1)))
    assert np.allclose(alike.ci, interval(np.random.default_rng(2).normal(0.3, 0.1, 50)), atol=0.005)
    one = draw.normal(0.3, 0.1, (1, 50))
    assert across_seeds(one).ci == interval(one[0])
    found = across_seeds(np.array([[0.1], [0.9], [0.5]]))  # one item: t(2) = 4.303 times 0.4 / sqrt 3
    assert found.ci == pytest.approx([0.5 - 0.9937, 0.5 + 0.9937], abs=1e-3)
    assert np.isnan(across_seeds(np.array([[0.1, np.nan], [0.9, 0.2]])).ci).all()


@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize("between", [0.0, 0.1, 0.5])
def test_the_interval_over_a_few_seeds_covers_the_truth(seeds, between):
    """Items vary, seeds vary with standard deviation `between`, and the true mean is 1."""
    draw, hits = np.random.default_rng(5), 0
    for _ in range(400):
        of_seeds, of_items = draw.normal(0, between, (seeds, 1)), draw.normal(0, 1.0, (1, 40))
        low, high = across_seeds(1.0 + of_seeds + of_items + draw.normal(0, 0.3, (seeds, 40))).ci
        hits += low <= 1.0 <= high
    assert hits / 400 >= 0.92


def test_two_seeds_whose_parts_nearly_cancel_get_no_absurd_interval():
    """Values between -1 and 1, some of which get 0.2 degrees of freedom from Satterthwaite's formula alone."""
    draw = np.random.default_rng(3)
    found = [across_seeds(draw.choice([-1.0, 0.0, 0.0, 0.0, 1.0], (2, 32))).ci for _ in range(2000)]
    assert max(high - low for low, high in found) < 10


def test_reliability_by_hand():
    levels = np.array([0.0, 1.0, 2.0, 3.0])[:, None]
    assert reliability(levels + np.zeros((4, 10))) == pytest.approx(1.0)
    noisy = levels + np.random.default_rng(0).normal(0, 3, (4, 40))
    assert 0.2 < reliability(noisy) < 0.99
    assert reliability(np.random.default_rng(1).normal(0, 1, (30, 20))) < 0.4


def test_change_of_a_log_mean_by_hand():
    change = log_mean_over(np.array([0.2, 0.4, 0.6]), np.array([0.1, 0.2, 0.3]))
    assert change.nats == pytest.approx(math.log(2)) and np.allclose(change.ci, math.log(2))
