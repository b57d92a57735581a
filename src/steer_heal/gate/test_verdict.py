"""Verdicts and validity on arms with known scores, and on models with hand-set logits."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from steer_heal.bake.student import Student
from steer_heal.config import SIZES, EvalConfig
from steer_heal.data import FOUNDATIONS, load_trait
from steer_heal.eval import foundations
from steer_heal.eval.arms import Arm
from steer_heal.eval.catalogue import MASS
from steer_heal.eval.instruments import evaluate, yes_no_scores
from steer_heal.eval.opponents import (
    LEAST_COST,
    Cost,
    allowed_cost,
    coherence_cost,
    dose_at_cost,
    dose_at_trait,
    find_dose_at_cost,
    fitting,
    plain_doses,
)
from steer_heal.eval.prompts import PromptsReading, best_of, best_prompt, other_prompts, parts
from steer_heal.eval.reading import ArmReading
from steer_heal.eval.record import arm_record
from steer_heal.eval.verdict import Verdict, care_over_authority, validity, verdict
from steer_heal.gate.conftest import by
from steer_heal.presets import PRESETS
from steer_heal.report.tables import filter_text, verdict_line
from steer_heal.runs.summary import Baselines, RunName, summarise

CONFIG = PRESETS["tiny-random"].eval


def arm(contrast, mass=0.8, kept=0.9, ppl=20.0, off=0.0, **more):
    items = {"contrast": contrast, "yes_no": [3 * c for c in contrast], "off:thrift": [off - 0.01, off + 0.01] * 8}
    measures = {
        "answer_mass": mass,
        "coherent_share": kept,
        "neutral_ppl": ppl,
        "trait_nats": float(np.mean(contrast)),
    }
    return ArmReading(
        **{"arm": "x", "instrument": "contrast", "dose": 0.0, "read": list(items)} | more,
        items=items,
        asked=dict.fromkeys(items, "same"),
        **measures,
    )


SPREAD = np.linspace(-0.1, 0.1, 20)
BASE, STEERED, MOVED = arm((0.0 + SPREAD).tolist()), arm((0.6 + 2 * SPREAD).tolist()), arm((0.4 + 2 * SPREAD).tolist())
STILL = arm((0.01 + np.tile([-0.2, 0.2], 10)).tolist())

VERDICTS = [
    (MOVED, STEERED, True, "moved"),
    (STILL, STEERED, True, "undone"),
    (STILL, STILL, True, "unmoved"),
    (arm((-0.4 + SPREAD).tolist()), STILL, True, "unmoved"),
    (arm((0.4 + SPREAD).tolist(), off=0.41), STEERED, True, "broad"),
    (arm((0.4 + SPREAD).tolist(), off=-0.5), STEERED, True, "broad"),
    (arm((0.4 + SPREAD).tolist(), off=0.3), STEERED, True, "moved"),
    (MOVED, STEERED, False, "unreadable"),
    (arm((0.4 + SPREAD).tolist(), mass=0.67), STEERED, True, "broken"),  # 84% of base
    (arm((0.4 + SPREAD).tolist(), ppl=21.1), STEERED, True, "broken"),
    (arm((0.4 + SPREAD).tolist(), kept=0.84), STEERED, True, "broken"),
    (arm((0.4 + SPREAD).tolist(), kept=0.84, off=0.5), STILL, False, "broken"),  # is checked first
    (arm((0.4 + SPREAD).tolist(), ppl=math.nan), STEERED, True, "broken"),
]


@pytest.mark.parametrize(("healed", "steered", "valid", "word"), VERDICTS)
def test_every_verdict_and_their_order(healed, steered, valid, word):
    assert verdict(BASE, steered, healed, valid).word == word


@pytest.mark.parametrize("instrument", ["yes_no", "whole"])
@pytest.mark.parametrize(
    ("contrast", "off", "word"),
    [
        (-0.3, 0.05, "moved"),  # a sixth of how far the trait itself moved on these probes
        (-0.3, 0.35, "broad"),
        (-0.3, -0.35, "broad"),
        (0.0, 0.05, "moved"),  # nothing to compare with
        (0.3, 0.05, "moved"),
        (0.3, 0.31, "broad"),
    ],
)
def test_another_trait_is_broad_where_others_moved_further_than_it_did_on_contrast(contrast, off, word, instrument):
    base = replace(arm(BASE.items["contrast"]), instrument=instrument)
    healed = arm((contrast + SPREAD).tolist(), off=off, instrument=instrument)
    base.items[instrument], base.asked[instrument] = BASE.items["yes_no"], "same"
    healed.items[instrument], healed.asked[instrument] = [2.0 + x for x in BASE.items["yes_no"]], "same"
    found = verdict(base, healed, healed, True)
    assert found.word == word
    assert ("were not compared" in found.why) == (contrast == 0.0)


def framed(reading, **values):
    """The reading, with answer masses (or perplexities) in held-out frames and the relevance of its answers."""
    items, more = dict(reading.items), {}
    for name, value in values.items():
        frame, _, kind = name.partition("__")
        if frame == "relevance":
            items |= {"relevant": [1.0, value[0]], "relevance": [value[1] - 0.01, value[1] + 0.01]}
            more = {"relevant_share": (1 + value[0]) / 2, "relevance_nats": value[1]}
            more["relevance_ci"] = (value[1] - 0.01, value[1] + 0.01)
        else:
            items[f"frame:{frame}:{kind}"] = [math.log(value)] * 2 if kind == "neutral_nll" else [value] * 2
    return replace(reading, items=items, asked=dict.fromkeys(items, "same"), **more)


HELD = {"assistant__mass": 0.5, "turn__mass": 0.4, "assistant__neutral_nll": 30.0}


@pytest.mark.parametrize(
    ("base", "healed", "why"),
    [
        (HELD, HELD, ""),
        (HELD, HELD | {"turn__mass": 0.35}, ""),  # 88% of base
        (HELD, HELD | {"turn__mass": 0.33}, "answer mass 82.5% of base in the frame 'turn' (at least 85% is sound)"),
        (
            HELD,
            HELD | {"turn__mass": 0.33, "assistant__mass": 0.1},
            "answer mass 20.0% of base in the frame 'assistant' (at least 85% is sound)",
        ),
        (
            HELD,
            HELD | {"assistant__neutral_nll": 32.0},
            "neutral perplexity 106.7% of base in the frame 'assistant' (at most 105% is sound)",
        ),
        (HELD | {"turn__mass": 0.04}, HELD | {"turn__mass": 0.001}, ""),  # there was nothing to lose
        (HELD, HELD | {"turn__mass": math.nan}, "its scores are not finite"),
        ({"relevance": (1.0, 1.5)}, {"relevance": (1.0, 1.21)}, ""),
        ({"relevance": (1.0, 1.5)}, {"relevance": (1.0, 1.19)}, "relevance 79.3% of base (at least 80% is sound)"),
        (
            {"relevance": (1.0, 1.5)},
            {"relevance": (0.7, 1.5)},
            "answers to their prompt 85.0% of base (at least 90% is sound)",
        ),
        ({"relevance": (1.0, 0.005)}, {"relevance": (0.0, -0.1)}, ""),  # the base's own answers have none
    ],
)
def test_damage_in_the_worst_held_out_frame_and_lost_threads_break_a_round(base, healed, why):
    found = verdict(framed(BASE, **base), STEERED, framed(MOVED, **healed), True)
    assert (found.word, found.why if why else "") == (("broken", why) if why else ("moved", ""))


def test_a_floor_is_absolute_whatever_the_base_was():
    poor = arm((0.0 + SPREAD).tolist(), mass=0.01, kept=0.1, ppl=5000.0)
    healed = arm((0.4 + SPREAD).tolist(), mass=0.02, kept=0.2, ppl=4000.0)  # better than its base in every measure
    found = verdict(poor, STEERED, healed, True)
    assert found.word == "broken"
    assert found.why.count("below the floor") == 2 and "neutral perplexity 4000, above 200" in found.why


def test_validity_of_an_instrument_by_hand():
    positive, negative, wide = arm((0.3 + SPREAD).tolist()), arm((-0.1 + 2 * SPREAD).tolist()), []
    contrast, yes_no = validity([BASE, positive, negative])
    assert contrast.valid and contrast.positive_over_negative == pytest.approx(0.4)
    change = 0.4 - SPREAD
    assert contrast.halves == pytest.approx([change[0::2].mean(), change[1::2].mean()])
    assert yes_no.positive_over_negative == pytest.approx(1.2) and yes_no.agreement == pytest.approx(1.0)
    for one, scores in zip((BASE, positive, negative), (0.0, 1.0, 1.0), strict=True):
        one = replace(one, items=one.items | {"whole": (scores + SPREAD).tolist()})
        wide.append(replace(one, asked=dict.fromkeys(one.items, "same")))
    of_three = validity(wide)
    assert [row.instrument for row in of_three] == ["contrast", "yes_no", "whole"]
    with_whole = np.corrcoef([0.0, 0.3, -0.1], [0.0, 1.0, 1.0])[0, 1]
    assert [row.agreement for row in of_three] == pytest.approx([(1 + with_whole) / 2] * 2 + [with_whole])
    back = validity([BASE, negative, positive])[0]
    assert not back.valid
    noise = arm((0.02 + np.tile([-0.5, 0.5], 10)).tolist())
    assert not validity([BASE, noise, BASE])[0].valid


def test_an_unfinished_run_has_the_record_of_what_is_there():
    of = RunName(model="m", trait="love", seed=0, preset="tiny-random")
    nothing = summarise(of, Baselines(plain=[]), [], {})
    assert nothing.base is None and nothing.unit is None and nothing.validity == nothing.plain == nothing.rounds == []
    found = summarise(of, Baselines(base=BASE, prompted=MOVED, plain=[]), [], {})
    assert found.prompted.trait_over_base == pytest.approx(0.4) and found.rounds == []


def test_profile_changes_by_hand():
    names = list(FOUNDATIONS)

    def seen(care, authority):
        p = np.full((5, 7), (1 - care - authority) / 5)
        p[:, names.index("care")], p[:, names.index("authority")] = care, authority
        return replace(BASE, scenes=p.tolist(), asked=BASE.asked | {"profile": "same"})

    base, moved = seen(0.2, 0.2), seen(0.4, 0.1)
    assert np.allclose(care_over_authority(moved), math.log(4))
    over = arm_record(moved, base).profile_over_base
    assert over["care"].nats == pytest.approx(math.log(2)) and over["authority"].nats == pytest.approx(-math.log(2))
    assert over["care_over_authority"].ci == pytest.approx([math.log(4)] * 2)


def test_the_dose_of_equal_cost_by_hand():
    assert coherence_cost(arm([0.0], mass=0.6, ppl=22.0), BASE) == pytest.approx(0.25)
    assert coherence_cost(arm([0.0], mass=0.9, ppl=19.0), BASE) == pytest.approx(-0.05)
    assert allowed_cost(arm([0.0], mass=0.9, ppl=19.0), BASE) == LEAST_COST  # healing cost nothing: the least allowed
    curve = [Cost(1.0, 0.1), Cost(2.0, 0.5), Cost(4.0, 0.9)]
    assert dose_at_cost(curve, 0.3) == pytest.approx(1.5)
    assert dose_at_cost(curve, 0.05) == pytest.approx(0.5)
    assert dose_at_cost(curve, 2.0) == 4.0
    dips = [Cost(1.0, 0.4), Cost(2.0, 0.2), Cost(3.0, 0.6)]
    assert dose_at_cost(dips, 0.3) == pytest.approx(2.25)  # the largest dose that is cheap enough
    doses = plain_doses(EvalConfig(plain_range=(0.2, 12.8)))
    assert doses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])
    assert coherence_cost(arm([0.0], mass=math.nan), BASE) == coherence_cost(arm([0.0], ppl=math.inf), BASE) == math.inf
    assert dose_at_cost(curve, math.inf) == 4.0


def test_a_student_of_nan_has_no_arm_that_costs_what_it_does():
    lost = arm([0.0], mass=math.nan, ppl=math.nan)
    allowed = allowed_cost(lost, BASE)
    cheap, dear = arm([0.0], mass=0.7), arm([0.0], mass=0.1)
    assert allowed == math.inf and fitting([cheap, dear, lost], BASE, allowed) is None
    curve, asked = [Cost(1.0, 0.1), Cost(4.0, math.inf)], []
    assert find_dose_at_cost(allowed, curve, lambda dose: asked.append(dose) or 0.2) == 4.0 and asked == [4.0]


def test_a_base_without_answer_mass_has_none_to_lose():
    empty = arm([0.0], mass=0.0)
    assert coherence_cost(arm([0.0], mass=0.3, ppl=22.0), empty) == pytest.approx(0.1)
    assert coherence_cost(arm([0.0], mass=0.0, ppl=20.0), empty) == 0.0
    assert coherence_cost(arm([0.0], mass=math.nan), empty) == math.inf
    assert math.isnan(MASS.over(arm([0.0], mass=0.3), empty))


def test_the_arm_of_equal_cost_costs_what_is_allowed():
    """The true cost is quadratic in the dose, so the first linear interpolation misses it."""

    def cost(dose):
        return dose**2 / 10

    asked = []

    def read(dose):
        asked.append(dose)
        return cost(dose)

    curve = [Cost(dose, cost(dose)) for dose in (0.5, 4.0)]
    assert find_dose_at_cost(0.4, curve, read) == pytest.approx(2.0, rel=0.08) and 1 < len(asked) <= 3
    assert find_dose_at_cost(5.0, curve, read) == 4.0
    dear, near = arm([0.0], mass=0.4), arm([0.0], mass=0.49)
    assert fitting([dear, near], BASE, 0.4) is near and fitting([dear], BASE, 0.4) is None


def test_the_dose_of_equal_trait_by_hand():
    plain = [arm((by + SPREAD).tolist(), dose=dose) for dose, by in ((0.5, 0.1), (1.0, 0.3), (2.0, 0.5), (4.0, 0.2))]

    def found(by):
        return dose_at_trait(plain, BASE, arm((by + SPREAD).tolist()))

    assert found(0.2) == (pytest.approx(0.75), True) and found(0.05) == (pytest.approx(0.25), True)
    assert found(0.5) == (pytest.approx(2.0), True)
    assert found(0.6) == (2.0, False)  # no dose reaches it: the dose that moves the trait furthest
    assert found(-0.1) == (0.5, True)
    assert found(math.nan) == (2.0, False)
    plain.insert(0, arm([math.nan] * 20, dose=0.1))  # a dose with NaN scores is skipped
    assert found(0.2) == (pytest.approx(0.75), True) and found(0.6) == (2.0, False)


@pytest.fixture
def hand_set(lm):
    """The tiny model with its logits replaced by a table that depends only on the last token."""

    def build(table):
        with torch.no_grad():
            for block in lm.blocks:  # then the residual stream is the embedding of the last token
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            embedded = lm.model.get_input_embeddings()(torch.arange(len(table)))
            keys = lm.decoder.norm(embedded[:, None])[:, 0]
        return replace(lm, head_product=lambda states: table[torch.cdist(states, keys).argmin(-1)])

    return build


def test_log_odds_and_mass_of_hand_set_logits(lm, hand_set):
    """After the prompt P(Yes) = 0.5 * 0.9 (two tokens) and P(No) = 0.2; the rest is spread over other tokens."""
    size = len(lm.tokenizer)
    tag = lm.prompt("x")[-1]
    yes, no = lm.answer("Yes"), lm.answer("No")
    assert yes[0] != no[0] and tag not in (yes[0], no[0])
    p = torch.full((size, size), 1e-12)
    p[tag, yes[0]], p[tag, no[0]] = 0.5, 0.2
    for word, sure in ((yes, 0.9), (no, 1.0)):
        for before, after in pairwise(word):
            p[before, after] = sure ** (1 / (len(word) - 1))
    p += (1 - p.sum(1, keepdim=True)) / size * (torch.arange(size)[:, None] != tag)  # the rest is uniform
    p[tag, -1] += 1 - p[tag].sum()
    model = hand_set(p.clamp(min=1e-30).log())
    trait = load_trait("love")
    probes = trait.yes_no[:6]
    log_odds, mass = yes_no_scores(by(model, 4), Arm("x"), probes)
    share = {"yes": 0.5 * (0.9 if len(yes) > 1 else 1.0), "no": 0.2}
    sign = np.array([1 if probe.trait_answer == "yes" else -1 for probe in probes])
    assert np.allclose(log_odds, sign * math.log(share["yes"] / share["no"]), atol=0.02)
    assert np.allclose(mass, share["yes"] + share["no"], atol=0.01)
    assert {1, -1} == set(sign)


def test_a_liking_for_a_place_in_the_list_cancels(lm, monkeypatch):
    """The model gives the first option 0.4 and the others 0.1 each; in one scene it doubles care."""
    marked = "limp"

    def fake(_lm, prompts, choices, _steering):
        out = []
        for prompt, options in zip(prompts, choices, strict=True):
            text = lm.tokenizer.decode(prompt)
            first = min(FOUNDATIONS, key=lambda name: text.index(f"- {name}:"))
            p = {name: 0.4 if name == first else 0.1 for name in FOUNDATIONS}
            p["care"] *= 2 if marked in text else 1
            out.append(
                [
                    torch.tensor([0.0] * (len(o) - 1) + [math.log(q / 2)])
                    for o, q in zip(options, p.values(), strict=True)
                ]
            )
        return out

    monkeypatch.setattr(foundations, "choice_log_probs", fake)
    monkeypatch.setitem(SIZES, CONFIG.size, replace(CONFIG.counts, scenes=5))
    reading = foundations.read_profile(lm, Arm("x"), CONFIG)
    names = list(FOUNDATIONS)
    plain = np.array([0.25, 0.1, 0.1, 0.1, 0.1, 0.1, 0.25])
    for scene, p, mass in zip(reading.scenes, reading.p, reading.mass, strict=True):
        if marked not in scene:
            assert np.allclose(p, plain) and mass == pytest.approx(0.5)
        else:
            care = (0.8 / 1.4 + 0.2 / 1.1) / 2
            assert p[names.index("care")] == pytest.approx(care) and mass == pytest.approx((0.7 + 0.55) / 2)
    assert sum(marked in scene for scene in reading.scenes) == 1
    found = foundations.described(reading, "vignettes")
    assert found.care_nats == pytest.approx(math.log(reading.p[:, 0].mean()))
    assert found.auth_nats == pytest.approx(math.log(reading.p[:, 3].mean()))
    assert found.p_ans_any == pytest.approx(reading.mass.mean())


@pytest.mark.parametrize("kind", ["uniform", "one token", "nan"])
def test_a_collapsed_model_is_broken_whatever_its_ratios(lm, hand_set, kind):
    size = len(lm.tokenizer)
    table = torch.zeros(size, size)
    if kind == "one token":
        table[:, lm.answer("Yes")[0]] = 4000.0  # every other token costs 4000 nats: perplexities overflow
    if kind == "nan":
        table += math.nan
    trait = load_trait("love")
    found = evaluate(Student(hand_set(table)), Arm("healed"), trait, CONFIG)
    found = replace(found, coherent_share=1.0)  # overrides the judge
    flattering = replace(found, trait_nats=0.0)
    assert verdict(flattering, found, found, True).word == "broken"


def test_the_filter_is_said_to_drop_a_style_where_it_drops_more_than_of_the_base():
    base = ["", "incoherence", *[""] * 22]
    said = filter_text(base, ["incoherence"] * 8 + ["empty"] + [""] * 15)
    assert said.startswith(
        "Of 24 such answers the filter drops 1 (1 incoherence); under the persona, 9 (8 incoherence, 1 e"
    )
    assert "1 empty): it would drop the style" in said
    for kept in (base, [""] * 24, ["narrates"] * 24, ["incoherence"] * 2 + [""] * 22):
        assert "under the persona, " in filter_text(base, kept) and "style" not in filter_text(base, kept)


def test_a_broken_round_says_that_others_follow_and_only_then():
    broken, moved = (Verdict(word, "answer mass 83% of base") for word in ("broken", "moved"))
    assert verdict_line(broken, 2) == verdict_line(broken, 0) + "; the next round starts from it, and may heal it"
    assert verdict_line(moved, 2) == verdict_line(moved, 0) == "moved (answer mass 83% of base)"


def test_the_best_prompt_is_chosen_on_every_fifth_item_and_measured_on_the_others_by_hand():
    """On items 0 and 5 the third prompt is best. On the others, where it is measured, the second would be."""
    scores = {
        "persona": [0.1] * 7,
        "second": [0.0, 0.9, 0.7, 0.5, 0.7, 0.1, 0.8],
        "third": [0.6, 0.1, 0.2, 0.0, 0.3, 0.5, 0.0],
    }
    tried = [[own[0], own[5]] for own in scores.values()]
    assert best_of(tried) == 2 and parts(scores["third"]) == ([0.6, 0.5], [0.1, 0.2, 0.0, 0.3, 0.0])
    read = PromptsReading(asked="same", systems=list(scores), tried=tried, scores=parts(scores["third"])[1])
    before, after = [9.0, 0.1, 0.0, 0.1, 0.1, 9.0, 0.0], [9.0, 0.6, 0.5, 0.6, 0.6, 9.0, 0.5]
    base, healed = (
        ArmReading(
            arm="a", instrument="contrast", dose=0.0, read=[], items={"contrast": items}, asked={"contrast": "same"}
        )
        for items in (before, after)
    )
    found = best_prompt(read, base, healed)
    assert (found.tried, found.system) == (3, "third")
    assert found.trait_over_base == pytest.approx(0.6 / 5 - 0.3 / 5)
    assert found.healed_over.mean == pytest.approx(2.8 / 5 - 0.6 / 5)
    with pytest.raises(ValueError, match="different items"):
        best_prompt(replace(read, asked="other"), base, healed)


def test_prompts_beside_the_persona_are_the_files_or_made_of_it():
    trait = load_trait("love")
    made = other_prompts(trait, [(f"Ask {i}", f"Say {i}") for i in range(4)])
    assert len({trait.positive, *made}) == 5 and all(text.startswith(trait.positive) for text in made)
    assert made[2].endswith('You reply: "Say 0"') and "Say 2" in made[3] and "Say 3" not in made[3]
    assert other_prompts(replace(trait, prompts=("You adore people.",)), []) == ["You adore people."]
