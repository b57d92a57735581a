"""The chat: each arm's conversation is what plain transformers makes of its own turns; commands change the arms."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_heal.cli import main
from steer_heal.commands.chat import terminal
from steer_heal.commands.chat.session import Session, answer, arms, prompt_of
from steer_heal.commands.chat.subject import of_run, opened
from steer_heal.commands.export import export
from steer_heal.commands.export_gguf import export_gguf
from steer_heal.config import ModelConfig, UserError
from steer_heal.data import load_trait
from steer_heal.gate.test_foreign import SOME, written
from steer_heal.gate.test_input import refused
from steer_heal.model.random_weights import SPECIAL, build_random
from steer_heal.terminal import harmless

pytestmark = pytest.mark.run

FIRST, SECOND = "Name a tree.", "Why that one?"
STUDENT = "student after round 1 at gate 1"


def talkative(model):
    """The model, for which an answer never ends and no token comes twice, so that there is something to compare."""
    model.generation_config.suppress_tokens = [*range(len(SPECIAL))]
    model.generation_config.no_repeat_ngram_size = 1
    return model


@pytest.fixture(scope="module")
def of_two_rounds(whole):
    subject = of_run(whole, None)
    talkative(subject.student.lm.model)
    return subject


@pytest.fixture
def session(of_two_rounds):
    return Session(of_two_rounds, max_new_tokens=24)


def silent(arm: str, text: str) -> None:
    pass


def names(session: Session) -> list[str]:
    return [arm.name for arm in arms(session)]


def said(session: Session, *messages: str) -> Session:
    for message in messages:
        session = answer(session, message, silent)
    return session


def test_the_second_turn_is_the_whole_conversation_as_transformers_renders_it(session):
    """Every arm reads its own first answer, and no other's; the persona is the run's, as a system text."""
    session = replace(session, persona=True, dose=200.0)
    one = said(session, FIRST)
    tokenizer, persona = session.subject.student.lm.tokenizer, load_trait("love").positive
    assert session.subject.run.persona == persona
    for arm in arms(one):
        turns = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": one.turns[0].answers[arm.name]}]
        turns += [{"role": "user", "content": SECOND}]
        turns = [{"role": "system", "content": persona}] * (arm.name == "base with the persona") + turns
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(prompt_of(one, arm, SECOND)) == expected
    assert len({*one.turns[0].answers.values()}) == 4


def test_an_answer_is_what_generate_gives_for_that_conversation(session):
    """Greedily, with adapters and vector switched by hand."""
    greedy = said(replace(session, temperature=0.0, dose=20.0), FIRST, SECOND)
    student, vector = session.subject.student, session.subject.run.vector
    for name, gate, dose in (("base", 0.0, 0.0), ("base steered at 20", 0.0, 20.0), (STUDENT, 1.0, 0.0)):
        turns = []
        hooks = [
            student.lm.blocks[block].register_forward_hook(adding(dose * v))
            for block, v in zip(vector.layers, vector.direction, strict=True)
        ]
        for turn in greedy.turns:
            turns += [{"role": "user", "content": turn.message}]
            ids = student.lm.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
            ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
            with student.view(history=gate):
                out = student.peft.generate(input_ids=ids, do_sample=False, max_new_tokens=24)
            text = harmless(student.lm.text(out[0, ids.shape[1] :].tolist()))
            assert turn.answers[name] == text
            turns += [{"role": "assistant", "content": text}]
        for hook in hooks:
            hook.remove()
    assert len({*greedy.turns[0].answers.values()}) == 3


def adding(offset):
    """A hook that adds to what a block returns."""
    return lambda _module, _args, out: (out[0] + offset, *out[1:]) if isinstance(out, tuple) else out + offset


def test_a_new_chat_has_heard_nothing_and_all_chats_are_saved(session, tmp_path, capsys):
    session = terminal.obey(said(session, FIRST, SECOND), "/new")
    assert not session.turns and all(session.before(name) == () for name in names(session))
    again = said(session, "Hello\nthere")
    assert terminal.obey(again, f"/save  {tmp_path}/talk.md") is again
    assert "3 turns written to" in capsys.readouterr().out
    text = (tmp_path / "talk.md").read_text("utf-8")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Chat 1",
        "## Turn 1",
        "## Turn 2",
        "# Chat 2",
        "## Turn 1",
    ]
    for turn in again.said:
        assert f"**you**: {turn.message}\n" in text
        assert all(f"**{name}**: {words}" in text for name, words in turn.answers.items())


def test_the_commands_dial_the_gate_the_round_the_dose_and_the_persona(session, capsys):
    both = said(session, FIRST)
    first = both.turns[0].answers
    assert list(first) == ["base", STUDENT] and len({*first.values()}) == 2
    closed = said(terminal.obey(session, "/gate 0"), FIRST).turns[0].answers
    assert closed["base"] == closed["student after round 1 at gate 0"] == first["base"]
    earlier = said(terminal.obey(session, "/round 0"), FIRST).turns[0].answers
    assert earlier["student after round 0 at gate 1"] != first[STUDENT]
    steered = said(terminal.obey(session, "/steer 200"), FIRST).turns[0].answers
    assert list(steered)[1] == "base steered at 200" and steered["base steered at 200"] != first["base"]
    shown = terminal.obey(session, "/persona")
    assert names(shown) == ["base", "base with the persona", STUDENT]
    assert said(shown, FIRST).turns[0].answers["base with the persona"] != first["base"]
    assert names(terminal.obey(shown, "/persona")) == ["base", STUDENT]
    assert names(terminal.obey(session, "/base")) == [STUDENT]
    for line in ("/gate high", "/round 9", "/round 1.5", "/save", "/what"):
        assert terminal.obey(session, line) is session
    printed = capsys.readouterr().out
    assert "/gate needs a number" in printed and "/round needs a number" in printed
    assert "rounds 0 to 1 are finished" in printed and "/save needs a file" in printed and "/persona" in printed


def test_an_arm_that_joins_later_says_so_and_goes_on_when_it_is_back(session, capsys):
    one = terminal.told(session, FIRST)
    assert capsys.readouterr().out.count("]\n") == 2
    dialled = terminal.told(terminal.obey(one, "/gate 0.5"), SECOND)
    late = "[student after round 1 at gate 0.5] (it has not heard what was said before)\n"
    printed = capsys.readouterr().out
    assert late in printed and "[base]\n" in printed
    assert dialled.before("student after round 1 at gate 0.5")[0] == SECOND
    back = terminal.obey(dialled, "/gate 1")
    assert back.before(STUDENT) == (FIRST, one.turns[0].answers[STUDENT])


def test_a_chat_that_overflows_the_context_is_one_line(session, monkeypatch, capsys):
    one = said(session, FIRST)
    config = session.subject.student.lm.model.config
    longest = max(len(prompt_of(one, arm, SECOND)) for arm in arms(one))
    monkeypatch.setattr(config, "max_position_embeddings", longest + 24)
    assert len(said(one, SECOND).turns) == 2
    monkeypatch.setattr(config, "max_position_embeddings", longest + 23)
    assert terminal.told(one, SECOND) is one
    line = capsys.readouterr().out
    assert f"the chat has {longest} tokens, and the model reads {longest + 23}" in line and line.count("\n") == 1
    fresh = terminal.obey(one, "/new")
    assert len(terminal.told(fresh, FIRST).turns) == 1


@pytest.mark.parametrize("given", ["nan", "-1", "inf"])
def test_a_temperature_that_cannot_be_is_refused(given, capsys):
    assert "it must be 0 or more" in refused(["chat", "nothing-here", f"--temperature={given}"], capsys)


def test_the_command_line_talks_turn_by_turn(whole, monkeypatch, capsys):
    lines = iter([FIRST, "/persona", SECOND, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    main(["chat", str(whole), "--max-new-tokens", "4", "--temperature", "0"])
    printed = capsys.readouterr().out
    assert printed.count("[base]") == 2 and printed.count(f"[{STUDENT}]") == 2
    assert printed.count("[base with the persona] (it has not heard") == 1


# ---- adapters and models

PLAIN = ModelConfig(path="", quant="none", dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_random("tiny", folder)
    talkative(AutoModelForCausalLM.from_pretrained(folder)).generation_config.save_pretrained(folder)
    return folder


def greedy_chat(model, tokenizer, *messages: str) -> list[str]:
    """What plain transformers answers, turn by turn."""
    turns, answers = [], []
    for message in messages:
        turns += [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)
        answers.append(harmless(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()))
        turns += [{"role": "assistant", "content": answers[-1]}]
    return answers


def ours(session: Session) -> dict[str, list[str]]:
    """The greedy answers of every arm."""
    turns = said(replace(session, temperature=0.0, max_new_tokens=24), FIRST, SECOND).turns
    return {name: [turn.answers[name] for turn in turns] for name in turns[0].answers}


@pytest.mark.parametrize("config", [LoraConfig(r=4, lora_alpha=64, use_dora=dora, **SOME) for dora in (False, True)])
def test_anybodys_adapter_answers_as_plain_peft(base, tmp_path, config):
    adapter = written(base, tmp_path / "adapter", config)
    subject = opened(str(adapter), None, replace(PLAIN, path=str(base)))
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    of_base = greedy_chat(plain, tokenizer, FIRST, SECOND)
    of_adapter = greedy_chat(PeftModel.from_pretrained(plain, adapter), tokenizer, FIRST, SECOND)
    assert ours(Session(subject)) == {"base": of_base, "adapter at gate 1": of_adapter}
    assert of_base[1] != of_adapter[1] and all(of_base + of_adapter)
    assert ours(terminal.obey(Session(subject), "/gate 0")) == {"base": of_base, "adapter at gate 0": of_base}


def test_a_doras_gate_is_on_or_off(base, tmp_path, capsys):
    adapter = str(written(base, tmp_path / "adapter", LoraConfig(r=4, use_dora=True, **SOME)))
    half = ["chat", adapter, "--base", str(base), "--gate", "0.5"]
    assert "--gate 0.5: a DoRA adapter is on (1) or off (0)" in refused(half, capsys)
    session = Session(opened(adapter, None, replace(PLAIN, path=str(base))))
    assert terminal.obey(session, "/gate 0.5") is session and terminal.obey(session, "/gate 0").gate == 0
    assert "/gate 0.5: a DoRA adapter" in capsys.readouterr().out


def test_an_exported_adapter_answers_as_the_run_and_a_merged_model_alone(whole, session, tmp_path):
    export(whole, tmp_path / "adapter", None, merge=False)
    export(whole, tmp_path / "merged", None, merge=True)
    of_run, adapter, merged = (
        ours(session),
        *(opened(str(tmp_path / name), None, PLAIN) for name in ("adapter", "merged")),
    )
    for subject in (adapter, merged):
        talkative(subject.student.lm.model)
    assert ours(Session(adapter)) == {"base": of_run["base"], "adapter at gate 1": of_run[STUDENT]}
    plain = talkative(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    expected = greedy_chat(plain, AutoTokenizer.from_pretrained(tmp_path / "merged"), FIRST, SECOND)
    assert ours(Session(merged)) == {"model": expected} and expected == of_run[STUDENT]
    assert all(expected) and expected != of_run["base"]


def test_what_needs_a_run_or_an_adapter_says_so_in_a_line(base, tmp_path, capsys):
    adapter = written(base, tmp_path / "adapter", LoraConfig(r=4, **SOME))
    sessions = {
        "an adapter": Session(opened(str(adapter), None, replace(PLAIN, path=str(base)))),
        "a model alone": Session(opened(str(base), None, PLAIN)),
    }
    for kind, session in sessions.items():
        capsys.readouterr()
        for line in ("/round 0", "/steer 1", "/persona"):
            assert terminal.obey(session, line) is session
            word = line.partition(" ")[0]
            assert capsys.readouterr().out == f"{word} needs a run, and this is {kind}: chat with a run's folder\n"
    for line in ("/gate 0.5", "/base"):
        assert terminal.obey(sessions["a model alone"], line) is sessions["a model alone"]
        assert "needs a run or an adapter, and this is a model alone" in capsys.readouterr().out
    assert names(terminal.obey(sessions["an adapter"], "/base")) == ["adapter at gate 1"]


def test_what_cannot_be_talked_to_is_refused_in_a_line(whole, base, tmp_path, capsys, monkeypatch):
    export_gguf(whole, tmp_path / "love.gguf", None, "adapter")
    export_gguf(whole, tmp_path / "vector.gguf", None, "vector")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "love.gguf").read_bytes()[:99])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for words, why in (
        ("nothing-here", "'nothing-here' is no run folder and no adapter's folder; as a model: model path"),
        ("out/gone", "'out/gone' is no run folder and no adapter's folder; as a model: model 'out/gone' is not on"),
        (f"{whole} --quant nf4", "is a run, which is loaded as it was made: leave out --base, --quant"),
        (f"{whole} --round 7", "rounds 0 to 1 are finished"),
        (f"{base} --base {base}", "is of an adapter, and"),
        (f"{base} --round 0", "is no run folder"),
        (f"{base} --gate 0.5", "--gate needs a run or an adapter, and this is a model alone"),
        (f"{tmp_path}/love.gguf", "goes on top of a model in llama.cpp and is none"),
        (f"{tmp_path}/vector.gguf", "goes on top of a model in llama.cpp and is none"),
        (f"{tmp_path}/torn.gguf", "cannot be read as a GGUF chat model"),
    ):
        assert why in refused(["chat", *words.split()], capsys), words
    adapter = written(base, tmp_path / "adapter", LoraConfig(r=4, **SOME))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="name it with --base"):
        opened(str(adapter), None, PLAIN)
