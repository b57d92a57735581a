"""Benchmark of a whole run as a user starts it: seconds until something is to be seen, and seconds of each stage."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from steer_heal.runs.folder import RunDir
from steer_heal.runs.rounds import InRound, read_round
from steer_heal.terminal import MODULE

KINDS = {  # artefacts of the stages, by what a user would call them
    "first look": ("first_look.json",),
    "baselines": ("base.json", "prompted.json", "negative.json"),
    "anchors": ("anchor.jsonl",),
    "plain steering": ("plain", InRound.EQUAL_COST, InRound.EQUAL_TRAIT),
    "vector": (InRound.VECTOR,),
    "dose": (InRound.DOSE,),
    "completions": (InRound.COMPLETIONS,),
    "training": ("r/adapter",),
    "arms of the rounds": (InRound.STEERED, InRound.HEALED, InRound.GEOMETRY),
}


def demo(preset: str, rounds: int | None) -> dict:
    """Run a preset in a process of its own and return its seconds.

    `until` counts from the start of the process: to the first look (validity of the instruments and the first
    answers), to the first round's table and to the end. `stages` adds up over the rounds. `tokens_per_s` are those of
    the completions and of a training step, round by round.
    """
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", MODULE, "run", preset, "--out", out]
        words += [] if rounds is None else ["--rounds", str(rounds)]
        began = time.time()
        subprocess.run(words, stdout=sys.stderr, check=True)
        wall = time.time() - began
        (folder,) = (path for path in Path(out).iterdir() if path.is_dir())
        return {"preset": preset, "until": _until(RunDir(folder), began) | {"end": wall}} | _stages(RunDir(folder))


def _until(run: RunDir, began: float) -> dict[str, float]:
    seen = {"first_look": lambda e: e.get("artefact") == "first_look.json", "table": lambda e: e["event"] == "round"}
    return {name: next(e["time"] for e in run.events() if found(e)) - began for name, found in seen.items()}


def _stages(run: RunDir) -> dict:
    seconds = run.stage_seconds()
    kinds: dict[str, float] = defaultdict(float)
    for artefact, spent in seconds.items():
        name = "plain" if artefact.startswith("plain/") else Path(artefact).name
        name = "r/adapter" if artefact.endswith("/adapter") else name  # "adapter" alone holds all rounds
        kinds[next((kind for kind, files in KINDS.items() if name in files), "other")] += spent
    rounds = [read_round(run, number) for number in range(run.read("config.json")["rounds"])]
    speeds = [
        {
            "completions": sum(len(c.ids) for c in done.completions) / seconds[InRound.COMPLETIONS.of(done.number)],
            "training": sorted(step.tokens_per_s for step in done.steps)[len(done.steps) // 2],
        }
        for done in rounds
        if done is not None
    ]
    return {"stages": dict(kinds), "stages_together": sum(seconds.values()), "tokens_per_s": speeds}
