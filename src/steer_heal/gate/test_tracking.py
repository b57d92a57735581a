"""Events reach a tracker. Without one nothing is sent. A missing package is an error before anything runs."""

import importlib.machinery
import json
import sys
import types

import pytest

from steer_heal.cli import main
from steer_heal.config import UserError
from steer_heal.runs.tracking import check_tracker

pytestmark = pytest.mark.run

QUICK = ["run", "tiny-random", "--rounds", "1", "--eval.leave-out", "profile", "plain"]


def test_every_event_is_logged_and_done_ends_it(tmp_path, monkeypatch):
    seen = []
    stand_in = types.ModuleType("trackio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    stand_in.init = lambda **given: seen.append(given)
    stand_in.log = seen.append
    stand_in.finish = lambda: seen.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    main([*QUICK, "--track", "trackio", "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()][
        1:
    ]  # the start was before
    first, *logged, last = seen
    assert first["project"] == "steer-heal" and first["name"] == folder.name and first["config"]["trait"] == "love"
    assert last == "finished" and len(logged) == len(events)
    assert "track" not in json.loads((folder / "config.json").read_text())
    (round_,) = [e for e in logged if "round/verdict" in e]
    healed = json.loads((folder / "r00" / "healed.json").read_text())
    assert round_["round/healed/trait_nats"] == healed["trait_nats"] and round_["round/dose"] > 0


def test_a_tracker_that_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'steer_heal\[wandb\]'"):
        check_tracker("wandb")
    check_tracker("none")


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("steer-heal 0.")
