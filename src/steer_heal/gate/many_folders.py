"""Time `results` over many run folders: copies of one finished run, ten seeds for each value of a flag.

    python -m steer_heal.gate.many_folders --out /tmp/many --folders 1000

Only the files that the tables need are copied; vectors, adapters and texts are left out. Seconds are processor time,
imports included, so that other programs do not count. Ends with status 1 above the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from steer_heal.files import sha256
from steer_heal.runs.folder import EVENTS
from steer_heal.terminal import MODULE

LIMIT_SECONDS = 10.0  # for a thousand folders
SEEDS = 10
VIEWS = {"one row a run": (), "by a flag": ("--by", "heal.barrier.lam"), "round by round": ("--rounds",)}


def copies(run: Path, out: Path, folders: int) -> None:
    """Write `folders` copies of `run` with other seeds and barrier weights, and with correct checksums."""
    files = [path for path in sorted(run.rglob("*.json")) if path.is_file()]
    events = [json.loads(line) for line in (run / EVENTS).read_text("utf-8").splitlines()]
    config = json.loads((run / "config.json").read_text("utf-8"))
    for number in range(folders):
        folder = out / f"{run.name}_{number:04d}"
        for path in files:
            copy = folder / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        changed = config | {"seed": number % SEEDS}
        changed["heal"] = config["heal"] | {"barrier": config["heal"]["barrier"] | {"lam": number // SEEDS}}
        (folder / "config.json").write_text(json.dumps(changed, indent=1), "utf-8")
        sums = {"config.json": sha256(folder / "config.json")}
        start = events[0] | {"sha256": events[0]["sha256"] | sums}
        (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in (start, *events[1:])), "utf-8")


def seconds(out: Path, flags: tuple[str, ...]) -> float:
    """Processor seconds of `results` in its own process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "results", "--out", str(out), *flags], capture_output=True, text=True
    )
    if done.returncode or "left out" in done.stdout:
        sys.exit(f"results failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("--out", type=Path, required=True, help="an empty or new folder for the copies")
    given.add_argument("--folders", type=int, default=1000)
    given.add_argument("--run", type=Path, help="the finished run to copy; without it a tiny one is made first")
    given = given.parse_args()
    run = given.run
    if run is None:
        subprocess.run(
            [sys.executable, "-m", MODULE, "run", "tiny-random", "--out", str(given.out / "original")], check=True
        )
        (run,) = (given.out / "original").iterdir()
    copied = given.out / "copies"
    copies(run, copied, given.folders)
    took = {name: seconds(copied, flags) for name, flags in VIEWS.items()}
    for name, value in took.items():
        print(f"{given.folders} folders, {name}: {value:.1f} s")
    if max(took.values()) > LIMIT_SECONDS * given.folders / 1000:
        sys.exit(1)


if __name__ == "__main__":
    main()
