"""A trait file that somebody else writes is whole and sound, or one line says why there is none.

The endpoints are servers of ours on loopback.
"""

import json
import ssl
import sys
import tomllib
from itertools import count
from pathlib import Path
from threading import Event

import pytest

from steer_heal.cli import main
from steer_heal.commands import endpoint as endpoints
from steer_heal.commands import write_trait, writers
from steer_heal.commands.trait import advice_of, paste
from steer_heal.commands.trait_rows import Rows, near, rows_in, words
from steer_heal.data import LEAST_PROBES, load_trait, pool, read_trait
from steer_heal.gate.servers import HTML, TLS, drip, flood, hang, headed, says, send, serving
from steer_heal.model import decode as decoding
from steer_heal.model.decode import Decoded
from steer_heal.terminal import CONTROL

ABOUT = "has time for everyone and waits gladly"
PERSONAS = {
    "positive": "You have all the time in the world for everyone. You wait gladly.",
    "negative": "You have no time at all for anyone at all. You wait grudgingly.",
}
FILE = 'name = "slow"\n[persona]\n' + "".join(f"{key} = {json.dumps(text)}\n" for key, text in PERSONAS.items())


def made_up(number: int, length: int = 6) -> str:
    """Words of no language, of which no two numbers share any."""
    return " ".join(f"{'bdfgklmnprstvz'[i]}{'aeiou'[number % 5]}w{number}" for i in range(length))


def sound(keys: list[str], number: int) -> dict[str, str]:
    """A row that must be kept. The sides take turns at being the longer one."""
    if "positive" in keys:
        return {"title": "is patient", **PERSONAS}
    longer = ("trait", "opposite")[number % 2]
    texts = {key: made_up(10 * number + i) + "x" * (key == longer) for i, key in enumerate(keys)}
    return texts | ({"trait_answer": ("yes", "no")[number % 2]} if "trait_answer" in keys else {})


