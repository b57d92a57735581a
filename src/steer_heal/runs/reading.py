"""Read a run folder, finished or not, without a model and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer_heal.config import SIZES, RunConfig, model_name
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.prompts import PromptsReading
from steer_heal.eval.reading import ArmReading, Survey
from steer_heal.eval.robustness import Robustness
from steer_heal.runs.folder import HARNESS, ROBUSTNESS
from steer_heal.runs.resume import opened, preset_and_config
from steer_heal.runs.rounds import Round, read_round
from steer_heal.runs.summary import PROMPTS, SUMMARY, SURVEY, Baselines, RunName, Summary, plain_file, summarise


@dataclass(frozen=True)
class Run:
    """The contents of a run folder. For an unfinished run, `summary` has the arms measured so far."""

    config: dict
    """the contents of config.json"""
    title: str
    env: dict
    commands: list[list[str]]
    """the arguments that it was started and resumed with"""
    seconds: dict[str, float]
    """computing time of every artefact"""
    base: ArmReading | None
    prompted: ArmReading | None
    answer_limit: int
    """of the free answers, tokens"""
    survey: Survey | None
    rounds: list[Round]
    summary: Summary
    status: str
    benchmarks: Benchmarks | None
    """read by `eval --harness`"""
    robustness: Robustness | None = None
    """read by `eval --robustness`"""

    @property
    def settings(self) -> RunConfig:
        return preset_and_config(self.config)[1]

    @property
    def name(self) -> str:
        title, rounds = self.title, self.config["rounds"]
        model, seed = model_name(self.config["model"]["path"]), self.config["seed"]
        return f"{model}, trait “{title}”, {rounds} round{'s' * (rounds != 1)}, seed {seed}"


def load(folder: Path) -> Run:
    """Read a run folder. Only complete rounds count. Only config.json and events.jsonl must exist."""
    folder = opened(folder)
    config, trait = folder.read("config.json"), folder.read("trait.json", {})
    arms = {name: folder.load(ArmReading, f"{name}.json") for name in ("base", "prompted", "negative")}
    counts = SIZES[config["eval"]["size"]]
    plain = [folder.load(ArmReading, plain_file(index)) for index in range(counts.plain_doses)]
    prompts = folder.load(PromptsReading, PROMPTS)
    baselines = Baselines(**arms, plain=[arm for arm in plain if arm is not None], prompts=prompts)
    rounds = []
    for number in range(config["rounds"]):
        if (there := read_round(folder, number)) is None:
            break
        rounds.append(there)
    summary, done = folder.load(Summary, SUMMARY), f"{len(rounds)} of {config['rounds']} rounds"
    status = f"unfinished: {done}" if summary is None else f"ended after {done}" if summary.stopped else ""
    if summary is None:
        name = trait.get("name", config["trait"])
        of = RunName(
            model=model_name(config["model"]["path"]), trait=name, seed=config["seed"], preset=config["preset"]
        )
        summary = summarise(of, baselines, rounds, folder.stage_seconds())
    return Run(
        config=config,
        title=trait.get("title", config["trait"]),
        env=folder.read("env.json", {}),
        commands=[event["argv"] for event in folder.events() if "argv" in event],
        seconds=folder.stage_seconds(),
        base=arms["base"],
        prompted=arms["prompted"],
        answer_limit=max(counts.demo_tokens, trait.get("answer_tokens") or 0),
        survey=folder.load(Survey, SURVEY),
        rounds=rounds,
        summary=summary,
        status=status,
        benchmarks=folder.load(Benchmarks, HARNESS),
        robustness=folder.load(Robustness, ROBUSTNESS),
    )
