"""The verb `reproduce`: make the run behind a result again, and compare what came out with what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from steer_heal import flags
from steer_heal.commands.export import Source
from steer_heal.commands.hub import fetched
from steer_heal.commands.preset import chosen, config_words, giving_config
from steer_heal.commands.run import run
from steer_heal.config import PACKAGED_GGUF, UserError, hub_id
from steer_heal.data import restored
from steer_heal.report.page import build
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reproduction import (
    REPRODUCE,
    Outcome,
    Reproducible,
    adapters,
    outcomes,
    read_reproducible,
    reproducible,
)
from steer_heal.runs.resume import as_recorded, is_run
from steer_heal.runs.summary import Summary
from steer_heal.verbs import verbs


@dataclass(frozen=True)
class Again:
    """A recorded run and the one that was made from the record."""

    recorded: Reproducible
    folder: RunDir
    summary: Summary

    @property
    def reached(self) -> bool:
        """Whether the new run has the round that was recorded."""
        return self.recorded.round < len(self.summary.rounds)

    @property
    def outcomes(self) -> list[tuple[Outcome, Outcome | None]]:
        """Every recorded outcome, and the new run's; None where it has none."""
        if not self.reached:
            return [(one, None) for one in self.recorded.outcomes]
        found = outcomes(self.summary, self.summary.rounds[self.recorded.round])
        new = {(one.arm, one.measure): one for one in found}
        return [(one, new.get((one.arm, one.measure))) for one in self.recorded.outcomes]

    @property
    def agrees(self) -> bool:
        return all(new is not None and one.agrees(new) for one, new in self.outcomes)

    def table(self) -> str:
        rows = [
            {
                "arm": one.arm,
                "over base": one.measure,
                "recorded [95%]": "{:+.3f} [{:+.3f}, {:+.3f}]".format(one.over_base, *one.ci),
                "again": "" if new is None else f"{new.over_base:+.3f}",
                "inside": "yes" if new is not None and one.agrees(new) else "no",
            }
            for one, new in self.outcomes
        ]
        with pl.Config(
            tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120, tbl_rows=-1
        ):
            return str(pl.DataFrame(rows))

    def sentence(self) -> str:
        """The result in one sentence, and what was other than at the time."""
        inside = sum(new is not None and one.agrees(new) for one, new in self.outcomes)
        number = self.recorded.round
        if not self.reached:
            done = len(self.summary.rounds)
            return f"Not reproduced: the new run ended after {done} rounds, the record is of round {number}."
        same = adapters(self.folder, number + 1) == self.recorded.sha256
        bits = "; the adapters are the same bit for bit" if same else ""
        said = f"{inside} of {len(self.outcomes)} outcomes lie in their recorded intervals{bits}"
        verdict = "Reproduced" if self.agrees else "Not reproduced"
        return f"{verdict}: {said}.{''.join(f' {other}.' for other in self.others())}"

    def others(self) -> Iterator[str]:
        """What is other than it was recorded, beside the outcomes."""
        then, now = self.recorded.env, self.folder.read("env.json")
        if (word := self.summary.rounds[self.recorded.round].verdict.word) != self.recorded.verdict:
            yield f"The verdict was {self.recorded.verdict}, it is {word} now"
        if now["model"]["sha256"] != then["model"]["sha256"]:
            yield "The base has other weights"
        versions = [(name, then["packages"].get(name), here) for name, here in now["packages"].items()]
        if changed := [f"{name} {here} (then {was})" for name, was, here in versions if was != here]:
            yield f"Other versions: {', '.join(changed)}"


def reproduce(target: str, out: str) -> tuple[str, bool]:
    """Run again what `target` recorded, into a new folder under `out`; return the comparison, and whether it agrees.

    `target` is an export's folder, a reproduce.json, a run folder or a model at the hub. The new run has the recorded
    settings and trait, and the type of the weights that the recorded one had.

    Raises UserError when `target` records no run, and as `run` does.
    """
    recorded, table = record_of(target)
    with giving_config(target):
        preset, flagged = config_words(table)
        trait = restored(recorded.trait)
    words = ["run", preset, *(word for part in flagged.values() for word in part), "--out", out]
    asked = flags.read(verbs(chosen(words)), words, "steer-heal reproduce")
    _require_here(asked.config.model.path)
    folder, summary = run(asked.config, asked.preset, words, trait)
    build(folder.path)
    again = Again(recorded, folder, summary)
    return f"\n{again.table()}\n{again.sentence()}", again.agrees


def record_of(target: str) -> tuple[Reproducible, dict]:
    """What `target` recorded, and the contents of a config.json that makes it again on this machine."""
    path = Path(target).expanduser()
    if is_run(path):
        of = Source(path, None)
        model = asdict(as_recorded(of.run.settings.model, of.run.env))
        return reproducible(of.run, of.folder, of.rounds), of.run.config | {"model": model}
    if not path.exists() and hub_id(target):
        path = fetched(target, REPRODUCE)
    file = path / REPRODUCE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{target!r} has no {REPRODUCE}: give an export's folder, a run folder or a model at the hub")
    recorded = read_reproducible(file)
    return recorded, recorded.config


def _require_here(model: str) -> None:
    """Raise UserError for a base that the record has by its name alone, and that is not here."""
    here = hub_id(model) or model in PACKAGED_GGUF or model.startswith("random:") or Path(model).expanduser().exists()
    if not here:
        raise UserError(
            f"the run's base {model!r} was a folder or a file of another machine: put it, or a link to it, where you "
            "run this"
        )
