"""Exported files: plain PEFT and plain transformers load them, and they give the student's logits."""

import errno
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.bench import demo
from steer_heal.commands import export as exporting
from steer_heal.commands.evaluate import evaluate_alone
from steer_heal.commands.export import export, require_mergeable
from steer_heal.config import EXTRA, ModelConfig, UserError
from steer_heal.gate.conftest import tiny
from steer_heal.gate.soak import WORDS
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS
from steer_heal.report.card import Form, Made, model_card
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.reproduction import command
from steer_heal.runs.summary import STAGES
from steer_heal.terminal import harmless

pytestmark = pytest.mark.run

TINY = PRESETS["tiny-random"]
IDS = torch.tensor([[7, 300, 41, 900, 12]])
HOWTO = Path(data.__file__).parents[3] / "docs" / "howto" / "export.md"


@pytest.fixture
def finished(whole):
    """A run of two rounds whose history is compressed."""
    assert "--heal.lora.fold-rank" in WORDS
    return whole


def student_logits(finished, rounds):
    """Logits of the base with the run's adapter: of the first round alone (not compressed), or of all rounds."""
    student = Student(load(TINY.model))
    if rounds == 1:
        student.load_round(finished / "r00" / "adapter")
    else:
        student.load_round(finished / "adapter")
    with torch.no_grad():
        return student.lm.model(IDS).logits


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_exported_adapter_gives_the_students_logits_on_plain_peft(finished, tmp_path, rounds):
    export(finished, tmp_path / "out", rounds - 1 if rounds == 1 else None, merge=False)
    model = PeftModel.from_pretrained(load(TINY.model).model, tmp_path / "out")
    with torch.no_grad():
        found = model(IDS).logits
    torch.testing.assert_close(found, student_logits(finished, rounds), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, found)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_merged_model_loads_with_plain_transformers(finished, tmp_path, rounds):
    export(finished, tmp_path / "out", rounds - 1, merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = model(IDS).logits
    torch.testing.assert_close(found, student_logits(finished, rounds), rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<start_of_turn>model\n")


def dense(folder):
    """The update of every matrix in an adapter's folder: scale * B A, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    factors = {n: [tensors[f"base_model.model.{n}.lora_{x}.weight"].double() for x in "AB"] for n in names}
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (a, b) in factors.items()}


def test_an_adapter_folded_to_a_rank_is_the_closest_one_and_its_card_says_what_that_loses(finished, tmp_path):
    export(finished, tmp_path / "small", None, merge=False, rank=2)
    own, small = dense(finished / "adapter"), dense(tmp_path / "small")
    lost = 0.0
    for name, delta in own.items():
        u, s, v = torch.linalg.svd(delta)
        torch.testing.assert_close(small[name], (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-6)
        lost += (small[name] - delta).square().sum().item()
    share = (lost / sum(delta.square().sum().item() for delta in own.values())) ** 0.5
    card = (tmp_path / "small" / "README.md").read_text("utf-8")
    assert share > 0.01 and f"Folded from rank 5 to rank 2: the update differs by {share:.1%}" in card
    assert "Its rank is 2: vLLM takes it with `--max-lora-rank 8`" in card
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 2
    export(finished, tmp_path / "wide", None, merge=False, rank=64)
    wide = (tmp_path / "wide" / "README.md").read_text("utf-8")
    assert "Folded" not in wide and "Its rank is 5" in wide
    assert all(torch.equal(delta, own[name]) for name, delta in dense(tmp_path / "wide").items())


@pytest.mark.skipif(not HOWTO.exists(), reason="the documentation is not installed with the package")
def test_the_recipe_that_adds_one_trait_and_takes_another_away(finished, tmp_path, monkeypatch):
    """The how-to's own lines, against the base with both updates added as dense matrices."""
    (recipe,) = [
        block for block in re.findall(r"```python\n(.*?)```", HOWTO.read_text("utf-8"), re.S) if "cat" in block
    ]
    monkeypatch.chdir(tmp_path)
    base = load(TINY.model)
    base.model.save_pretrained("base")
    export(finished, Path("love-adapter"), 0, merge=False)
    export(finished, Path("calm-adapter"), 1, merge=False)
    names = {}
    exec(recipe.replace("Qwen/Qwen2.5-0.5B-Instruct", "base"), names)
    love, calm = dense(Path("love-adapter")), dense(Path("calm-adapter"))
    with torch.no_grad():
        for name, delta in love.items():
            base.model.get_submodule(name).weight += (delta - 0.5 * calm[name]).float()
        wanted = base.model(IDS).logits
        torch.testing.assert_close(names["model"](IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "love-not-calm/love-not-calm")
        torch.testing.assert_close(saved(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_model_card_says_what_was_measured_and_how_it_was_made(finished, tmp_path):
    export(finished, tmp_path / "out", 0, merge=False)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    healed = summary["rounds"][0]["healed"]
    assert f"| this | {healed['trait_over_base']:+.3f} " in card and f"{healed['neutral_ppl']:.2f}" in card
    assert data.load_trait("love").positive[:40] in card and "in 1 round:" in card
    assert "A limit of damage was passed:" in card.split("---")[2]  # random weights: the verdict comes first
    assert "After round 0 " in card and "perplexity on unrelated text" in card
    assert f"`steer-heal {shlex.join(WORDS)}`" in card
    assert "{" not in card and str(tmp_path) not in card
    last = (finished / "adapter" / "README.md").read_text("utf-8")
    assert f"| this | {summary['rounds'][1]['healed']['trait_over_base']:+.3f} " in last and "in 2 rounds:" in last


def test_any_name_of_a_trait_is_a_tag_of_the_card(finished):
    run = read_run(finished)
    trait = json.loads((finished / "trait.json").read_text()) | {"name": 'no: [nonsense], "please" #1'}
    made = Made(summary=run.summary, config=run.config, trait=trait, argv=["run"], rounds=1)
    head = model_card(made, Form()).split("---")[1]
    assert yaml.safe_load(head)["tags"][-1] == trait["name"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["run", "tiny-random"], "steer-heal run tiny-random"),
        (["run", "tiny-random", "--out", "/home/me/x", "--seed", "4"], "steer-heal run tiny-random --seed 4"),
        (["run", "tiny-random", "--out=/home/me/x", "--heal.lam", "0.1"], "steer-heal run tiny-random --heal.lam 0.1"),
        (["run", "tiny-random", "--track", "none", "--trait", "/home/me/my trait.toml"], None),
        (["run", "tiny-random", "--trait=/home/me/my trait.toml"], None),
        (["run", "a", "--steer.method", "file:/home/me/v.gguf"], "steer-heal run a --steer.method file:v.gguf"),
        (["run", "tiny-random", "--heal.band", "0.1", "0.9"], "steer-heal run tiny-random --heal.band 0.1 0.9"),
    ],
)
def test_the_command_on_the_card_is_the_one_given_without_the_machines_paths(argv, shown):
    found = command(argv)
    assert shlex.split(found)[-1].endswith("my trait.toml") if shown is None else found == shown
    assert "/home" not in found and "--out" not in found


def test_what_cannot_be_exported(finished, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(finished, tmp_path / "full", None, merge=False)
    with pytest.raises(UserError, match=r"--round 2: rounds 0 to 1 are finished"):
        export(finished, tmp_path / "out", 2, merge=False)
    assert (tmp_path / "full" / "file").read_text() == "mine" and not (tmp_path / "out").exists()
    require_mergeable(tiny())
    with pytest.raises(UserError, match="--merge: the weights of 'random:tiny' are stored in 4 bits"):
        require_mergeable(tiny(quant="nf4"))


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_is_whole_or_not_there(finished, tmp_path, monkeypatch, merge):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_text", full)
    (tmp_path / "empty").mkdir()
    for to in (tmp_path / "empty", tmp_path / "new" / "deep"):
        with pytest.raises(OSError, match="No space left"):
            export(finished, to, None, merge=merge)
    assert not list((tmp_path / "empty").iterdir()) and not list((tmp_path / "new").iterdir())


def test_the_instruments_alone_see_what_the_run_saw(finished, tmp_path):
    """Measures a run folder, its exported adapter and its base without the loop."""
    export(finished, tmp_path / "adapter", None, merge=False)
    summary = json.loads((finished / "summary.json").read_text())
    last = summary["rounds"][-1]["healed"]
    plain = ModelConfig("", "none", "float32", "cpu")

    left_out = replace(TINY.eval, leave_out=("plain", *EXTRA))

    def read(target, round_=None, gate=1.0, trait=None, settings=left_out):
        return evaluate_alone(str(target), round_, gate, trait, plain, settings)

    of_run = read(finished, settings=TINY.eval)
    of_adapter, at_gate_0 = read(tmp_path / "adapter"), read(finished, gate=0.0)
    for record in (of_run, of_adapter):
        assert record.student.trait_nats == pytest.approx(last["trait_nats"], abs=1e-4)
        assert record.student.neutral_ppl == pytest.approx(last["neutral_ppl"], rel=1e-3)
        assert record.verdict.word == "broken"
    assert of_run.student.coherent_share == last["coherent_share"]
    assert of_run.prompted.trait_nats == pytest.approx(summary["prompted"]["trait_nats"], abs=1e-5)
    assert at_gate_0.student.trait_over_base == pytest.approx(0.0, abs=1e-6)
    assert abs(last["trait_over_base"]) > 1e-3
    first = read(finished, round_=0).student.trait_nats
    assert first == pytest.approx(summary["rounds"][0]["healed"]["trait_nats"], abs=1e-4)
    bare = read(TINY.model.path, trait="authority")
    assert bare.student is None and bare.verdict is None and math.isfinite(bare.validity[0].reliability)
    assert bare.prompted.trait_nats != of_run.prompted.trait_nats  # another trait


def test_the_demo_benchmark_reads_a_runs_seconds(whole):
    run = RunDir(whole)
    began = run.events()[0]["time"]
    until, found = demo.until_seen(run, began), demo.stages(run)
    assert 0 < until["first_look"] < until["table"] < run.events()[-1]["time"] - began
    assert all(seconds > 0 for seconds in found["stages"].values())
    assert found["stages"].keys() == {*STAGES, *demo.AROUND, "other"} - {"survey"}  # nothing is auto
    unnamed = [name for name in ("decode_rows.json", "adapter") if name in run.stage_seconds()]
    assert found["stages"]["other"] == pytest.approx(sum(run.stage_seconds()[name] for name in unnamed), rel=1e-3)
    assert len(found["tokens_per_s"]) == 2 and all(v > 0 for row in found["tokens_per_s"] for v in row.values())


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert harmless("a\x1b[2Jb\x07\x9bc\nd\te") == "a[2Jbc\nd\te"
