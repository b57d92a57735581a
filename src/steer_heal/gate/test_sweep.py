"""Sweeps: plan, skipping, resuming, continuing after a failure, and the same results on Ray."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

import steer_heal
from steer_heal import data
from steer_heal.cli import main
from steer_heal.config import UserError
from steer_heal.flags import words_of
from steer_heal.gate.conftest import BRIEF, FEW
from steer_heal.gate.folders import cut
from steer_heal.gate.processes import command, done
from steer_heal.sweep import plan
from steer_heal.sweep import run as sweep
from steer_heal.sweep.cluster import estimate, run_here, standing
from steer_heal.terminal import MODULE

pytestmark = pytest.mark.run

QUICK = ("tiny-random", *FEW, *BRIEF)
GRID = ("heal.barrier.agg=mean,rmse",)


def planned(out, grid=GRID, seeds=(1, 2), argv=QUICK):
    return plan.plan("agg", grid, seeds, argv, out, "rmse holds what the mean dilutes")


def test_a_switch_has_no_value_with_or_without_a_section():
    words = [words_of(*said) for said in (("anyway", "false"), ("heal.training.checkpointing", "false"), ("x", "true"))]
    assert words == [["--no-anyway"], ["--heal.training.no-checkpointing"], ["--x"]]
    first, _ = planned(Path("out"), grid=("anyway=true,false",), seeds=(1,)).runs
    assert first.argv[-5:] == ("--anyway", "--seed", "1", "--out", "out/agg")


def test_the_plan_is_the_grid_times_the_seeds(tmp_path):
    asked = planned(tmp_path, grid=("heal.barrier.agg=mean,rmse", "steer.band=0.3+0.7,auto", "heal.barrier.tau=0.1"))
    assert len(asked.runs) == 2 * 2 * 1 * 2
    seen = {
        (run.config.heal.barrier.agg, run.config.steer.band, run.config.heal.barrier.tau, run.seed)
        for run in asked.runs
    }
    assert seen == {(a, b, 0.1, s) for a in ("mean", "rmse") for b in ((0.3, 0.7), "auto") for s in (1, 2)}
    assert all(run.config.rounds == 1 and run.config.out == str(tmp_path / "agg") for run in asked.runs)
    switched = planned(
        tmp_path, grid=("heal.training.checkpointing=true,false", "heal.barrier.lam_round_pow=-0.5,0"), seeds=(1,)
    )
    found = [(run.config.heal.training.checkpointing, run.config.heal.barrier.lam_round_pow) for run in switched.runs]
    assert found == [(True, -0.5), (True, 0), (False, -0.5), (False, 0)]
    assert asked.runs[0].label == "heal.barrier.agg=mean steer.band=0.3+0.7 heal.barrier.tau=0.1 seed=1"


MISTAKES = [
    ({"grid": ("heal.barrier.agg",)}, "write FLAG=VALUE,VALUE"),
    ({"grid": ("heal.barrier.agg=mean,",)}, "write FLAG=VALUE,VALUE"),
    ({"grid": ("heal.barrier.agg=mean", "heal.barrier.agg=rmse")}, "names a flag twice"),
    ({"argv": ()}, "after -- give a preset"),
    ({"argv": ("tiny",)}, "after -- give a preset"),
    ({"grid": ("rounds=0,1",)}, "rounds is 0"),
]


@pytest.mark.parametrize(("changed", "message"), MISTAKES)
def test_a_plan_that_cannot_work_is_refused_before_anything_runs(tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path, **changed)
    with pytest.raises(UserError, match="it names a folder"):
        plan.plan("../up", GRID, (0,), QUICK, tmp_path, "")
    with pytest.raises(UserError, match="whole numbers"):
        plan.seed_list("1,two")
    assert not list(tmp_path.iterdir())


def adapters(folder: Path) -> dict:
    """The weights of every finished run of a sweep, by aggregate and seed."""
    found = {}
    for path in folder.glob("*/summary.json"):
        seed = json.loads((path.parent / "config.json").read_text())["seed"]
        found[agg_of(path.parent), seed] = load_file(path.parent / "adapter" / "adapter_model.safetensors")
    return found


def agg_of(run: Path) -> str:
    return json.loads((run / "config.json").read_text())["heal"]["barrier"]["agg"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in ((a[k], b[k]) for k in a)
    )


def sweep_locally(out):
    assert sweep.sweep(planned(out, seeds=(1,)), "local", 1, 0.0, None, None) == 0


@pytest.fixture
def swept(shared):
    """A finished local sweep."""
    return shared("swept", sweep_locally) / "agg"


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Runs of local sweeps are forked. For `swept` an interpreter is started for each, as for users."""

    def run(words, env):
        assert words[:3] == [sys.executable, "-m", MODULE] and env["OMP_NUM_THREADS"] == "1"
        return SimpleNamespace(returncode=done(command, words[3:], log=tmp_path / "log")[0])

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))


def test_a_sweep_records_its_hypothesis_and_skips_what_is_finished(swept, capfd):
    noted = json.loads((swept / "sweep.json").read_text())
    assert noted["hypothesis"] == "rmse holds what the mean dilutes" and noted["seeds"] == [1]
    assert noted["arms"] == [{"heal.barrier.agg": "mean"}, {"heal.barrier.agg": "rmse"}]
    assert adapters(swept).keys() == {("mean", 1), ("rmse", 1)}
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*.safetensors")}
    sweep_locally(swept.parent)
    assert before == {path: path.stat().st_mtime_ns for path in swept.rglob("*.safetensors")}
    assert "0 of 2 runs to do" in capfd.readouterr().out


