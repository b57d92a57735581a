"""An invalid trait file is refused in one line that names the key, the value and the remedy."""

import json
import os
import re
import tomllib
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_heal.cli import main
from steer_heal.commands.run import require_room
from steer_heal.commands.trait import advice_of
from steer_heal.config import UserError
from steer_heal.data import BUILT_IN, HERE, INSTRUMENTS, Trait, load_trait, parse_trait, pool, read_trait, restored
from steer_heal.eval.catalogue import OF_TRAIT
from steer_heal.gate.conftest import turned
from steer_heal.presets import PRESETS
from steer_heal.records import unstructured
from steer_heal.stages.run import roomy
from steer_heal.terminal import CONTROL

LOVE = tomllib.loads((HERE / "traits" / "love.toml").read_text("utf-8"))


def toml(value: object) -> str:
    """A value as TOML. Control characters and quotes are escaped as in JSON, which TOML reads the same way."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value).replace("\x7f", "\\u007f")
        case dict():
            return "{" + ", ".join(f"{toml(str(key))} = {toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case _:
            return str(value)


def written(table: dict) -> str:
    return "\n".join(f"{toml(key)} = {toml(value)}" for key, value in table.items())


def refused(text: str) -> str:
    with pytest.raises(UserError) as error:
        parse_trait(text, "mine.toml")
    said = str(error.value)
    assert said.startswith("trait file 'mine.toml'") and not CONTROL.search(said) and "\n" not in said
    assert len(said) < 400
    return said


def put(*path, value):
    """An edit that sets the value at the path."""

    def edit(table: dict) -> None:
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return edit


def drop(*path):
    def edit(table: dict) -> None:
        for key in path[:-1]:
            table = table[key]
        del table[path[-1]]

    return edit


def again(pool: str):
    return lambda table: table[pool].append(deepcopy(table[pool][0]))


def all_yes(table: dict) -> None:
    for row in table["yes_no"]:
        row["trait_answer"] = "yes"


MISTAKES = [
    (drop("name"), "lacks the key name (str): `steer-heal trait new` writes a file to start from"),
    (drop("persona"), "lacks the key persona (dict)"),
    (drop("persona", "negative"), "[persona] lacks the key negative"),
    (drop("contrast", 3, "opposite"), "[[contrast]] number 4 lacks the key opposite"),
    (put("persona", "positive", value="kind"), "persona.positive is 'kind': describe it in 4 words or more"),
    (put("persona", "negative", value="You are rude. " * 200), "at most 2000 characters"),
    (put("persona", "positive", value="You are \x1b[2J very kind."), "it has a control character"),
    (put("persona", "positive", value="You ... (describe the positive side)"), "describe it in 4 words or more"),
    (put("contrast", value=LOVE["contrast"][:7]), "[[contrast]] has 7 probes: an interval needs 8"),
    (put("yes_no", value=[]), "[[yes_no]] is empty"),
    (put("generation_promts", value=[]), "unknown key 'generation_promts' (did you mean 'generation_prompts'?)"),
    (put("persona", "postive", value="x"), "[persona] has the unknown key 'postive' (did you mean 'positive'?)"),
    (put("contrast", 0, "answer", value="x"), "[[contrast]] number 1 has the unknown key 'answer': take it out"),
    (put("yes_no", 1, "trait_anwser", value="x"), "(did you mean 'trait_answer'?)"),
    (put("name", value=3), "name is 3, a int: it must be a str"),
    (put("name", value="  "), "name is '  ': write a text"),
    (put("name", value="x" * 65), "at most 64 characters"),
    (put("name", value="a\x1b[2Jb"), "none of them a control character"),
    (put("title", value=""), "title is '': write a text"),
    (put("direction", value=2), "direction is 2, it must be 1 or -1"),
    (put("direction", value=True), "direction is True, a bool: it must be a int"),
    (put("direction", value="1"), "direction is '1', a str"),
    (put("instrument", value="contrats"), "instrument is 'contrats', it must be 'contrast' or 'yes_no' or 'whole'"),
    (put("answer_tokens", value=7), "answer_tokens is 7, it must be 8 to 512"),
    (put("answer_tokens", value=513), "answer_tokens is 513, it must be 8 to 512"),
    (put("answer_tokens", value="96"), "answer_tokens is '96', a str: it must be a int"),
    (put("answer_tokens", value=True), "answer_tokens is True, a bool"),
    (put("prompts", value=[]), "prompts is empty: write some"),
    (put("prompts", value=["Be kind.", " "]), "prompts number 2 is ' ': write a text"),
    (put("prompts", value=["Be kind.", "be  kind."]), "prompts has 'be kind.' twice"),
    (put("prompts", value=list("abcde")), "prompts has 5 system prompts: at most 4 beside the persona"),
    (put("answer_token", value=96), "(did you mean 'answer_tokens'?)"),
    (put("persona", value="kind"), "persona is 'kind', a str: it must be a dict"),
    (put("persona", "positive", value="\n"), r"positive is '\n': write a text"),
    (put("persona", "negative", value=LOVE["persona"]["positive"].upper() + " "), "are the same text"),
    (put("generation_prompts", value=[]), "generation_prompts is empty"),
    (put("generation_prompts", value="one"), "generation_prompts is 'one', a str: it must be a list"),
    (put("generation_prompts", 2, value=5), "generation_prompts number 3 is 5: write a text"),
    (put("demo_prompts", 0, value=" "), "demo_prompts number 1 is ' ': write a text"),
    (put("demo_prompts", 1, value=LOVE["generation_prompts"][0].upper()), "which is a generation prompt"),
    (again("generation_prompts"), "twice: take one out"),
    (again("demo_prompts"), "demo_prompts has"),
    (again("contrast"), "[[contrast]] has"),
    (again("yes_no"), "[[yes_no]] has"),
    (put("contrast", value=[]), "[[contrast]] is empty"),
    (put("contrast", value=["a question"]), "[[contrast]] number 1 is 'a question': write question, trait, opposite"),
    (put("contrast", 0, "opposite", value=LOVE["contrast"][0]["trait"]), "has the same answer twice"),
    (put("contrast", 0, "trait", value=False), "[[contrast]] number 1: trait is False, a bool"),
    (put("yes_no", 0, "trait_answer", value="maybe"), "trait_answer is 'maybe', it must be 'yes' or 'no'"),
    (all_yes, "probes whose trait_answer is 'yes' and 0 with 'no'"),
]


@pytest.mark.parametrize(("edit", "message"), MISTAKES, ids=[message[:50] for _, message in MISTAKES])
def test_a_trait_that_cannot_work(edit, message):
    table = deepcopy(LOVE)
    edit(table)
    said = refused(written(table))
    assert message in said, said


SMALL = {"name": "patient", "persona": {key: LOVE["persona"][key] for key in ("positive", "negative")}}


def test_a_name_and_two_personas_are_enough():
    found = parse_trait(written(SMALL), "mine.toml")
    assert (found.title, found.instrument, found.direction) == ("patient", "contrast", 1)
    assert found.generation_prompts == pool("generation") and found.demo_prompts == pool("demo")
    assert found.asked_of_teacher == (*pool("generation"), *pool("everyday")[:85])
    assert found.contrast == found.yes_no == () and len(found.questions) == 24
    assert load_trait("love").questions == load_trait("love").yes_no
    with pytest.raises(UserError, match=r"there are no \[\[yes_no\]\] questions"):
        parse_trait(written(SMALL | {"instrument": "yes_no"}), "mine.toml")
    assert load_trait("authority") == load_trait("care-over-authority")


def test_a_style_asks_for_whole_answers_and_for_room():
    style = parse_trait(written({"instrument": "whole", "answer_tokens": 96} | SMALL), "mine.toml")
    assert (style.instrument, style.answer_tokens) == ("whole", 96) and restored(unstructured(style)) == style
    plain = parse_trait(written(SMALL), "mine.toml")
    stored = unstructured(plain)
    assert plain.answer_tokens is None and "answer_tokens" not in stored and restored(stored) == plain
    assert {*OF_TRAIT} == {*INSTRUMENTS}
    text = 'name = "x"\ninstrument = "hole"\nanswer_tokens = 1000\n[persona]\n'
    _, found = read_trait(text + "\n".join(f"{key} = {toml(value)}" for key, value in SMALL["persona"].items()))
    assert [one.line for one in found] == [2, 3]
    config, flag = PRESETS["tiny-random"], ["--distil.max_new_tokens=12"]
    assert roomy(config, style).distil.max_new_tokens == 96 and roomy(config, plain) == config
    require_room(config, style, [])
    require_room(config, plain, flag)
    require_room(turned(config, {"distil.max_new_tokens": 96}), style, flag)
    with pytest.raises(UserError, match=r"max-new-tokens is 12, and the trait 'patient' asks for answers of 96 tokens"):
        require_room(config, style, flag)


def test_all_problems_of_a_file_come_at_once_with_their_lines():
    text = (
        'nam = "x"\ndirection = "1"\ntitle = ""\n[persona]\npositive = "kind"\nnegative = "You are rude and loud."\n'
        '[[contrast]]\nquestion = "q"\ntrait = "a"\nopposite = "b"\n[[contrast]]\nquestion = "r"\ntrait = 3\n'
    )
    trait, found = read_trait(text)
    keys = ("nam'", "name (", "direction", "title", "positive", "number 2: trait", "number 2 lacks")
    at = {key: one.line for one in found for key in keys if key in one.what}
    assert trait is None and list(at.values()) == [1, None, 3, 2, 5, 13, 11] and len(found) == 7
    with pytest.raises(UserError, match=r"and 6 more: `steer-heal trait check` lists all"):
        parse_trait(text, "mine.toml")


def test_a_file_is_begun_checked_and_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["trait", "new", "patient"])
    for words in ("new patient", "new Not-a-name", "show nobody", "check patient.toml", "list x", "check gone.toml"):
        with pytest.raises(SystemExit) as end:
            main(["trait", *words.split()])
        assert end.value.code == 2
    said = capsys.readouterr()
    assert "patient.toml, line 7: persona.positive" in said.out and "2 problems to mend" in said.err
    file = tmp_path / "patient.toml"
    text = file.read_text("utf-8")
    for side in ("positive", "negative"):
        text = re.sub(rf'{side} = "You \.\.\.[^"]*"', f"{side} = {json.dumps(LOVE['persona'][side])}", text)
    file.write_text(text, "utf-8")
    main(["trait", "check", "patient.toml"])
    main(["trait", "list"])
    main(["trait", "show", "love"])
    said = capsys.readouterr().out
    assert "patient.toml: no problem found" in said and all(name in said for name in BUILT_IN)
    assert (HERE / "traits" / "love.toml").read_text("utf-8") in said


def test_what_tells_the_two_sides_apart_by_itself_is_said():
    probes = [{"question": f"q{i}?", "trait": "Yes, " + "so " * 9, "opposite": f"no{i}"} for i in range(9)]
    table = SMALL | {"contrast": probes, "generation_prompts": ["q3?"]}
    table["persona"] = table["persona"] | {"negative": "You are rude and loud."}
    trait, _ = read_trait(written(table))
    said = "\n".join(advice_of(trait))
    for part in (
        "9 contrast probes: expect intervals",
        "longer one in 100%",
        "begin with 'yes,'",
        "write them equally",
    ):
        assert part in said
    assert "1 prompts are also probes" in said and "opposite answers begin" not in said
    said = "\n".join(advice_of(replace(trait, instrument="whole")))
    assert "longer one" not in said and "nats per token" not in said and "begin with 'yes,'" in said


def test_what_is_sound_is_taken(tmp_path):
    assert parse_trait(written(LOVE), "mine.toml") == load_trait("love")
    assert all(isinstance(load_trait(name), Trait) for name in BUILT_IN)
    file = tmp_path / "windows.toml"
    file.write_text(written(LOVE), "utf-8-sig")
    assert load_trait(str(file)) == load_trait("love")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes('name = "für"'.encode("latin-1"))
    (tmp_path / "broken.toml").write_text('name = "x')
    for name, message in (
        ("folder.toml", "is a folder: give a .toml file"),
        ("latin.toml", "is not UTF-8 text (byte 9): save it as UTF-8"),
        ("broken.toml", "is not valid TOML"),
        ("gone.toml", "no such .toml file exists"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            load_trait(str(tmp_path / name))
    if os.geteuid() != 0:  # root may read everything
        (tmp_path / "latin.toml").chmod(0)
        with pytest.raises(UserError, match="cannot be read"):
            load_trait(str(tmp_path / "latin.toml"))


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=5,
)


def taken_or_refused(read, *given) -> None:
    try:
        assert isinstance(read(*given), Trait)
    except UserError as error:
        said = str(error)
        assert not CONTROL.search(said) and "\n" not in said and len(said) < 500


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_love_with_anything_changed(drawn):
    table = deepcopy(LOVE)
    for _ in range(drawn.draw(st.integers(1, 3))):
        place = table
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(min(3, len(place))))
            if not keys:
                break
            key = drawn.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and drawn.draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and drawn.draw(st.booleans()):
                place[drawn.draw(st.text(max_size=12))] = place.pop(key)
            else:
                place[key] = drawn.draw(VALUES)
            break
    taken_or_refused(parse_trait, written(table), "mine.toml")


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.just(b"[" * 9000)))
def test_any_bytes(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "mine.toml"
    file.write_bytes(content)
    taken_or_refused(load_trait, str(file))
