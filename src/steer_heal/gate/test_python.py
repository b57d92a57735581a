"""The Python interface: its examples run, it does what the command line does, its errors are those of the user."""

import ast
import doctest
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steer_heal as sh
from steer_heal import python
from steer_heal.bake.student import Student
from steer_heal.config import UserError
from steer_heal.gate.conftest import tiny
from steer_heal.model.steering import Steering, Vector, steering
from steer_heal.runs.student import student_after

pytestmark = pytest.mark.run

NOTEBOOK = Path(__file__).parents[3] / "docs" / "tutorial.ipynb"
PERSONAS = "You adore trains and talk of little else.", "Trains bore you. You never speak of them."
LEFT_OUT = ["off_target", "profile", "frames", "refusals", "relevance", "plain"]
SMALL = {"rounds": 1, "anyway": True, "eval.leave-out": LEFT_OUT}


def test_the_examples_of_the_docstrings_run():
    found = doctest.testmod(python)
    assert found.attempted >= 5 and found.failed == 0


def test_only_the_names_that_are_promised(capsys):
    assert {*sh.__all__} == {"VERSION", *python.__all__}
    assert all(hasattr(sh, name) for name in sh.__all__)
    with pytest.raises(AttributeError, match="torch_model"):
        sh.torch_model  # noqa: B018


def test_a_trait_of_two_sentences_takes_any_text():
    """The same as from a file, also with quotes, backslashes, line ends and other alphabets in it."""
    odd = 'Say "tschüß" \\ to \U0001f642\nand go. There is much to say about it.'
    found = sh.Trait.from_personas("odd", odd, PERSONAS[1])
    assert (found.name, found.positive, found.negative) == ("odd", odd, PERSONAS[1])
    assert found.generation_prompts and not found.contrast
    with pytest.raises(UserError, match="trait file 'same'"):
        sh.Trait.from_personas("same", PERSONAS[0], PERSONAS[0])


def test_an_answer_is_the_models_greedy_one_steered_or_not():
    lm = tiny()
    vector = sh.extract(lm, sh.load_trait("love"), contexts=4).vector
    assert isinstance(vector, Vector)
    prompt = torch.tensor([lm.prompt("Hello!", "Be brief.")])
    for dose in (None, 5.0):
        with steering(lm, None if dose is None else Steering(vector, torch.tensor([dose]))) as dial:
            if dose is not None:
                dial.turn(torch.tensor([dose]))
            ids = lm.model.generate(prompt, do_sample=False, max_new_tokens=6, eos_token_id=sorted(lm.end_tokens))
        plain = lm.text(ids[0, prompt.shape[1] :].tolist())
        steered = {} if dose is None else {"vector": vector, "dose": dose}
        assert sh.answer(lm, "Hello!", "Be brief.", tokens=6, **steered) == plain


def test_a_run_with_a_trait_of_ones_own(tmp_path, capsys):
    trains = sh.Trait.from_personas("trains", *PERSONAS)
    result = sh.run("tiny-random", sh.load_trait("love"), out=str(tmp_path), **SMALL)
    config = json.loads((result.folder / "config.json").read_text())
    assert config["rounds"] == 1 and config["trait"] == "love.toml" and "plain" in config["eval"]["leave_out"]
    assert result.summary.trait == "love" and result.verdict.count("A limit of damage was passed:") == 1
    said = {gate: result.chat("Hello!", gate=gate, tokens=8) for gate in (0.0, 1.0)}
    same = student_after(result.folder, config, 1)
    for gate, text in said.items():
        with same.view(history=gate, now=0.0):
            assert sh.answer(same.lm, "Hello!", tokens=8) == text
    assert said[0.0] == sh.answer(Student(sh.load("tiny-random", dtype="float32")).lm, "Hello!", tokens=8)
    assert result.report().read_text("utf-8").startswith("<!doctype html>")
    again = sh.resume(result.folder)
    assert again.summary == result.summary
    with pytest.raises(UserError, match=r"heal\.lora\.q"):
        sh.run("tiny-random", trains, **{"heal.lora.q": 1})
    with pytest.raises(UserError, match="'lvoe' is not built in"):
        sh.run("tiny-random", "lvoe", out=str(tmp_path))


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    probes = sh.load_trait("love").contrast[:8]  # a random model cannot write its own
    made = sh.Trait.from_personas
    monkeypatch.setattr(sh.Trait, "from_personas", lambda *said: replace(made(*said), contrast=probes))
    names, shown = {}, None
    for cell in cells:
        assert not cell["outputs"]  # it is kept without
        *body, last = ast.parse("".join(cell["source"]).replace("smollm2-135m", "tiny-random")).body
        exec(compile(ast.Module(body, []), "notebook", "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), "notebook", "exec"), names)
    page, adapter = shown
    assert page.is_file() and (adapter / "adapter_config.json").is_file()
    assert len(names["result"].figure().data) == 3