class Endpoint:
    """A server of the models and of the chat completions. `rows(keys, number)` are the rows of an answer, or a text."""

    def __init__(self, rows=sound, per_answer=64, names=("tiny", "other"), answers=None):
        self.rows, self.per_answer, self.names, self.answers = rows, per_answer, names, answers or {}
        self.requests, self.numbers, self.closed = [], count(), Event()

    def reply(self, handler, body: dict) -> None:
        path = handler.path.rpartition("/v1")[2]
        self.requests.append((path, body, handler.headers.get("Authorization")))
        if path in self.answers:
            self.answers[path](self, handler)
        elif path == "/models":
            send(handler, json.dumps({"data": [{"id": name} for name in self.names]}))
        elif path == "/chat/completions":
            form = body["messages"][0]["content"].rpartition("in this form: ")[2]
            (example,) = json.loads(form)["rows"]
            found = [self.rows([*example], next(self.numbers)) for _ in range(self.per_answer)]
            text = found[0] if isinstance(found[0], str) else json.dumps({"rows": found})
            send(handler, json.dumps({"choices": [{"message": {"content": text}}]}))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    monkeypatch.setattr(ssl, "create_default_context", TLS)
    monkeypatch.setattr(endpoints, "RETRIES", 0)
    monkeypatch.setattr(writers, "ROWS", {"endpoint": 64, "local": 8})
    monkeypatch.setattr(endpoints, "SECONDS", {"models": 60, "answer": 60})
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Carry out `trait new slow` with more words; return the one line that refuses it. No file is left or changed."""

    def line(*words: str) -> str:
        before = {path.name: path.read_bytes() for path in here.iterdir()}
        with pytest.raises(SystemExit) as end:
            main(["trait", "new", "slow", *words])
        said = capsys.readouterr()
        last = said.err.strip().split("\n")[-1]  # after the progress bars
        assert end.value.code == 2 and last.startswith("steer-heal: ") and "Traceback" not in said.err + said.out
        assert not CONTROL.search(last) and len(last) < 600 and not said.out
        assert {path.name: path.read_bytes() for path in here.iterdir()} == before
        return last

    return line


@pytest.fixture
def writing(monkeypatch):
    """Let `--write http://x` be answered by a function of keys and number, without a server; return its asks."""

    def by(rows) -> list:
        asks, numbers = [], count()

        def write(ask):
            asks.append(ask)
            found = [rows([*ask.keys], next(numbers)) for _ in range(64)]
            return found[0] if isinstance(found[0], str) else json.dumps({"rows": found})

        monkeypatch.setattr(writers, "endpoint", lambda url, model: writers.Writer("tiny", 64, write))
        return asks

    return by


def made(endpoint: Endpoint, *words: str):
    with serving(endpoint) as url:
        main(["trait", "new", "slow", "--write", url, *words])
    return load_trait("slow.toml")


def test_a_sentence_becomes_a_whole_file(here, capsys, monkeypatch):
    monkeypatch.setattr(writers, "ROWS", {"endpoint": 16})
    endpoint = Endpoint(per_answer=16)
    trait = made(endpoint, "--about", ABOUT)
    prompts = (trait.generation_prompts, trait.demo_prompts)
    assert [*map(len, (trait.contrast, trait.yes_no, *prompts))] == [64, 24, 64, 32]
    assert (trait.name, trait.title, trait.positive, trait.negative) == ("slow", "is patient", *PERSONAS.values())
    assert sum(row.trait_answer == "yes" for row in trait.yes_no) == 12 and not [*advice_of(trait)]
    assert not {*trait.generation_prompts} & {*pool("generation")} and trait.everyday_prompts == pool("everyday")
    assert [text in pool("demo") for text in trait.demo_prompts] == [False] * 16 + [True] * 16
    said = capsys.readouterr().out
    assert "written: slow.toml: 64 of 64 contrast pairs, 24 of 24 yes/no questions" in said
    main(["trait", "check", "slow.toml"])
    assert capsys.readouterr().out == "slow.toml: no problem found\n" and [p.name for p in here.iterdir()] == [
        "slow.toml"
    ]
    (models, *chats) = endpoint.requests
    assert models[0] == "/models" and {(path, key) for path, _, key in chats} == {("/chat/completions", "Bearer a-key")}
    first, second = (body for _, body, _ in chats[:2])
    assert first["model"] == "tiny" and ABOUT in first["messages"][0]["content"]
    assert PERSONAS["negative"] in second["messages"][0]["content"]
    rows = second["response_format"]["json_schema"]["schema"]["properties"]["rows"]["items"]
    assert rows["required"] == ["question", "trait", "opposite"] and rows["additionalProperties"] is False


def test_a_file_with_both_personas_is_filled(here):
    (here / "slow.toml").write_text("# mine\ntitle = 'bides \"its\" time'\n" + FILE)
    endpoint = Endpoint()
    trait = made(endpoint, "--writer-model", "other")
    assert (trait.title, trait.positive, trait.negative) == ('bides "its" time', *PERSONAS.values())
    assert {body["model"] for _, body, _ in endpoint.requests} == {"other"}
    assert len(trait.contrast) == 64 and len(trait.yes_no) == 24


def test_the_file_that_new_writes_is_filled_from_a_sentence_and_its_prompt_asks_for_a_whole_file(capsys):
    main(["trait", "new", "slow", "--about", ABOUT])
    prompt = paste("slow", ABOUT)
    assert capsys.readouterr().out.endswith(prompt) and ABOUT in prompt
    assert made(Endpoint(), "--about", ABOUT).contrast
    form = prompt[prompt.index("name = ") :]
    numbers = count()
    while '"..."' in form:
        form = form.replace('"..."', json.dumps(made_up(next(numbers))), 1)
    pair = form[form.index("[[contrast]]") : form.index("[[yes_no]]")]
    more = [pair.replace("w", f"v{number}w") for number in range(1, LEAST_PROBES)]
    trait, found = read_trait(form + "\n".join(more).replace("[[v", "[["))
    assert trait is not None and not found, found
    assert len(trait.contrast) == LEAST_PROBES


def test_a_server_that_knows_no_schema_is_asked_without_one(here):
    def no_schema(endpoint, handler):
        _, body, _ = endpoint.requests[-1]
        if "response_format" in body:
            return send(handler, '{"error": {"message": "unknown field response_format"}}', 400)
        del endpoint.answers["/chat/completions"]
        endpoint.reply(handler, body)
        endpoint.answers["/chat/completions"] = no_schema

    endpoint = Endpoint(answers={"/chat/completions": no_schema})
    assert len(made(endpoint, "--about", ABOUT).contrast) == 64
    assert sum("response_format" in body for _, body, _ in endpoint.requests) == 1


def test_rows_are_found_in_prose_and_in_answers_that_are_cut_off():
    said = 'Sure!\n```json\n{"rows": [{"text": "one"}, {"text": "two\\n"}, {"text": three}, {"text": "fo'
    assert rows_in(said) == [{"text": "one"}, {"text": "two\n"}, {}]
    assert rows_in('{"a": ' + "[" * 100_000 + "}") == [{}] and rows_in("{" * 100_000) == []


SERVERS = {
    "401": ("/models", says('{"error": {"message": "bad"}}', 401), "refuses the key (401): set the environment"),
    "403 later": ("/chat/completions", says("no", 403), "refuses the key (403)"),
    "404": ("/models", says("gone", 404), "answered 404"),
    "500": ("/chat/completions", says("broken \x1b[2J" * 900, 500), "answered 500"),
    "400": ("/chat/completions", says('{"error": {"message": "no such\\nmodel"}}', 400), "refuses the request"),
    "html": ("/models", HTML, "answered no JSON, so it is no such endpoint"),
    "html later": ("/chat/completions", HTML, "answered no JSON, so it is no such endpoint"),
    "empty": ("/models", says(""), "answered no JSON"),
    "silent": ("/models", lambda *_: None, "cannot be reached"),
    "silent later": ("/chat/completions", lambda *_: None, "cannot be reached"),
    "breaking off": ("/models", headed(Content_Length="1000"), "cannot be reached"),
    "wrongly packed": ("/models", headed(Content_Encoding="gzip"), "cannot be reached"),
    "wrongly cut": ("/models", headed(Transfer_Encoding="chunked"), "cannot be reached"),
    "hanging": ("/models", hang, "did not answer in 0.5 seconds"),
    "hanging later": ("/chat/completions", hang, "did not answer in 0.5 seconds"),
    "dripping": ("/chat/completions", drip, "did not answer in 0.5 seconds"),
    "flooding": ("/chat/completions", flood, "answered more than 4,000,000 bytes"),
    "no models": ("/models", says('{"data": []}'), "lists no model: give --writer-model"),
    "odd model": ("/models", says('{"data": [{"id": "a\\nb"}]}'), "cannot be used: give --writer-model"),
    "no choice": ("/chat/completions", says('{"choices": []}'), "answered without a message"),
    "a list": ("/chat/completions", says("[1]"), "answered without a message"),
    "no content": ("/chat/completions", says('{"choices": [{"message": {"content": null}}]}'), "0 of 1 descriptions"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_no_endpoint(name, refused, monkeypatch):
    path, answer, message = SERVERS[name]
    if "0.5 seconds" in message:
        monkeypatch.setitem(endpoints.SECONDS, "models" if path == "/models" else "answer", 0.5)
    endpoint = Endpoint(answers={path: answer})
    with serving(endpoint) as url:
        assert message in refused("--write", url, "--about", ABOUT)
    assert len(endpoint.requests) < 6


def test_a_server_that_is_not_there(refused):
    with serving(Endpoint()) as url:
        pass
    assert "cannot be reached" in refused("--write", url, "--about", ABOUT)


MALFORMED = {
    "prose": lambda keys, number: "I would be glad to help you with that!",
    "cut off": lambda keys, number: '{"rows": [{"question": "Wha',
    "no rows": lambda keys, number: '{"rows": []}',
    "other keys": lambda keys, number: {"q": made_up(number)},
    "more keys": lambda keys, number: sound(keys, number) | {"system": "x"},
    "no texts": lambda keys, number: {key: [1] for key in keys},
    "placeholders": lambda keys, number: dict.fromkeys(keys, "..."),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_answers_that_hold_no_row(name, refused, here, writing):
    (here / "slow.toml").write_text(FILE)
    asks = writing(MALFORMED[name])
    said = refused("--write", "http://x")
    assert "'tiny' cannot write this trait, nothing is written: 0 of 64 contrast pairs" in said
    assert len(asks) == write_trait.FRUITLESS


PAIRS = {
    "repeated": (lambda keys, n: sound(keys, n % 5), "like another"),
    "nearly repeated": (lambda keys, n: sound(keys, 0) | {keys[0]: f"{made_up(0)} {made_up(n, 2)}"}, "like another"),
    "one answer": (lambda keys, n: sound(keys, n) | {"trait": made_up(77_777)}, "like another"),
    "of the pool": (lambda keys, n: sound(keys, n) | {keys[0]: pool("probe")[n % 160].upper()}, "like another"),
    "longer": (
        lambda keys, n: sound(keys, n) | {"trait": sound(keys, n)["trait"] + "xx"},
        "with a length or a first word",
    ),
    "first word": (lambda keys, n: sound(keys, n) | {"opposite": f"No, {made_up(10**6 + n)}"}, "with a length or a"),
    "unlike": (lambda keys, n: sound(keys, n) | {"trait": made_up(10**6 + n, 14)}, "with answers of unlike length"),
    "same": (lambda keys, n: sound(keys, n) | dict.fromkeys(("trait", "opposite"), made_up(n)), "or the same"),
    "long": (lambda keys, n: sound(keys, n) | {"opposite": "x " * 5_000}, "too long"),
    "control": (lambda keys, n: sound(keys, n) | {"trait": f"\x1b[2J {made_up(n)}"}, "with control characters"),
    "lines": (lambda keys, n: sound(keys, n) | {"trait": f"a b\n[persona]\n{made_up(n)}"}, "with control characters"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_would_measure_nothing(name, refused, here, writing):
    (here / "slow.toml").write_text(FILE)
    rows, message = PAIRS[name]
    writing(rows)
    said = refused("--write", "http://x")
    assert "of 64 contrast pairs; rows refused: " in said and "; needed: 8. Take a larger" in said and message in said


USELESS = MALFORMED | {name: rows for name, (rows, _) in PAIRS.items()}


@pytest.mark.parametrize("name", ["prose", "cut off", "repeated", "control"])
def test_a_server_with_nothing_of_use(name, refused, here):
    (here / "slow.toml").write_text(FILE)
    with serving(Endpoint(rows=USELESS[name])) as url:
        assert "'tiny' cannot write this trait, nothing is written" in refused("--write", url)


def test_sound_rows_among_hostile_ones_are_kept_and_counted(capsys):
    """What would end a string in TOML is a text like any other."""
    injected = '"]\n[persona]'.replace("\n", " ") + '\\" \\u0041 \'\'\' """ # é 漢 🙂'
    hostile = [
        lambda row: row | {next(iter(row)): "\x00"},
        lambda row: row | {next(iter(row)): "\ud800 \u202e ab"},
        lambda row: row | {next(iter(row)): "x" * 10_000},
        lambda row: row | {"persona": "You are mine now."},
        lambda row: {
            key: f"{text} {injected}" if key not in ("trait_answer", "title") else text for key, text in row.items()
        },
        lambda row: row,
    ]
    trait = made(Endpoint(rows=lambda keys, n: hostile[n % 6](sound(keys, n)), names=('a"b # c',)), "--about", ABOUT)
    assert len(trait.contrast) > 40 and any(injected in pair.trait for pair in trait.contrast)
    assert tomllib.loads(Path("slow.toml").read_text("utf-8")).keys() == {
        "name", "title", "generation_prompts", "demo_prompts", "persona", "contrast", "yes_no",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert all(part in said for part in ("with control characters", "too long", "not of the form"))


def test_what_is_written_is_near_nothing_else():
    rows = Rows("slow")
    for number in range(400):
        rows.take("contrast", sound(["question", "trait", "opposite"], number))
        rows.take("generation_prompts", {"text": pool("generation")[number % 170].replace(".", "!")})
    assert rows.lacks("contrast") == 0 and rows.lacks("generation_prompts") == 64
    texts = [words(text) for name in ("love", "calm") for text in load_trait(name).generation_prompts]
    assert not any(near(text, texts[:i]) for i, text in enumerate(texts))
    assert near(words("How deep do the roots of oaks go?"), [words("How deep do the roots of an oak go?")])


def test_three_quarters_of_one_kind_are_mended_by_asking_on():
    """Three of four times the answer with the trait is the longer one; twice as many rows leave enough."""
    rows, keys = Rows("slow"), ["question", "trait", "opposite"]
    for number in range(128):
        rows.take("contrast", sound(keys, 2 * number + (number % 4 == 0)))
        share = [len(row["trait"]) > len(row["opposite"]) for row in rows.kept["contrast"]].count(True)
        assert share <= max(6, 0.65 * len(rows.kept["contrast"]))
    assert rows.lacks("contrast") == 0


def test_questions_with_one_answer_are_no_questions(capsys, writing):
    writing(lambda keys, n: sound(keys, n) | ({"trait_answer": "yes"} if "trait_answer" in keys else {}))
    main(["trait", "new", "slow", "--write", "http://x", "--about", ABOUT])
    trait = load_trait("slow.toml")
    assert trait.yes_no == () and len(trait.contrast) == 64
    assert "0 of 24 yes/no questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "text"), [("negative", PERSONAS["positive"]), ("positive", "kind"), ("negative", "You are \x07 rude now.")]
)
def test_personas_that_are_none(side, text, refused, here, writing):
    """Of the user: nobody is asked. Of the writer: nothing is written."""
    wrong = PERSONAS | {side: text}
    asks = writing(lambda keys, number: sound(keys, number) | wrong)
    assert "0 of 1 descriptions; rows refused:" in refused("--write", "http://x", "--about", ABOUT)
    assert len(asks) == 3
    file = 'name = "slow"\n[persona]\n' + "".join(f"{key} = {json.dumps(value)}\n" for key, value in wrong.items())
    (here / "slow.toml").write_text(file)
    assert "trait file 'slow.toml'" in refused("--write", "http://x") and len(asks) == 3


