"""Kill -9 at random instants of every stage, resume, and compare with an undisturbed run.

    python -m steer_heal.gate.soak --kills 200 --out FOLDER

Every trial is a process of its own, forked from one that has only imported the modules. It is killed while it makes a
given artefact, after a random part of the time that the undisturbed run took for it. Every second trial is killed once
more while it resumes. Then it is resumed to the end. Every artefact, the final adapter and summary.json must be equal
bit for bit, except times and memory sizes.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro

from steer_heal.cli import main
from steer_heal.commands import run as runner  # noqa: F401  imports all that a run needs, once for all children
from steer_heal.gate.folders import sha256
from steer_heal.runs.folder import EVENTS, RunDir

WORDS = shlex.split(
    "run tiny-random --steer.n-contexts 8 --dose.steps 2 --dose.prompts 2 --distil.n-keep 8 --distil.max-new-tokens 8 "
    "--heal.text mixed --heal.objective kl_rev --heal.anchor.prompts 8 --heal.lora.fold-rank 5"
)
CLOCKED = ("heal.jsonl", "summary.json", EVENTS, "report.html", "diary.md")  # hold times, or are made from these
CLOCKS = ("seconds", "stage_seconds", "peak_memory_bytes")
POLL_SECONDS = 0.002


def timeless(value):
    """The value without times and memory sizes."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def result(folder: Path) -> dict:
    """The parts that must be equal for all runs of one config: checksums of all artefacts, and the summary."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in CLOCKED and f.name[0] != ".")
    return {str(f.relative_to(folder)): sha256(f) for f in files} | {
        "summary.json": timeless(json.loads((folder / "summary.json").read_text("utf-8")))
    }


def fork(words: list[str], log: Path) -> int:
    """Start `steer-heal` with these arguments in a child process; returns its process id."""
    if child := os.fork():
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        main(words)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)


def finish(words: list[str], log: Path) -> None:
    _, status = os.waitpid(fork(words, log), 0)
    if status != 0:
        raise SystemExit(f"steer-heal {' '.join(words)} ended with {status}; see {log}")


def run_alone(out: Path) -> None:
    """A run in its own interpreter, which has another iteration order of sets: a result that depends on it differs."""
    words = [Path(sys.executable).with_name("steer-heal"), *WORDS, "--out", out]
    with (out / ".log").open("ab") as file:
        subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, check=True)


def run_folder(out: Path) -> Path | None:
    found = [path for path in out.glob("*") if path.is_dir() and path.name[0] != "."]
    return found[0] if found else None


def noted(out: Path) -> int:
    """Number of lines written to events.jsonl."""
    folder = run_folder(out)
    return (folder / EVENTS).read_bytes().count(b"\n") if folder else 0


def kill_during(words: list[str], log: Path, out: Path, lines: int, after: float) -> None:
    """Kill the child `after` seconds after events.jsonl has `lines` lines, unless it ends before."""
    child = fork(words, log)
    while noted(out) < lines:
        time.sleep(POLL_SECONDS)
        if os.waitpid(child, os.WNOHANG)[0]:
            return
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def trials(kills: int, stages: list[dict], dice: random.Random) -> Iterator[int]:
    """Yield stage numbers in random order, each equally often."""
    left: list[int] = []
    for _ in range(kills):
        left = left or dice.sample(range(len(stages)), len(stages))
        yield left.pop()


def soak(kills: int, out: Path, seed: int, whole: Path | None) -> dict:
    """Do all trials; returns how many were killed at each artefact, and the trials with another result."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    if whole is None:
        (out / "whole").mkdir()
        run_alone(out / "whole")
        whole = run_folder(out / "whole")
    expected, events = result(whole), RunDir(whole).events()
    stages = [
        {"line": i, "artefact": event.get("artefact", event["event"]), "took": event["time"] - events[i - 1]["time"]}
        for i, event in enumerate(events)
        if i > 0
    ]
    dice = random.Random(seed)
    killed, wrong = Counter(), []
    for trial, number in enumerate(trials(kills, stages, dice)):
        here = out / f"trial{trial:03d}"
        stage = stages[number]
        kill_during([*WORDS, "--out", str(here)], log, here, stage["line"], dice.random() * stage["took"])
        folder = run_folder(here)
        if trial % 2 == 1:
            later = dice.choice(stages[number:])
            kill_during(["run", "--resume", str(folder)], log, here, later["line"] + 1, dice.random() * later["took"])
        finish(["run", "--resume", str(folder)], log)
        found = result(folder)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        left_behind = [str(p.relative_to(folder)) for p in folder.rglob("*.part")]
        killed[stage["artefact"]] += 1
        if different or left_behind:
            wrong.append({"trial": trial, "killed_at": stage["artefact"], "different": different, "left": left_behind})
        print(f"{trial + 1} of {kills}: killed at {stage['artefact']}, {len(wrong)} came out otherwise", flush=True)
    return {"kills": kills, "seed": seed, "killed_at": dict(sorted(killed.items())), "wrong": wrong}


def cli(kills: int = 200, out: Path = Path("outputs/soak"), seed: int | None = None, whole: Path | None = None) -> None:
    """Kill, resume, compare; ends with code 1 when any result differs.

    Args:
        kills: number of trials.
        out: new folder for the runs.
        seed: of the random numbers; drawn when not given, and printed.
        whole: folder of a finished run of the same words to compare with; made when not given.
    """
    began = time.perf_counter()
    seen = soak(kills, out, random.SystemRandom().randrange(2**32) if seed is None else seed, whole)
    print(json.dumps(seen | {"minutes": (time.perf_counter() - began) / 60}, indent=1))
    sys.exit(1 if seen["wrong"] else 0)


if __name__ == "__main__":
    tyro.cli(cli)
