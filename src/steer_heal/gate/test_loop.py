"""The whole loop: resumed runs end in the same bits, the records are complete, mistakes end in one line."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from steer_heal import data, loop
from steer_heal.cli import main
from steer_heal.config import AnchorConfig, BarrierConfig, Exhausted, HealConfig, ModelConfig, UserError
from steer_heal.files import read_jsonl
from steer_heal.gate.conftest import BRIEF, FEW, turned
from steer_heal.gate.processes import command, started
from steer_heal.gate.soak import timeless
from steer_heal.model.loading import load
from steer_heal.model.memory import peak_memory
from steer_heal.presets import PRESETS
from steer_heal.records import structured, unstructured
from steer_heal.report import page as report
from steer_heal.runs.environment import environment
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.resume import create
from steer_heal.runs.rounds import read_round
from steer_heal.stages import round as round_stages
from steer_heal.stages.run import Work
from steer_heal.sweep import disk
from steer_heal.terminal import MODULE

pytestmark = pytest.mark.run

TINY = turned(PRESETS["tiny-random"], {"heal.objective": "kl_fwd", "heal.anchor.prompts": 32})
LITTLE = turned(TINY, {"steer.n_contexts": 8, "dose.steps": 2, "dose.prompts": 2, "distil.n_keep": 8})
LITTLE = turned(LITTLE, {"heal.anchor.prompts": 8})
LEFT_OUT = ("plain", "off_target", "canary", "profile", "frames", "refusals", "relevance")


def do(config, **changes):
    config = replace(config, **changes)
    trait, lm = data.load_trait(config.trait), load(config.model)
    folder = create(config, "tiny-random", trait, environment(lm), [])
    return folder, unstructured(loop.run(Work.begun(config, "tiny-random", folder, trait, lm)))


def test_the_record_of_a_run_is_complete(tmp_path, least):
    folder, summary = do(LITTLE, out=str(tmp_path), seed=3)
    assert json.loads((folder.path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    arm = {"trait_nats", "trait_ci", "answer_mass", "coherent_share", "demo_ppl", "neutral_ppl"}
    assert {
        "model",
        "trait",
        "seed",
        "preset",
        "base",
        "prompted",
        "rounds",
        "seconds",
        "peak_memory_bytes",
    } <= summary.keys()
    assert len(summary["rounds"]) == 2 and summary["seed"] == 3
    for round_ in summary["rounds"]:
        for where in (summary["base"], summary["prompted"], round_["steered"], round_["healed"]):
            assert arm <= where.keys() and where["trait_ci"][0] <= where["trait_nats"] <= where["trait_ci"][1]
            assert {"contrast", "yes_no", "mass", "neutral_nll", "canary", "off:thrift"} <= where["over_base"].keys()
        assert round_["equal_cost"]["dose"] > 0 and "contrast" in round_["equal_cost"]["healed_over"]
        assert round_["verdict"]["word"] == "broken"  # the model is random
        assert -1 <= round_["cos_shift_vector"] <= 1 and round_["kl_to_base_nats"] > 0
        assert {"extract", "dose", "distil", "heal", "eval"} == round_["stage_seconds"].keys()
        assert 0 < round_["kept"] <= round_["generated"] == sum(map(len, texts_of(folder, round_["round"])))
    assert [arm["dose"] for arm in summary["plain"]] == pytest.approx([0.125, 12.0])
    assert "equal_trait" not in summary["rounds"][0]
    assert {"canary", "demo_coherent", "mass"} <= summary["rounds"][-1]["equal_trait"]["healed_over"].keys()
    prompts, prompted = folder.read("prompts.json"), folder.read("prompted.json")
    assert len({*prompts["systems"]}) == len(prompts["tried"]) == summary["best_prompt"]["tried"] == 5
    own = prompted["items"]["contrast"]
    assert prompts["tried"][0] == own[::4] != prompts["tried"][1] and len(prompts["scores"]) == len(own) - len(own[::4])
    ends = [summary[arm] for arm in ("base", "prompted", "negative")]
    ends.append(summary["rounds"][-1]["healed"])
    assert all("profile" in arm for arm in ends) and "profile" not in summary["rounds"][0]["healed"]
    assert [row["instrument"] for row in summary["validity"]] == ["contrast", "yes_no", "profile"]
    assert LITTLE.heal.text == "mixed"  # half of n_keep is the teacher's; the student writes the other half every epoch
    half, epochs = LITTLE.distil.n_keep // 2, range(LITTLE.heal.training.epochs)
    by_teacher, own = texts_of(folder, 1)
    assert half <= len(by_teacher) <= 2 * half and sum(not c["dropped"] for c in by_teacher) <= half
    assert all({"prompt", "dose", "ids", "text", "incoherence", "dropped"} <= c.keys() for c in by_teacher + own)
    assert [c["epoch"] for c in own] == [epoch for epoch in epochs for _ in range(half)]
    assert all(c["dose"] == 0 for c in own) and all(c["dose"] > 0 and "epoch" not in c for c in by_teacher)
    assert not list(folder.path.rglob("*.part"))


def texts_of(folder, number):
    """The teacher's and the student's own texts of a round."""
    return [read_jsonl(folder.path / f"r0{number}" / name) for name in ("completions.jsonl", "own.jsonl")]


@pytest.mark.parametrize("text", ["own", "teacher"])
def test_a_run_keeps_the_texts_that_it_trained_on(tmp_path, text, least):
    config = turned(LITTLE, {"rounds": 1, "heal.text": text, "heal.objective": "kl_rev"})
    folder, summary = do(config, out=str(tmp_path))
    there = {name for name in ("completions.jsonl", "own.jsonl") if (folder.path / "r00" / name).exists()}
    assert there == ({"own.jsonl"} if text == "own" else {"completions.jsonl"})
    of = read_round(folder, 0).completions
    epochs = Counter(c.epoch for c in of)
    keep = LITTLE.distil.n_keep
    if text == "own":
        assert epochs == dict.fromkeys(range(LITTLE.heal.training.epochs), keep)
    else:
        assert epochs.keys() == {None} and sum(not c.dropped for c in of) <= keep
    assert summary["rounds"][0]["generated"] == len(of)


def test_a_loop_that_steering_exhausts_ends_with_what_it_has(tmp_path, monkeypatch, capsys, least):
    fine, asked = round_stages.require_dose, []

    def second_fails(artefact):
        asked.append(artefact.dose)
        if len(asked) > 1:
            raise Exhausted("no dose leaves 68% of the completions coherent")
        return fine(artefact)

    monkeypatch.setattr(round_stages, "require_dose", second_fails)
    at_end = LITTLE.eval.ends_only
    folder, summary = do(LITTLE, out=str(tmp_path))
    printed = capsys.readouterr().out
    assert (
        0
        < printed.index("Can 'loves humanity' be measured")
        < printed.index("The base answers:")
        < printed.index("round 0")
    )
    added = [e["seconds"] for e in folder.events() if e.get("artefact") == "base.json"]
    assert len(added) == 2 and folder.stage_seconds()["base.json"] == pytest.approx(sum(added))
    assert {*at_end} <= {*folder.read("base.json")["read"]}  # read at the end, when it is the end
    assert summary["stopped"].startswith("no dose leaves 68%") and len(summary["rounds"]) == 1
    (last,) = summary["rounds"]
    assert {"off:thrift", "canary"} <= last["healed"]["over_base"].keys() and "profile" in last["healed"]
    assert {"off:thrift", "canary", "demo_coherent"} <= last["equal_cost"]["healed_over"].keys()
    assert {"off:thrift", "canary", "demo_coherent"} <= last["equal_trait"]["healed_over"].keys()
    assert (folder.path / "adapter").is_dir() and not (folder.path / "r01" / "adapter").exists()
    assert "in 1 round:" in (folder.path / "adapter" / "README.md").read_text()
    page = report.page(read_run(folder.path))
    assert "ended after 1 of 2 rounds" in page and "The loop ended early: no dose leaves 68%" in page
    (found,) = disk.scan(tmp_path)
    assert found.rounds == "1 of 2" and found.arm("healed").arm == "healed"
    asked.clear()
    monkeypatch.setattr(round_stages, "require_dose", lambda artefact: second_fails(asked.append(0) or artefact))
    with pytest.raises(Exhausted):
        do(LITTLE, out=str(tmp_path))  # in round 0 it is an error: nothing was learned yet


@pytest.mark.parametrize("source", ["student", "base"])
def test_what_the_base_fixes_is_the_same_in_every_round(tmp_path, source, capsys, least):
    """With `source base` the vector stays the same. With `reference base` tau does, and the multiplier continues."""
    barrier = {"reference": "base", "tau": "auto", "kind": "dual"}
    knobs = {f"heal.barrier.{name}": value for name, value in barrier.items()}
    knobs |= {"steer.source": source, "eval.leave_out": LEFT_OUT}
    folder, _ = do(turned(LITTLE, knobs), out=str(tmp_path))
    records = [read_jsonl(folder.path / f"r{i:02d}" / "heal.jsonl") for i in range(2)]
    assert len({record["tau"] for of_round in records for record in of_round}) == 1
    assert records[1][0]["lam"] == records[0][-1]["next_lam"]
    assert re.findall(r"r01 heal +: +100%", capsys.readouterr().err)
    files = [folder.path / f"r{i:02d}" / "vector" / "vector.safetensors" for i in range(2)]
    first, second = (load_file(file)["direction"] for file in files)
    assert torch.equal(first, second) == (source == "base")


def test_batch_sizes_change_no_bit(tmp_path):
    little = turned(LITTLE, {"eval.leave_out": ("plain",)})  # an arm that is read as the steered one is
    whole, summary = do(little, out=str(tmp_path / "a"), rounds=1)
    small = turned(little, {"model.decode_rows": 5, "model.read_rows": 3})
    other, again = do(small, out=str(tmp_path / "b"), rounds=1)
    assert timeless(again) == timeless(summary)
    a, b = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (whole, other))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    """`getrusage` counts in kilobytes on Linux and in bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    assert peak_memory(torch.device("cpu")) == 3_000_000 * unit