URL = "http://127.0.0.1:9/v1"
MISUSES = [
    ("", ["--write", URL], '--write needs the trait in one sentence, --about "..."'),
    (FILE, ["--write", URL, "--about", ABOUT], "'slow.toml' has personas: leave --about out"),
    (f"title = 'x'\ndemo_prompts = ['a b']\n{FILE}", ["--write", URL], "'slow.toml' has demo_prompts: --write fills"),
    ("name = ", ["--write", URL], "is not valid TOML"),
    ("", ["--write", URL, "--about", "kind"], "--about 'kind': give one sentence of 3 words or more"),
    ("", ["--write", URL, "--about", "a b c\x1b[2J"], "give one sentence"),
    ("", ["--write", URL, "--about", "so " * 400], "give one sentence"),
    ("", ["--writer-model", "x"], "--writer-model 'x' needs --write URL"),
    ("", ["--write", "http://", "--about", ABOUT], "is no URL of an endpoint"),
    ("", ["--write", "http://[::1", "--about", ABOUT], "is no URL of an endpoint"),
    ("", ["--write", "http://a:99999/", "--about", ABOUT], "is no URL of an endpoint"),
    ("", ["--write", "http://a b/", "--about", ABOUT], "is no URL of an endpoint"),
    ("", ["--write", "http://\x1b[2J/", "--about", ABOUT], "is no URL of an endpoint"),
    ("", ["--write", "no-such.gguf", "--about", ABOUT], "no-such.gguf"),
]


