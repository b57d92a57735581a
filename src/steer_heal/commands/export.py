"""The verb `export`: write a run's result as an adapter that plain PEFT loads, or a model that transformers loads."""

from __future__ import annotations

from pathlib import Path

from steer_heal.config import UserError
from steer_heal.files import write_text
from steer_heal.report.card import model_card
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.resume import opened
from steer_heal.runs.student import finished_rounds, student_after


def export(folder: Path, to: Path, round_: int | None, merge: bool) -> None:
    """Write the student after `round_` (the last one if None) into `to`, with a model card.

    The adapter needs the run's base model. With `merge` the update is added to the base's float weights in the run's
    dtype, also when the run trained on NF4 weights.

    Raises UserError when the folder is no run, the round was not finished, or `to` is not empty.
    """
    made = opened(folder)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {str(to)!r} is not an empty folder: choose a new one")
    run = read_run(folder)
    rounds = finished_rounds(folder, run.config["rounds"], round_)
    student = student_after(folder, run.config, rounds, float_weights=merge)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.exists():
        to.rmdir()  # it is empty, and saving makes it again
    if merge:
        student.merged().save_pretrained(to)
        student.lm.tokenizer.save_pretrained(to)
    else:
        student.save(to, student.history)
    card = model_card(run.summary, run.config, made.read("trait.json"), made.first_argv, rounds, merge)
    write_text(to / "README.md", card)
