"""The verb `export`: write a run's result as an adapter that plain PEFT loads, or a model that transformers loads.

`export_gguf` writes .gguf files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitsandbytes.nn import Linear4bit

from steer_heal.bake.student import Student
from steer_heal.commands.hub import licence_of
from steer_heal.config import UserError
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.files import json_text, write_text
from steer_heal.model.lm import LM
from steer_heal.records import unstructured
from steer_heal.report.card import Fold, Form, Made, model_card
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.reproduction import REPRODUCE, reproducible
from steer_heal.runs.resume import opened
from steer_heal.runs.student import finished_rounds, student_after


def export(folder: Path, to: Path, round_: int | None, merge: bool, rank: int | None = None) -> None:
    """Write the student after `round_` (the last one if None) into `to`, with a model card and reproduce.json.

    The adapter needs the run's base model; with a `rank` below its own it is folded to that. With `merge` the update is
    added to the base's float weights in the run's dtype, also when the run trained on NF4 weights.

    Raises UserError when the folder is no run, the round was not finished, or `to` is not empty.
    """
    of = Source(folder, round_)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {str(to)!r} is not an empty folder: choose a new one")
    student = student_after(folder, of.run.config, of.rounds, float_weights=merge)
    if merge:
        require_mergeable(student.lm)
    form = Form(
        kind="model" if merge else "adapter",
        fold=None if merge else folded(student, rank),
        licence=licence_of(of.run.settings.model.path),
        benchmarks=of.benchmarks,
        reproduce=True,
    )
    card = model_card(of.made, form)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as scratch:
        whole = Path(scratch) / "whole"
        if merge:
            student.merged().save_pretrained(whole)
            student.lm.tokenizer.save_pretrained(whole)
        else:
            student.save(whole, student.history)
        write_text(whole / "README.md", card)
        write_text(whole / REPRODUCE, of.reproduce)
        whole.rename(to)  # also over an empty folder


class Source:
    """A run's student after `round_` (None: the last finished round), and what is told of it beside its weights."""

    def __init__(self, folder: Path, round_: int | None) -> None:
        self.folder, self.run = opened(folder), read_run(folder)
        self.rounds = finished_rounds(folder, self.run.config["rounds"], round_)

    @property
    def made(self) -> Made:
        trait, argv = self.folder.read("trait.json"), self.folder.first_argv
        return Made(summary=self.run.summary, config=self.run.config, trait=trait, argv=argv, rounds=self.rounds)

    @property
    def benchmarks(self) -> Benchmarks | None:
        """Those of this student, where they were read."""
        found = self.run.benchmarks
        return found if found is not None and found.round == self.rounds - 1 else None

    @property
    def reproduce(self) -> str:
        """The text of reproduce.json."""
        return json_text(unstructured(reproducible(self.run, self.folder, self.rounds)))


def folded(student: Student, rank: int | None) -> Fold:
    """Fold the student to a rank, if its own is larger."""
    before = student.rank
    lost = student.fold(rank) if rank is not None and rank < before else 0.0
    return Fold(before=before, rank=student.rank, lost=lost)


def require_mergeable(lm: LM, flag: str = "--merge", mend: str = "export the adapter alone, without --merge") -> None:
    """Raise UserError for a base whose own files are quantised: there are no float weights to add an update to."""
    if any(isinstance(module, Linear4bit) for module in lm.model.modules()):
        raise UserError(f"{flag}: the weights of {lm.name!r} are stored in 4 bits: {mend}")
