"""The whole loop: resumed runs end in the same bits, the record is complete, mistakes end in one line."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from steer_heal import data, generate, loop, rundir
from steer_heal.cli import main
from steer_heal.config import PRESETS, HealConfig, ModelConfig, UserError
from steer_heal.loading import load

TINY = replace(PRESETS["tiny-random"], heal=replace(PRESETS["tiny-random"].heal, target="soft", anchor="neutral"))


def do(config, **changes):
    config = replace(config, **changes)
    trait = data.load_trait(config.trait)
    folder = rundir.reopen(config, trait) if config.resume else rundir.create(config, "tiny-random", trait)
    return folder, loop.run(config, "tiny-random", folder, trait, load(config.model))


def timeless(value):
    """Without what a clock or the machine's memory puts in."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "stage_seconds", "peak_memory_bytes")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dies_at", ["r00/dose.json", "r00/adapter", "r01/completions.jsonl", "r01/adapter", "adapter"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, monkeypatch, dies_at):
    whole, summary = do(TINY, out=str(tmp_path / "whole"))

    class Killed(BaseException):
        pass

    stage = rundir.RunDir.stage

    def fatal(self, name, compute, write, read):
        def die(path, value):
            write(path, value)
            raise Killed

        return stage(self, name, compute, die if name == dies_at else write, read)

    monkeypatch.setattr(rundir.RunDir, "stage", fatal)
    with pytest.raises(Killed):
        do(TINY, out=str(tmp_path / "broken"))
    monkeypatch.setattr(rundir.RunDir, "stage", stage)
    (broken,) = (tmp_path / "broken").iterdir()
    assert not (broken / dies_at).exists()

    rows = (broken / "batch_size.json").read_text()
    monkeypatch.setattr(generate, "free_memory", lambda device: 10_000_000)  # would now choose fewer
    resumed, again = do(TINY, resume=str(broken))
    assert (broken / "batch_size.json").read_text() == rows
    assert timeless(again) == timeless(summary)
    for name in ("adapter", "r00/adapter", "r01/adapter"):
        weights, expected = (load_file(run.path / name / "adapter_model.safetensors") for run in (resumed, whole))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_the_record_of_a_run_is_complete(tmp_path):
    folder, summary = do(TINY, out=str(tmp_path), seed=3)
    assert json.loads((folder.path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    arm = {"trait_nats", "trait_ci", "answer_mass", "demo_kept_share", "demo_ppl", "neutral_ppl"}
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
        assert round_["equal"]["dose"] > 0 and round_["verdict"]["word"] == "broken"  # a random model is no yardstick
        assert -1 <= round_["cos_shift_vector"] <= 1 and round_["kl_to_base_nats"] > 0
        assert {"extract", "dose", "distil", "heal", "eval"} == round_["stage_seconds"].keys()
        assert 0 < round_["kept"] <= TINY.distil.n_keep <= round_["generated"] <= TINY.distil.budget
    ends = [summary[arm] for arm in ("base", "prompted", "negative")]
    ends += [summary["rounds"][-1][arm] for arm in ("steered", "healed")]
    assert all("profile" in arm for arm in ends) and "profile" not in summary["rounds"][0]["healed"]
    assert [row["instrument"] for row in summary["validity"]] == ["contrast", "yes_no", "profile"]
    completions = rundir.read_jsonl(folder.path / "r01" / "completions.jsonl")
    assert all({"prompt", "dose", "ids", "text", "incoherence", "dropped"} <= c.keys() for c in completions)
    assert not list(folder.path.rglob("*.part"))


def test_decoding_and_evaluating_in_other_batch_sizes_changes_nothing(tmp_path):
    _, summary = do(TINY, out=str(tmp_path / "a"), rounds=1)
    small = replace(TINY, distil=replace(TINY.distil, batch_size=5), eval=replace(TINY.eval, batch_size=3))
    _, again = do(small, out=str(tmp_path / "b"), rounds=1)
    a, b = (s["rounds"][0]["healed"]["trait_nats"] for s in (summary, again))
    assert a == pytest.approx(b, abs=1e-3)
    assert summary["rounds"][0]["kept"] == again["rounds"][0]["kept"]


def test_resuming_with_another_config_or_trait_is_refused(tmp_path):
    folder, _ = do(TINY, out=str(tmp_path), rounds=1)
    other = replace(TINY, rounds=1, resume=str(folder.path), heal=replace(TINY.heal, tau=9.0))
    with pytest.raises(UserError, match=r"heal.tau: 0.001 then, 9.0 now"):
        rundir.reopen(other, data.load_trait("love"))
    with pytest.raises(UserError, match="trait file has changed"):
        rundir.reopen(replace(TINY, rounds=1, resume=str(folder.path)), data.load_trait("authority"))


def test_half_an_event_does_not_stop_a_resume(tmp_path):
    folder, summary = do(TINY, out=str(tmp_path), rounds=1)
    (folder.path / "summary.json").unlink()
    log = folder.path / "events.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"time": 1763.2, "event": "sta')
    _, again = do(TINY, resume=str(folder.path), rounds=1)
    assert timeless(again) == timeless(summary)
    assert log.read_text().startswith(whole) and '"sta{' not in log.read_text()
    assert [e["event"] for e in rundir.read_jsonl(log)][-3:] == ["resume", "round", "done"]


def test_a_barrier_that_never_fires_is_loud(capsys):
    from loguru import logger

    from steer_heal.summary import barrier_warning

    lines = []
    sink = logger.add(lines.append, format="{level} {message}")
    records = [{"fired": False, "anchor_fired": False, "divergence": 0.13, "tau": 0.5} for _ in range(40)]
    barrier_warning(records, HealConfig(tau=0.5))
    barrier_warning([{**r, "fired": True} for r in records], HealConfig(tau=0.05))
    barrier_warning(records, HealConfig(reg="nll"))
    barrier_warning([{**r, "anchor_fired": True} for r in records], HealConfig(anchor="neutral"))
    logger.remove(sink)
    assert len(lines) == 3
    assert "WARNING" in lines[0] and "0.13 nats" in lines[0] and "--heal.tau 0.065" in lines[0]
    assert "INFO" in lines[1] and "100%" in lines[1]
    assert "INFO" in lines[2] and "the anchor alone held this round back" in lines[2]


MISTAKES = [
    (["run", "tiny-randm"], "preset 'tiny-randm' is not known (did you mean 'tiny-random'?)"),
    (["run", "--seed", "1", "tiny-random"], "the preset comes first: steer-heal run tiny-random"),
    (["run", "tiny-random", "--trait", "lov"], "trait 'lov' is not built in"),
    (["run", "tiny-random", "--trait", "nowhere.toml"], "trait 'nowhere.toml' is not built in and no such .toml file"),
    (["run", "tiny-random", "--model.path", "no/such/folder"], "model path 'no/such/folder' does not exist"),
    (["run", "tiny-random", "--model.path", "./gone.gguf"], "model path './gone.gguf' does not exist"),
    (["run", "tiny-random", "--model.path", "random:huge"], "no random architecture 'huge'"),
    (["run", "tiny-random", "--resume", "nothing-here"], "--resume nothing-here: no run folder there"),
    (["run", "tiny-random", "--rounds", "0"], "rounds is 0"),
    (["report", "nothing-here"], "'nothing-here' is no run folder"),
    (["chat", "nothing-here"], "'nothing-here' is no run folder"),
    (["sweep", "x", "--grid", "heal.agg=mean", "--", "tiny"], "after -- give a preset"),
    (["sweep", "x", "--seeds", "a", "--", "tiny-random"], "--seeds 'a': write whole numbers"),
    (["export", "nothing-here", "--to", "there"], "'nothing-here' is no run folder"),
    (["run", "tiny-random", "--heal.optimiser", "paged_adamw_8bit"], "paged_adamw_8bit needs a CUDA GPU"),
    (["run", "tiny-random", "--heal.patience", "2", "--heal.val-share", "0"], "heal.patience needs completions to"),
    (["run", "tiny-random", "--heal.barrier", "dual", "--heal.reg", "nll"], "heal.barrier dual needs a divergence"),
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
    words = [sys.executable, "-m", "steer_heal.cli", "run", "tiny-random", "--rounds", "20", "--out", str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        while running.poll() is None and not list(tmp_path.glob("*/r00/dose.json")):
            time.sleep(0.05)
        running.send_signal(how)
        said = running.communicate(timeout=60)[1]
    (folder,) = tmp_path.iterdir()
    assert running.returncode == 130 and "Traceback" not in said
    assert said.strip().endswith(f"--rounds 20 --out {tmp_path} --resume {folder}")
    assert not (folder / "summary.json").exists()


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    from steer_heal.tiny import build_random

    build_random("tiny", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(ModelConfig(str(tmp_path), "none", "float32", "cpu"))


def test_help_needs_no_torch():
    code = "import sys, steer_heal.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