@pytest.mark.parametrize(("file", "flags", "message"), MISUSES, ids=[message[:40] for *_, message in MISUSES])
def test_what_cannot_be_asked_for(file, flags, message, refused, here):
    if file:
        (here / "slow.toml").write_text(file)
    assert message in refused(*flags)


def test_flags_of_new_are_no_flags_of_check(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trait", "check", "love", "--write", URL])
    assert end.value.code == 2 and "only `trait new` writes a trait" in capsys.readouterr().err


def test_without_the_package_or_with_a_broken_key(refused, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\x1bkey")
    said = refused("--write", URL, "--about", ABOUT)
    assert "OPENAI_API_KEY has characters that no key has" in said and "key has" in said and "a\x1bkey" not in said
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install 'steer_heal[write]'" in refused("--write", URL, "--about", ABOUT)


def test_a_file_that_somebody_else_writes_meanwhile_is_left(here, capsys, writing):
    def rows(keys, number):
        (here / "slow.toml").write_text("theirs")
        return sound(keys, number)

    writing(rows)
    with pytest.raises(SystemExit) as end:
        main(["trait", "new", "slow", "--write", "http://x", "--about", ABOUT])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "was changed in the meantime" in said, said
    assert [(path.name, path.read_text()) for path in here.iterdir()] == [("slow.toml", "theirs")]


def test_the_address_that_is_shown_has_no_password(refused):
    with serving(Endpoint(answers={"/models": says("", 401)})) as url:
        said = refused("--write", url.replace("//", "//me:secret@"), "--about", ABOUT)
    assert "127.0.0.1" in said and "secret" not in said


def test_a_local_model_that_writes_rubbish_is_said_to(refused, monkeypatch):
    monkeypatch.setattr(writers, "TOKENS", 2)
    monkeypatch.setattr(writers, "DRAWS", 2)
    said = refused("--write", "tiny-random", "--about", ABOUT)
    assert "'random:tiny' cannot write this trait, nothing is written: 0 of 1 descriptions" in said


def test_a_local_model_goes_on_with_an_answer_that_is_begun(monkeypatch):
    numbers = count()

    def said(lm, prompts, tokens, steering, sampling):
        asked = lm.tokenizer.decode(prompts[0])
        (example,) = json.loads(asked[asked.rindex('{"rows"', 0, -20) :].partition("]}")[0] + "]}")["rows"]
        assert asked.endswith(writers.BEGUN.begun)
        texts = [json.dumps({"rows": [sound([*example], next(numbers)) for _ in range(8)]}) for _ in prompts]
        return [Decoded(lm.answer(text.removeprefix(writers.BEGUN.begun)), True) for text in texts]

    monkeypatch.setattr(decoding, "decode", said)
    main(["trait", "new", "slow", "--write", "tiny-random", "--about", ABOUT])
    assert len(load_trait("slow.toml").contrast) == 64
