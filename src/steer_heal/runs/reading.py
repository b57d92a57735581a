"""What a run's folder holds, for those who only look: no model, no torch, finished or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer_heal.config import SIZES
from steer_heal.eval.record import arms_record
from steer_heal.runs.resume import opened
from steer_heal.runs.rounds import Round, read_round


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Of an unfinished run, `summary` has the arms measured so far."""

    config: dict
    title: str
    env: dict
    events: list[dict]
    base: dict | None
    rounds: list[Round]
    summary: dict
    status: str

    @property
    def name(self) -> str:
        title, rounds = self.title, self.config["rounds"]
        model, seed = self.config["model"]["path"], self.config["seed"]
        return f"{model}, trait “{title}”, {rounds} round{'s' * (rounds != 1)}, seed {seed}"


def load(folder: Path) -> Run:
    """Read a run folder. Rounds count when both their arms were measured; only config.json must be there."""
    folder = opened(folder)
    read = folder.read
    config, summary, *arms = map(read, ("config.json", "summary.json", "base.json", "prompted.json", "negative.json"))
    rounds = []
    for index in range(config["rounds"]):
        if (there := read_round(folder, index)) is None:
            break
        rounds.append(there)
    done = f"{len(rounds)} of {config['rounds']} rounds"
    status = f"unfinished: {done}" if not summary else f"ended after {done}" if summary.get("stopped") else ""
    plain = [read(f"plain/d{index}.json") for index in range(SIZES[config["eval"]["size"]].plain_doses)]
    summary = summary or arms_record(*arms, [*filter(None, plain)], [vars(r) for r in rounds])
    title = read("trait.json", {"title": config["trait"]})["title"]
    return Run(config, title, read("env.json", {}), folder.events(), arms[0], rounds, summary, status)
