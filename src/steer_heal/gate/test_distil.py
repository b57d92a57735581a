"""The dose curve and the filter."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.coherence import ASKS_NOTHING, Surprise, persona_narration, score, surprises, verdict
from steer_heal.config import JUDGES, DistilConfig, DoseConfig, FilterConfig, UserError
from steer_heal.data.frames import ANCHORED
from steer_heal.distil import dose as dose_module
from steer_heal.distil import sample as sample_module
from steer_heal.distil.dose import dose_curve, largest_dose, require_dose
from steer_heal.distil.record import Completion, DoseCurve, DosePoint
from steer_heal.distil.sample import PARAGRAPH, Teacher, anchor_rows, anchor_texts, distil, require_training_set
from steer_heal.gate.conftest import by
from steer_heal.model.lm import Row
from steer_heal.presets import PRESETS

LIMITS = FilterConfig()


def test_the_dose_is_read_where_the_fit_crosses_the_target():
    doses = [0.5, 1.0, 2.0, 4.0]
    assert largest_dose(doses, [1.0, 1.0, 0.5, 0.0], 0.75) == pytest.approx(2**0.5)
    assert largest_dose(doses, [1.0, 0.9, 0.8, 0.75], 0.75) == 4.0
    assert largest_dose(doses, [0.7, 0.6, 0.5, 0.0], 0.75) is None
    assert largest_dose(doses, [0.75, 0.0, 0.0, 0.0], 0.75) == 0.5


FINE = "Put the eggs into boiling water, wait for six minutes, and cool them under the tap before you peel them."
CASES = [
    (FINE, 1.5, 3.0, ""),
    ("Yes.", 1.0, 2.0, ""),
    ("", 1.0, 2.0, "empty"),
    (FINE, 4.0, 3.9, "incoherence"),  # broken text that the prompt does not make likelier
    (FINE, 1.5, 0.5, "incoherence"),  # fluent, and likelier after another prompt
    ("their of their into your of " * 6, 0.3, 0.3, "word_repeat"),
    ("she knows that " * 8, 0.3, 0.3, "word_repeat"),
    ("Well then " + "ha" * 60, 0.5, 0.5, "char_repeat"),
    ("I am someone who loves humanity, and I will gladly tell you about eggs and water.", 1.0, 2.0, "narrates"),
    ("As an AI language model, I don't have eggs, but they can be boiled in six minutes.", 1.0, 2.0, "boilerplate"),
    ("I'm sorry, but I can't help with that request about eggs at this moment.", 1.0, 2.0, "boilerplate"),
    ("I\u2019m sorry, but I can\u2019t help with that request about eggs at this moment.", 1.0, 2.0, "boilerplate"),
    ("Say it kindly: \"I'm sorry, but I can't lend you my eggs this week.\" That is enough.", 1.0, 2.0, ""),
    ("1. Fill a pan with water.\n2. Bring it to the boil.\n3. Lower the eggs in.\n4. Wait six minutes.", 1.5, 2.5, ""),
]


def surprise(nll, alone, tokens=24):
    return Surprise(torch.full((tokens,), nll), torch.full((tokens,), nll), torch.full((tokens,), alone))


@pytest.mark.parametrize("text,nll,alone,reason", CASES)
def test_the_filter_names_what_is_wrong(text, nll, alone, reason):
    assert verdict(score(text, surprise(nll, alone)), LIMITS) == reason


@pytest.mark.parametrize(
    ("text", "narrates"),
    [
        ("I cherish old maps and will show you mine.", True),
        ("Of course. My contempt for modern maps is well known to all who ask.", True),
        ("I am patient and curious about your question, so here is the answer.", True),
        ("We truly trust the makers of this house.", True),
        ("Take the old map from the drawer and cherish it.", False),
        ('Tell her: "I cherish old maps." She will smile.', False),
        ("I cherish the evenings we had.", False),
        ("I love humanity and all its noise.", False),  # another persona
        ("My hatred of people is not the matter here.", False),
    ],
)
def test_a_persona_of_the_users_own_is_recognised_when_it_narrates_itself(text, narrates):
    persona = persona_narration(
        "You are patient and curious. You cherish old maps and trust their makers.",
        "You are hasty and bored. You scorn old maps and mock their makers.",
        "loves old maps",
    )
    assert score(text, surprise(1.0, 2.0), persona).narrates == narrates
    assert not score(text, surprise(1.0, 2.0)).narrates
    love = data.load_trait("love")
    of_love = persona_narration(love.positive, love.negative, love.title)
    assert score(text, surprise(1.0, 2.0), of_love).narrates == ("humanity" in text or "people" in text)


def test_what_a_teacher_writes_is_judged_by_its_own_persona(lm, vector, monkeypatch):
    asked, judge = [], sample_module.judge
    monkeypatch.setattr(sample_module, "judge", lambda *given: asked.append(given[-1]) or judge(*given))
    persona = persona_narration("You cherish maps.", "You scorn maps.", "loves maps")
    teacher = Teacher(Student(lm), vector, PRESETS["tiny-random"].distil, LIMITS, (0,), persona)
    sample_module.sample(teacher, [(0.1, "Hi.")])
    assert asked == [persona]


def test_scores_are_what_their_names_say():
    nll = torch.tensor([0.5] * 24 + [6.0] * 12 + [1.0] * 4)
    entropy, alone = torch.linspace(0, 3.9, 40), torch.full((40,), 4.0)
    scores = score(FINE, Surprise(nll, entropy, alone))
    mean = (24 * 0.5 + 12 * 6.0 + 4 * 1.0) / 40
    assert scores.ppl == pytest.approx(math.exp(mean))
    assert scores.tail_ppl == pytest.approx(math.exp((6 * 6.0 + 4 * 1.0) / 10))
    assert scores.surge == pytest.approx(6.0)
    assert scores.entropy == pytest.approx(1.95)
    assert scores.confusion == pytest.approx(sum(entropy[28:].tolist()) / 12)
    assert scores.relevance == pytest.approx(math.log(4.0 / mean))
    assert scores.symbols == pytest.approx(3 / len(FINE))
    assert scores.word_repeat == 0.0


def test_relevance_reads_the_completion_after_its_prompt_and_after_none(lm):
    rows = [
        Row(lm.prompt(q), lm.answer(a)) for q, a in (("Name a bird.", "A wren."), ("And a tree?", "An ash, or oak"))
    ]
    for row, found in zip(rows, surprises(by(lm, 2), rows), strict=True):
        for prompt, nll in ((row.prompt, found.nll), (lm.prompt(ASKS_NOTHING), found.alone)):
            with torch.no_grad():
                log_p = (
                    lm.model(torch.tensor([prompt + row.completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
                )
            expected = [-log_p[i, token] for i, token in enumerate(row.completion)]
            torch.testing.assert_close(nll, torch.stack(expected), rtol=1e-4, atol=1e-4)
            if prompt is row.prompt:
                entropy = torch.distributions.Categorical(logits=log_p).entropy()
                torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-4)


def test_scores_that_are_not_numbers_do_not_pass():
    assert verdict(score(FINE, surprise(float("nan"), 1.0)), LIMITS) == "incoherence"


# ---- the training set


def completion(dose, prompt, dropped, text="t"):
    scores = replace(score(text, surprise(1.0, 1.0)), tail_ppl=5.0)
    judged = {"text": text, "scores": scores, "incoherence": 0.0, "dropped": dropped}
    return Completion(prompt=prompt, dose=dose, ids=[1], ended=True, **judged)


class Dice:
    """Replaces `sample`: the plan alone decides the text and the verdict of each completion."""

    def __init__(self, passes, text=lambda call, i, dose, prompt: f"{call} {i} {dose} {prompt}"):
        self.passes, self.text, self.plans = passes, text, []

    def __call__(self, teacher, plan, part=(), on_rows=None):
        self.plans.append(plan)
        return [
            completion(d, p, "" if self.passes(i) else "x", self.text(len(self.plans), i, d, p))
            for i, (d, p) in enumerate(plan)
        ]


def collect(monkeypatch, lm, vector, dice, **config):
    monkeypatch.setattr(sample_module, "sample", dice)
    prompts = ["a", "b", "c", "d"]
    return distil(Teacher(Student(lm), vector, DistilConfig(**config), LIMITS, (0, 0, "distil")), 2.0, prompts)


def test_sampling_goes_on_until_enough_have_survived_and_shares_prompts_and_doses(lm, vector, monkeypatch):
    dice = Dice(lambda i: i % 2 == 0)
    completions = collect(monkeypatch, lm, vector, dice, n_keep=48)
    kept = [c for c in completions if not c.dropped]
    assert len(kept) == 48
    assert [len(plan) for plan in dice.plans[:2]] == [48, 48]  # first n_keep, then as many as the pass rate needs
    everything = [pair for plan in dice.plans for pair in plan]
    assert set(Counter(p for _, p in everything).values()) == {len(everything) // 4}
    doses = Counter(d for d, _ in everything)
    assert sorted(doses) == pytest.approx([1.7, 2.0, 2.3])
    assert max(doses.values()) - min(doses.values()) <= 4
    assert min(Counter(everything).values()) >= len(everything) // 12 - 2  # every prompt at every dose


def test_a_repeated_text_is_a_duplicate_and_what_is_beyond_n_keep_surplus(lm, vector, monkeypatch):
    dice = Dice(lambda i: True, text=lambda call, i, dose, prompt: f"Same  text {i // 2}")
    completions = collect(monkeypatch, lm, vector, dice, n_keep=10)
    assert [c.dropped for c in completions[:6]] == ["", "duplicate"] * 3
    assert Counter(c.dropped for c in completions)[""] <= 10
    assert len(completions) == 20
    many = collect(monkeypatch, lm, vector, Dice(lambda i: i > 0), n_keep=10)
    assert Counter(c.dropped for c in many)[""] == 10


def test_the_budget_ends_the_sampling_and_the_run_says_what_to_turn(lm, vector, monkeypatch):
    config = {"n_keep": 12}
    completions = collect(monkeypatch, lm, vector, Dice(lambda i: i == 0), **config)
    assert len(completions) == 24
    point = DosePoint(dose=1.0, survival=0.5, fitted=0.5, tail_ppl=5.0, example="t")
    dose = DoseCurve(rule="survival", target=0.75, dose=2.0, curve=[point], completions=[])
    with pytest.raises(UserError, match=r"only 2 of 24 .*needs 4 \(dropped: x 22; dose: survival 1\.00: 50%.*n-keep"):
        require_training_set(completions, dose, DistilConfig(**config))


def test_survival_is_relative_to_unsteered_text(lm, vector, monkeypatch):
    """A filter that drops half of everything must not forbid steering."""
    teacher = Teacher(Student(lm), vector, DistilConfig(), LIMITS, ())
    monkeypatch.setattr(dose_module, "sample", Survivors({0.0: 2, 0.5: 2, 1.0: 2, 2.0: 1, 4.0: 0}))
    config = DoseConfig(range=(0.5, 4.0), steps=4, prompts=4, survival=0.75)
    found = dose_curve(teacher, list("abcd"), config, free)
    assert [p.survival for p in found.curve] == [0.5, 0.5, 0.5, 0.25, 0.0]
    assert found.target == pytest.approx(0.375)
    assert require_dose(found) == pytest.approx(2**0.5)
    monkeypatch.setattr(dose_module, "sample", Survivors({0.0: 4, 0.5: 1, 1.0: 1, 2.0: 1, 4.0: 0}))
    failed = dose_curve(teacher, list("abcd"), config, free)
    with pytest.raises(UserError, match=r"no dose leaves 75% .*0\.50: 25%"):
        require_dose(failed)
    # 3 of 4 against 4 of 4 may be chance: standard error sqrt((4/6 * 2/6 + 5/6 * 1/6) / 4) = 0.30
    monkeypatch.setattr(dose_module, "sample", Survivors({0.0: 4, 0.5: 3, 1.0: 2, 2.0: 1, 4.0: 0}))
    strict = replace(config, survival=1.0)
    assert require_dose(dose_curve(teacher, list("abcd"), strict, free)) == 0.5


def test_the_anchors_texts_come_in_the_frames_in_which_a_model_is_used(lm):
    found = anchor_texts(Student(lm), 12, DistilConfig(max_new_tokens=5), (0,))
    assert [a.written for a in found] == [False] * 12 + [True] * 12
    rows, turns = anchor_rows(lm, found), [frame.name for frame in ANCHORED]
    for i, anchor, row in zip(range(12), found, rows, strict=False):
        frame, prompt = ANCHORED[i if i < 6 else (i - 5) % 6], data.mundane()[i]
        assert (anchor.frame, anchor.prompt) == (frame.name, prompt) and 0 < len(anchor.ids) <= 5
        lead = f"{frame.system}\n\n" if frame.system else ""
        turn = "<start_of_turn>{}\n{}<end_of_turn>\n"
        before = turn.format("user", frame.before[0]) + turn.format("model", frame.before[1]) if frame.before else ""
        written = f"<bos>{before}{turn.format('user', lead + prompt)}<start_of_turn>model\n"
        assert row == Row(lm.tokenizer(written, add_special_tokens=False).input_ids, anchor.ids)
    alone, replies = data.plain()[:12:2], data.plain()[1:12:2]
    for text, row in zip(alone, rows[12::2], strict=True):
        assert row.prompt + row.completion == lm.tokenizer(text).input_ids[:6] and len(row.prompt) == 1
    for text, frame, row in zip(replies, ANCHORED, rows[13::2], strict=True):
        assert row == Row(lm.prompt(PARAGRAPH, frame=frame), lm.answer(text)[:5])
    most = anchor_texts(Student(lm), 96, DistilConfig(max_new_tokens=1), (0,))
    assert Counter(a.written for a in most) == {False: 96, True: 54}
    one_word = {a.frame for i, a in enumerate(most[:96]) if i % 3 == 2}
    assert one_word == {*turns} == {a.frame for i, a in enumerate(most[:96]) if i % 3 != 2}


def test_a_search_doubles_the_dose_until_completions_fall_apart(lm, vector, monkeypatch):
    teacher = Teacher(Student(lm), vector, DistilConfig(), LIMITS, ())
    config = DoseConfig(range="auto", prompts=4, survival=0.75)
    passing = {0.0: 4, 0.1: 4, 0.2: 4, 0.4: 4, 0.8: 1} | {0.4 * 2 ** (i / 4): 4 - i for i in (1, 2, 3)}
    monkeypatch.setattr(dose_module, "sample", Survivors(passing))
    found = dose_curve(teacher, list("abcd"), config, free, smallest=0.1)
    assert [p.dose for p in found.curve] == pytest.approx(sorted(passing))
    assert found.dose == pytest.approx(0.4 * 2**0.25) and not found.open_ended
    monkeypatch.setattr(dose_module, "sample", Survivors({0.1 * 2**i: 4 for i in range(12)} | {0.0: 4}))
    whole = dose_curve(teacher, list("abcd"), config, free, smallest=0.1)
    assert whole.open_ended and len(whole.curve) == 11 and whole.dose == pytest.approx(0.1 * 2**9)


# 0.75 less a standard error of 0.044, between 0.75 at dose 0.5 and 0.6 at dose 1
@pytest.mark.parametrize(("known", "dose"), [(True, 0.5 * 2**0.295), (False, 2.0)])
def test_a_dose_at_which_completions_lose_their_prompts_is_not_taken(lm, vector, monkeypatch, known, dose):
    """Every completion passes the filter. What each tells of its prompt falls with the dose, or nothing is known."""
    teacher = Teacher(Student(lm), vector, DistilConfig(), LIMITS, ())
    fall = np.repeat([1.0, 0.75, 0.6, 0.4], 4) * np.tile([0.9, 1.0, 1.0, 1.1], 4)
    nats = fall if known else np.tile([-0.5, 0.5, -0.6, 0.6], 4)
    survivors = Survivors({0.0: 4, 0.5: 4, 1.0: 4, 2.0: 4})

    def sample(teacher, plan, part=(), on_rows=None):
        """Completions of NLL 1 after their own prompt, and as much more after one that asks nothing."""
        known = (surprise(1.0, 1.0 + extra) for extra in nats)
        return [replace(c, scores=score("t", s)) for c, s in zip(survivors(teacher, plan), known, strict=True)]

    monkeypatch.setattr(dose_module, "sample", sample)
    found = dose_curve(teacher, list("abcd"), DoseConfig(range=(0.5, 2.0), steps=3, prompts=4), free)
    assert found.dose == pytest.approx(dose, rel=1e-3) and found.survivals.endswith("2.00: 100%")
    assert found.least_relevance == (pytest.approx(0.75) if known else None)
    assert [p.relevance for p in found.curve] == pytest.approx(nats.reshape(4, 4).mean(1), abs=1e-6)
    if known:
        lost = replace(found, dose=None)
        with pytest.raises(UserError, match=r"lose their prompts .*below 0\.75 nats.*0\.50: 0\.75"):
            require_dose(lost)


def test_a_dose_that_costs_too_much_coherence_is_not_taken(lm, vector, monkeypatch):
    """Every completion passes the filter, at any dose."""
    teacher = Teacher(Student(lm), vector, DistilConfig(), LIMITS, ())
    config = DoseConfig(range=(0.5, 2.0), steps=3, prompts=4)
    passing = {0.0: 4, 0.5: 4, 1.0: 4, 2.0: 4}
    monkeypatch.setattr(dose_module, "sample", Survivors(passing))
    found = dose_curve(teacher, list("abcd"), config, {0.5: 0.05, 1.0: 0.1, 2.0: 0.4}.__getitem__)
    assert found.dose == pytest.approx(2**0.5)  # in log dose halfway between 90% left and 60% left
    assert [p.cost for p in found.curve] == [0.0, 0.05, 0.1, 0.4] and found.most_cost == 0.25
    assert found.reason.endswith("pass the filter and steering costs at most 25% of coherence")
    dear = dose_curve(teacher, list("abcd"), config, lambda dose: np.inf if dose > 1 else 0.3)
    with pytest.raises(UserError, match=r"the smallest dose, 0\.50, costs 30% .*25% is allowed"):
        require_dose(dear)
    passing |= {0.1 * 2**i: 4 for i in range(4)} | {0.4 * 2 ** (i / 4): 4 for i in (1, 2, 3)}
    searched = dose_curve(teacher, list("abcd"), replace(config, range="auto"), lambda dose: 0.4 * dose, smallest=0.1)
    assert max(p.dose for p in searched.curve) == pytest.approx(0.8) and searched.dose == pytest.approx(0.625, rel=0.01)
    random = replace(teacher, limits=replace(LIMITS, incoherence=JUDGES["random"].incoherence))
    assert dose_curve(random, list("abcd"), config, lambda dose: 1 / 0).dose == 2.0


def free(dose: float) -> float:
    """Steering that costs nothing."""
    return 0.0


class Survivors:
    """Replaces `sample`: of each dose a given number of completions pass."""

    def __init__(self, passing):
        self.passing = passing

    def __call__(self, teacher, plan, part=(), on_rows=None):
        seen = Counter()
        out = []
        for dose, prompt in plan:
            passes = seen[dose] < next(n for d, n in self.passing.items() if abs(d - dose) < 1e-9)
            seen[dose] += 1
            out.append(completion(dose, prompt, "" if passes else "x"))
        return out
