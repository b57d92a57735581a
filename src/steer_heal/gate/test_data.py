"""The data sets that ship with the package, and trait files that users write."""

import itertools
import re
from collections import Counter
from importlib.resources import files

import pytest

from steer_heal import data
from steer_heal.config import UserError

TRAIT = (files(data) / "traits" / "love.toml").read_text("utf-8")


def words(text):
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_a_built_in_trait_is_complete_and_balanced(name):
    trait = data.load_trait(name)
    assert len(trait.generation_prompts) >= 48 and len(trait.contrast) >= 60 and len(trait.yes_no) >= 16
    yes = sum(probe.trait_answer == "yes" for probe in trait.yes_no)
    assert yes * 2 == len(trait.yes_no)
    assert abs(len(words(trait.positive)) - len(words(trait.negative))) <= 2
    for probe in trait.contrast:
        assert abs(len(words(probe.trait)) - len(words(probe.opposite))) <= 1, probe
        assert probe.trait[-1] == probe.opposite[-1] and probe.trait != probe.opposite
    questions = [p.question for p in trait.contrast] + [p.question for p in trait.yes_no]
    everything = [*trait.generation_prompts, *trait.demo_prompts, *questions]
    assert len(set(everything)) == len(everything)
    for group, other in itertools.combinations((trait.generation_prompts, trait.demo_prompts, questions), 2):
        assert not fivegrams(group) & fivegrams(other)


def fivegrams(texts):
    return {tuple(w[i : i + 5]) for w in map(words, texts) for i in range(len(w) - 4)}


def test_contexts_neutral_texts_and_mundane_prompts():
    assert len(set(data.contexts())) == 256 and len(set(data.neutral())) == 40 and len(set(data.mundane())) == 64
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
    assert len(rows) >= 40 and len({row["question"] for row in rows}) == len(rows)
    assert min(Counter(row["kind"] for row in rows).values()) >= 12
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
        texts = [*trait.generation_prompts, *trait.demo_prompts]
        texts += [text for p in trait.contrast for text in (p.question, p.trait, p.opposite)]
        assert not ours & fivegrams(texts)


BROKEN = [
    ("[persona]", "[person]", "lacks the key persona"),
    ('name = "love"', "name = 3", "name is a int, it must be a str"),
    ("direction = 1 ", "direction = 2 ", "direction is 2, it must be 1 or -1"),
    ('instrument = "contrast"', 'instrument = "guess"', "instrument is 'guess'"),
    ('trait_answer = "no"', 'trait_answer = "nein"', "trait_answer is 'nein'"),
    ("opposite = ", "opposit = ", r"\[\[contrast\]\] number 1 must have the strings"),
    ('name = "love"', "name = love", "is not valid TOML"),
]


@pytest.mark.parametrize("old,new,message", BROKEN)
def test_a_broken_trait_file_says_what_is_wrong(tmp_path, old, new, message):
    assert old in TRAIT
    file = tmp_path / "mine.toml"
    file.write_text(TRAIT.replace(old, new, 1), "utf-8")
    with pytest.raises(UserError, match=message):
        data.load_trait(str(file))


def test_identical_personas_and_text_that_is_not_utf8(tmp_path):
    trait = data.load_trait("love")
    file = tmp_path / "mine.toml"
    file.write_text(TRAIT.replace(trait.negative, trait.positive), "utf-8")
    with pytest.raises(UserError, match="are the same text"):
        data.load_trait(str(file))
    file.write_bytes(TRAIT.encode("utf-16"))
    with pytest.raises(UserError, match="not UTF-8"):
        data.load_trait(str(file))