def test_a_barrier_that_never_fires_is_loud(capsys):
    from loguru import logger

    from steer_heal.heal.steps import HealStep, barrier_warning

    def heal(**barrier):
        return HealConfig(barrier=BarrierConfig(**barrier))

    lines = []
    sink = logger.add(lines.append, format="{level} {message}")
    figures = dict.fromkeys((field.name for field in fields(HealStep) if field.default is MISSING), 1)
    step = structured(HealStep, figures | {"fired": False, "anchor_fired": False, "divergence": 0.13, "tau": 0.5})
    records = [step] * 40
    barrier_warning(records, heal(tau=0.5))
    barrier_warning([replace(step, fired=True)] * 40, heal(tau=0.05))
    barrier_warning(records, heal(reg="nll"))
    barrier_warning([replace(step, anchor_fired=True)] * 40, HealConfig(anchor=AnchorConfig(prompts=1)))
    barrier_warning(records, heal(reference="base"))
    logger.remove(sink)
    assert len(lines) == 4
    assert "WARNING" in lines[0] and "0.13 nats" in lines[0] and "--heal.barrier.tau 0.065" in lines[0]
    assert "INFO" in lines[1] and "100%" in lines[1]
    assert "INFO" in lines[2] and "only the anchor acted in this round" in lines[2]
    assert "INFO" in lines[3] and "within its budget" in lines[3]


