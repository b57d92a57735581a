"""Benchmark of a whole run as a user starts it: seconds until there is something to see, and seconds of each stage."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steer_heal.runs.folder import RunDir
from steer_heal.runs.rounds import InRound, read_round
from steer_heal.runs.summary import PROMPTS, STAGES, SUMMARY, SURVEY, Summary
from steer_heal.terminal import MODULE

AROUND = {  # artefacts outside the rounds
    "first look": ("first_look.json",),
    "baselines": ("base.json", "prompted.json", "negative.json", PROMPTS),
    "anchor": ("anchor.jsonl",),
    "survey": (SURVEY,),
    "plain steering": ("plain/",),
}


def demo(preset: str, rounds: int | None) -> dict:
    """Run a preset in a process of its own and return its seconds.

    `until` counts from the start of the process: to the first look, to the first round's table and to the end.
    `stages` has the stages of all rounds together, named as in summary.json, and those around the rounds.
    `tokens_per_s` has one entry per round: tokens of the completions, and of the median training step.
    """
    with tempfile.TemporaryDirectory() as out:
        words = [sys.executable, "-m", MODULE, "run", preset, "--out", out]
        words += [] if rounds is None else ["--rounds", str(rounds)]
        began = time.time()
        subprocess.run(words, stdout=sys.stderr, check=True)
        wall = time.time() - began
        run = RunDir(next(path for path in Path(out).iterdir() if path.is_dir()))
        until = until_seen(run, began) | {"end": wall}
        return {"preset": preset, "dtype": run.read("env.json")["dtype"]["weights"], "until": until} | stages(run)


def until_seen(run: RunDir, began: float) -> dict[str, float]:
    """Seconds from `began` to the first look and to the first round's table."""
    seen = {"first_look": ("artefact", "first_look.json"), "table": ("event", "round")}
    return {
        name: next(event["time"] for event in run.events() if event.get(key) == value) - began
        for name, (key, value) in seen.items()
    }


def stages(run: RunDir) -> dict:
    """Seconds of each stage, of all together, and the tokens per second of each round."""
    seconds, summary = run.stage_seconds(), run.load(Summary, SUMMARY)
    found = {stage: sum(round_.stage_seconds[stage] for round_ in summary.rounds) for stage in STAGES}
    for name, artefacts in AROUND.items():
        spent = [spent for artefact, spent in seconds.items() if artefact.startswith(artefacts)]
        found |= {name: sum(spent)} if spent else {}
    together = sum(seconds.values())
    return {
        "stages": found | {"other": together - sum(found.values())},
        "stages_together": together,
        "tokens_per_s": [speed(run, seconds, number) for number in range(len(summary.rounds))],
    }


def speed(run: RunDir, seconds: dict[str, float], number: int) -> dict[str, float]:
    """Tokens per second of a round. Own text's seconds include what its teacher takes to read it."""
    done = read_round(run, number)
    written = sum(len(completion.ids) for completion in done.completions)
    own = [event for event in run.events() if event["event"] == "own_text" and event["round"] == number]
    spent = seconds.get(InRound.COMPLETIONS.of(number), 0.0) + sum(event["seconds"] for event in own)
    return {
        "completions": written / spent,
        "training": statistics.median(step.tokens_per_s for step in done.steps),
    }
