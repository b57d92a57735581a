"""The data sets that ship with the package."""

import itertools
import re
from collections import Counter

import pytest

from steer_heal import data


def words(text):
    return re.findall(r"[a-z']+", text.lower())


SMALL = ("formal", "less-sycophantic")  # built-in traits that are a name and two personas


@pytest.mark.parametrize("name", SMALL)
def test_the_personas_of_a_small_trait_are_of_one_length(name):
    trait = data.load_trait(name)
    assert not trait.contrast and not trait.yes_no and trait.title != name
    assert abs(len(words(trait.positive)) - len(words(trait.negative))) <= 3


@pytest.mark.parametrize("name", [name for name in data.BUILT_IN if name not in SMALL])
def test_a_built_in_trait_is_complete_and_balanced(name):
    trait = data.load_trait(name)
    assert (
        len(trait.generation_prompts) >= 48
        and len(trait.everyday_prompts) >= 24
        and len(trait.contrast) >= 60
        and len(trait.yes_no) >= 16
    )
    yes = sum(probe.trait_answer == "yes" for probe in trait.yes_no)
    assert yes * 2 == len(trait.yes_no)
    assert abs(len(words(trait.positive)) - len(words(trait.negative))) <= 2
    for probe in trait.contrast:
        assert abs(len(words(probe.trait)) - len(words(probe.opposite))) <= 1, probe
        assert probe.trait[-1] == probe.opposite[-1] and probe.trait != probe.opposite
    questions = [p.question for p in trait.contrast] + [p.question for p in trait.yes_no]
    everything = [*trained_on(trait), *trait.demo_prompts, *questions]
    assert len(set(everything)) == len(everything)
    for group, other in itertools.combinations((trained_on(trait), trait.demo_prompts, questions), 2):
        assert not fivegrams(group) & fivegrams(other)


def trained_on(trait):
    return (*trait.generation_prompts, *trait.everyday_prompts)


def fivegrams(texts):
    return {tuple(w[i : i + 5]) for w in map(words, texts) for i in range(len(w) - 4)}


def test_nothing_that_is_measured_is_nearly_trained_on():
    """Too near: two or more shared words that are half of the shorter text. Short and frequent words do not count."""
    traits = [trait for trait in map(data.load_trait, data.BUILT_IN) if trait.contrast]
    probes = [p.question for t in traits for p in (*t.contrast, *t.yes_no)]
    probes += [p.question for some in data.off_target().values() for p in some]
    probes += [f"{row['question']} {row['right']}" for row in data.canary()]
    requests = [row["text"] for row in data._records_of("refusals")]
    probes += requests
    trained = list(data.mundane())  # the anchor joins the training of every trait
    groups = [(trained, [*probes, *(text for t in traits for text in (*t.demo_prompts, *trained_on(t)))])]
    for trait in traits:
        measured = [*trait.demo_prompts, *(p.question for p in (*trait.contrast, *trait.yes_no))]
        groups.append((trained_on(trait), [*measured, *requests, *(row["question"] for row in data.canary())]))
    shown = [*data.pool("demo"), *data.pool("probe"), *requests]  # and those of a trait that is a name and two personas
    groups.append(
        ((*data.pool("generation"), *data.pool("everyday")), [*shown, *(row["question"] for row in data.canary())])
    )
    groups += [(trained, shown), (data.plain(), data.neutral())]
    texts = {text for group in groups for some in group for text in some}
    used = Counter(word for text in texts for word in {*words(text)})

    telling = {text: {word for word in words(text) if len(word) > 3 and used[word] <= 6} for text in texts}
    for some, others in groups:
        for one, other in itertools.product(some, others):
            left, right = telling[one], telling[other]
            assert len(left & right) < 2 or 2 * len(left & right) < min(len(left), len(right)), (one, other)


def test_the_pool_has_every_kind_and_no_text_twice():
    rows = data._records_of("pool")
    assert Counter(row["use"] for row in rows) == {"generation": 170, "everyday": 86, "demo": 40, "probe": 160}
    assert len({row["text"].lower() for row in rows}) == len(rows)
    generation = Counter(row["kind"] for row in rows if row["use"] == "generation")
    assert len(generation) == 6 and "everyday" not in generation
    assert all(row["kind"] == "everyday" for row in rows if row["use"] == "everyday")
    uses = [{*data.pool(use)} for use in ("generation", "everyday", "demo", "probe")]
    for one, other in itertools.combinations(uses, 2):
        assert not fivegrams(one) & fivegrams(other)
    assert not {*data.contexts()} & set().union(*uses)


def test_contexts_neutral_texts_and_mundane_prompts():
    assert len(set(data.contexts())) == 256 and len(set(data.neutral())) == 40 and len(set(data.mundane())) == 96
    assert sum(len(words(text)) for text in data.neutral()) > 2000


FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "norms")


def test_vignettes_are_balanced_and_none_repeats_another():
    rows = data.vignettes()
    assert Counter(row["foundation"] for row in rows) == dict.fromkeys(FOUNDATIONS, 20)
    for foundation in FOUNDATIONS:
        severity = Counter(row["severity"] for row in rows if row["foundation"] == foundation)
        assert set(severity) == {1, 2, 3} and min(severity.values()) >= 5
    for row in rows:
        assert row["see"].startswith("You see ") and row["do"].startswith("You ") and row["see"].endswith(".")
        assert 10 <= len(words(row["see"])) <= 26 and abs(len(words(row["see"])) - len(words(row["do"]))) <= 3
        assert not set(words(row["see"] + row["do"])) & {*FOUNDATIONS, "fair", "unfair", "loyal", "obey", "freedom"}
    scenes = [row["see"].removeprefix("You see ") for row in rows]
    for one, other in itertools.combinations(scenes, 2):
        assert not fivegrams([one]) & fivegrams([other])


def test_canary_questions_have_one_right_answer_of_the_form_of_the_wrong_ones():
    rows = data.canary()
    assert len(rows) == 180 and len({row["question"] for row in rows}) == len(rows)
    assert min(Counter(row["kind"] for row in rows).values()) >= 48
    for row in rows:
        answers = [row["right"], *row["wrong"]]
        assert len(set(answers)) == 4 and all(len(a.split()) == len(row["right"].split()) for a in answers), row


def test_off_target_probes_are_minimal_pairs_that_touch_no_target():
    groups = data.off_target()
    assert {name: len(probes) for name, probes in groups.items()} == dict.fromkeys(
        ("boldness", "tidiness", "thrift", "novelty", "optimism"), 16
    )
    probes = [probe for some in groups.values() for probe in some]
    assert len({p.question for p in probes}) == len(probes)
    for name, some in groups.items():
        length = [sum(len(getattr(p, side)) for p in some) for side in ("trait", "opposite")]
        assert abs(length[0] / length[1] - 1) < 0.03, name
    for probe in probes:
        assert abs(len(words(probe.trait)) - len(words(probe.opposite))) <= 1, probe
        assert probe.trait[-1] == probe.opposite[-1] and probe.trait != probe.opposite
    ours = fivegrams(text for p in probes for text in (p.question, p.trait, p.opposite))
    for name in data.BUILT_IN:
        trait = data.load_trait(name)
        texts = [*trained_on(trait), *trait.demo_prompts]
        texts += [text for p in trait.contrast for text in (p.question, p.trait, p.opposite)]
        assert not ours & fivegrams(texts)