MISTAKES = [
    (["run", "tiny-randm"], "preset 'tiny-randm' is not known (did you mean 'tiny-random'?)"),
    (["run", "--seed", "1", "tiny-random"], "the preset comes first: steer-heal run tiny-random"),
    (["run", "tiny-random", "--trait", "lov"], "trait 'lov' is not built in"),
    (["run", "tiny-random", "--trait", "nowhere.toml"], "trait 'nowhere.toml' is not built in and no such .toml file"),
    (["run", "tiny-random", "--model.path", "no/such/folder"], "model path 'no/such/folder' does not exist"),
    (["run", "tiny-random", "--model.path", "./gone.gguf"], "model path './gone.gguf' does not exist"),
    (["run", "tiny-random", "--model.path", "random:huge"], "no random architecture 'huge'"),
    (["run", "tiny-random", "--resume", "nothing-here"], "'nothing-here' is no run folder"),
    (["run", "tiny-random", "--rounds", "0"], "rounds is 0"),
    (["report", "nothing-here"], "'nothing-here' is no run folder"),
    (["chat", "nothing-here"], "'nothing-here' is no run folder"),
    (["sweep", "x", "--grid", "heal.barrier.agg=mean", "--", "tiny"], "after -- give a preset"),
    (["sweep", "x", "--seeds", "a", "--", "tiny-random"], "--seeds 'a': write whole numbers"),
    (["export", "nothing-here", "--to", "there"], "'nothing-here' is no run folder"),
    (["run", "tiny-random", "--heal.training.optimiser", "paged_adamw_8bit"], "paged_adamw_8bit needs a CUDA GPU"),
    (
        ["run", "tiny-random", "--heal.barrier.kind", "dual", "--heal.barrier.reg", "nll"],
        "heal.barrier.kind dual needs a divergence",
    ),
    (["eval", "no/such/folder"], "model path 'no/such/folder' does not exist"),
    (["eval", "random:tiny", "--round", "1"], "'random:tiny' is no run folder"),
    (["results", "--out", "nothing-here"], "no folder 'nothing-here'"),
    (["bench", "generate", "--preset", "smol"], "preset 'smol' is not known"),
]


@pytest.mark.parametrize("argv,message", MISTAKES)
def test_a_mistake_ends_in_one_line_and_code_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert said.startswith("steer-heal: ") and message in said and "\n" not in said
    assert not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(tmp_path, how):
    words = ["run", "tiny-random", "--rounds", "20", *FEW[2:], *BRIEF, "--out", str(tmp_path / "out")]
    running = started(command, words, log=tmp_path / "log")
    while running.is_alive() and not list(tmp_path.glob("out/*/r00/dose.json")):
        time.sleep(0.05)
    os.kill(running.pid, how)
    running.join(60)
    said = (tmp_path / "log").read_text()
    (folder,) = (tmp_path / "out").iterdir()
    assert running.exitcode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("steer-heal: stopped; what is done is kept, go on with: ")
    assert said.strip().endswith(f"-m {MODULE} run --resume {folder}")
    assert not (folder / "summary.json").exists()


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    from steer_heal.model.random_weights import build_random

    build_random("tiny", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(ModelConfig(str(tmp_path), "none", "float32", "cpu"))


def test_help_needs_no_torch():
    code = "import sys, steer_heal.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
