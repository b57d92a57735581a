"""Load the student of a run as it was after one of its rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer_heal.bake.student import Student
from steer_heal.config import ModelConfig, UserError
from steer_heal.model.loading import load
from steer_heal.runs.environment import as_recorded
from steer_heal.runs.resume import opened
from steer_heal.runs.rounds import InRound, rounds_done


def finished_rounds(folder: Path, planned: int, round_: int | None) -> int:
    """Number of rounds up to and with `round_` (None: the last finished). Raises UserError if it is not finished."""
    done = rounds_done(folder, planned)
    if done == 0 or not 0 <= (round_ if round_ is not None else done - 1) < done:
        finished = f"rounds 0 to {done - 1} are" if done else "no round is"
        raise UserError(f"--round {round_}: {finished} finished in {str(folder)!r}")
    return done if round_ is None else round_ + 1


def student_after(folder: Path, config: dict, rounds: int, float_weights: bool = False) -> Student:
    """The model of a run with its first `rounds` rounds folded, as in the run; `float_weights` loads it unquantised."""
    model = as_recorded(ModelConfig(**config["model"]), opened(folder).read("env.json"))
    student = Student(load(replace(model, quant="none") if float_weights else model))
    for index in range(rounds):
        student.load_round(opened(folder).find(InRound.ADAPTER.of(index)))
        student.fold(config["heal"]["lora"]["fold_rank"])
    return student
