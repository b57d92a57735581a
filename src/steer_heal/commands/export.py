"""A run's result for others: an adapter that plain PEFT loads, or a whole model that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

from steer_heal.bake.student import Student
from steer_heal.config import ModelConfig, UserError
from steer_heal.files import write_text
from steer_heal.model.loading import load
from steer_heal.report.card import model_card
from steer_heal.resume import opened
from steer_heal.rundir import rounds_done
from steer_heal.runs.reading import load as read_run


def export(folder: Path, to: Path, round_: int | None, merge: bool) -> None:
    """Write the student after `round_` (the last one if None) into `to`, with a model card.

    An adapter belongs on the run's base model. Merged, the update is added to the base's float weights in the run's
    dtype, also when the run trained on NF4 ones.

    Raises UserError when the folder is no run, the round was not finished, or `to` is not empty.
    """
    opened(folder)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {str(to)!r} is not an empty folder: choose a new one")
    run = read_run(folder)
    rounds = finished_rounds(folder, run.config["rounds"], round_)
    student = student_after(folder, run.config, rounds, float_weights=merge)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.exists():
        to.rmdir()  # it is empty; the adapter's folder is renamed into place
    if merge:
        student.merged().save_pretrained(to)
        student.lm.tokenizer.save_pretrained(to)
    else:
        student.save(to, student.history)
    trait = opened(folder).read("trait.json")
    write_text(to / "README.md", model_card(run.summary, run.config, trait, rounds, merge))


def finished_rounds(folder: Path, planned: int, round_: int | None) -> int:
    """How many rounds make the student after `round_`, the last finished one if None. Raises UserError if it is not."""
    done = rounds_done(folder, planned)
    if done == 0 or not 0 <= (round_ if round_ is not None else done - 1) < done:
        finished = f"rounds 0 to {done - 1} are" if done else "no round is"
        raise UserError(f"--round {round_}: {finished} finished in {str(folder)!r}")
    return done if round_ is None else round_ + 1


def student_after(folder: Path, config: dict, rounds: int, float_weights: bool = False) -> Student:
    """The model of a run with its first `rounds` rounds folded, as the run itself had it."""
    model = ModelConfig(**config["model"])
    student = Student(load(ModelConfig(model.path, "none", model.dtype, model.device) if float_weights else model))
    for index in range(rounds):
        student.load_round(opened(folder).find(f"r{index:02d}/adapter"))
        student.fold(config["heal"]["fold_rank"])
    return student