def test_a_broken_run_is_resumed_and_a_failed_one_does_not_stop_the_rest(swept, tmp_path, forked, capfd):
    asked = planned(tmp_path, grid=("trait=nowhere.toml,love",), seeds=(1,))
    agg = asked.runs[1].config.heal.barrier.agg
    (run,) = (path.parent for path in swept.glob("*/config.json") if agg_of(path.parent) == agg)
    folder = shutil.copytree(run, tmp_path / "agg" / run.name)
    assert list(plan.progress(asked.runs, asked.folder).values()) == [("waiting", 1), ("finished", 0)]
    cut(folder, "r00/healed.json")
    assert list(plan.progress(asked.runs, asked.folder).values()) == [("waiting", 1), ("unfinished", 1)]
    assert "--resume" in plan.command(asked.runs[1], asked.folder)
    assert sweep.sweep(asked, "local", 1, 0.0, None, None) == 1
    said = capfd.readouterr().out
    assert "1 runs done" in said and "1 failed" in said and "--trait nowhere.toml" in said
    assert len(list((tmp_path / "agg").glob("*/config.json"))) == 1
    assert equal(adapters(tmp_path / "agg"), {(agg, 1): adapters(swept)[agg, 1]})


def test_an_edited_trait_file_makes_it_another_run(tmp_path):
    file = tmp_path / "mine.toml"
    text = (data.HERE / "traits" / "love.toml").read_text("utf-8")
    file.write_text(text, "utf-8")
    (run,) = planned(tmp_path, grid=(f"trait={file}",), seeds=(1,)).runs
    before = plan.key(run)
    file.write_text(text.replace('title = "', 'title = "truly ', 1), "utf-8")
    assert plan.key(run) != before


def test_the_command_line_ends_with_1_when_a_run_failed(tmp_path, forked, capfd):
    with pytest.raises(SystemExit) as end:
        main(["sweep", "bad", "--grid", "trait=nowhere.toml", "--cpus", "1", "--out", str(tmp_path), "--", *QUICK])
    assert end.value.code == 1 and "1 failed" in capfd.readouterr().out


def test_what_ended_a_task_is_told_in_a_line(tmp_path):
    bad = planned(tmp_path, grid=("trait=nowhere.toml",), seeds=(1,)).runs[0]
    said = run_here(bad, str(tmp_path / "agg"), 1)
    assert said.startswith("steer-heal: trait 'nowhere.toml' is not built in")


def test_the_time_that_a_sweep_still_takes_follows_from_the_rounds_that_are_over():
    assert estimate(left=6, over=2, seconds=100.0) == ", about 5 min"
    assert estimate(left=1, over=8, seconds=8.0) == ", about 1 min"
    assert estimate(left=6, over=0, seconds=100.0) == "" == estimate(left=0, over=6, seconds=100.0)
    a, b, c = planned(Path("out"), seeds=(1, 2)).runs[:3]
    assert standing({a: "finished", b: "started", c: "started"}, 3) == (
        "finished 1  started 2  waiting 0  failed 0  rounds left 3"
    )


def test_ray_gives_the_same_bits_also_when_a_worker_is_killed(swept, tmp_path, capfd):
    pytest.importorskip("ray")
    killed, over = [], threading.Event()

    def kill_a_worker():
        while not killed and not over.is_set():
            time.sleep(0.2)
            if list((tmp_path / "agg").glob("*/r00/completions.jsonl")):
                for process in psutil.Process().children(recursive=True):
                    if process.name().startswith("ray::run_here"):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        break

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    try:
        asked = planned(tmp_path, grid=("heal.barrier.agg=mean,rmse", "trait=love,nowhere.toml"), seeds=(1,))
        asked = replace(asked, runs=asked.runs[:3])  # one that fails is enough
        assert sweep.sweep(asked, "ray", 1, 0.0, None, 2) == 1
    finally:
        over.set()
        killer.join()
    assert killed and equal(adapters(tmp_path / "agg"), adapters(swept))
    said = capfd.readouterr().out
    assert re.search(r"started [12]  waiting \d  failed \d  rounds left [1-3]\b", said), said
    assert "finished 2  started 0  waiting 0  failed 1  rounds left 0\n" in said


JUSTFILE = Path(steer_heal.__file__).parents[2] / "justfile"


@pytest.mark.skipif(not (JUSTFILE.exists() and shutil.which("just")), reason="the recipes and `just` are not here")
@pytest.mark.parametrize("scale", ["gemma-3-1b", "smollm2-135m", "tiny"])
def test_every_sweep_of_the_justfile_can_be_planned(tmp_path, scale):
    words = ["just", "--justfile", str(JUSTFILE), "--dry-run", f"SCALE={scale}", "queue", "controls", "reproduce"]
    said = subprocess.run(words, capture_output=True, text=True).stderr
    recipes = [shlex.split(line)[2:] for line in said.splitlines() if " sweep " in line and "steer-heal" in line]
    assert len(recipes) >= 23, said
    for recipe in recipes:
        asked, shared = recipe[: recipe.index("--")], recipe[recipe.index("--") + 1 :]
        alone = asked[0] in ("other", "no-barrier", "no-heal")  # compared with an arm of another sweep
        assert len(plan.plan(asked[0], (asked[2],), (1,), tuple(shared), tmp_path, "").runs) >= (1 if alone else 2)
