"""Load the student of a run as it was after one of its rounds, and the vector of a round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer_heal.bake.student import Student
from steer_heal.config import ModelConfig, UserError
from steer_heal.model.lm import LM
from steer_heal.model.loading import load
from steer_heal.model.steering import AnyVector
from steer_heal.runs.environment import require_recorded
from steer_heal.runs.folder import RunDir
from steer_heal.runs.resume import as_recorded, opened
from steer_heal.runs.rounds import InRound, rounds_done
from steer_heal.steer.extract import read_vector


def vector_of(run: RunDir, number: int = 0) -> AnyVector:
    """The steering vector of a round."""
    return read_vector(run.find(InRound.VECTOR.of(number))).vector


def finished_rounds(folder: Path, planned: int, round_: int | None) -> int:
    """Number of rounds up to and with `round_` (None: the last finished). Raises UserError if it is not finished."""
    done = rounds_done(folder, planned)
    if done == 0 or not 0 <= (round_ if round_ is not None else done - 1) < done:
        finished = f"rounds 0 to {done - 1} are" if done else "no round is"
        raise UserError(f"--round {round_}: {finished} finished in {str(folder)!r}")
    return done if round_ is None else round_ + 1


def base_of(folder: Path, float_weights: bool = False) -> LM:
    """The model of a run; `float_weights` loads it unquantised.

    Raises UserError when other weights lie under its path now than those that the run was made with.
    """
    run = opened(folder)
    env = run.read("env.json")
    model = as_recorded(ModelConfig(**run.read("config.json")["model"]), env)
    lm = load(model)
    require_recorded(lm, model, env)
    if float_weights and model.quant != "none":  # what the run noted is of the quantised weights
        del lm
        lm = load(replace(model, quant="none"))
    return lm


def student_after(folder: Path, config: dict, rounds: int, float_weights: bool = False) -> Student:
    """The model of a run with its first `rounds` rounds folded, as in the run; `float_weights` loads it unquantised."""
    student = Student(base_of(folder, float_weights))
    for index in range(rounds):
        student.load_round(opened(folder).find(InRound.ADAPTER.of(index)))
        student.fold(config["heal"]["lora"]["fold_rank"])
    return student
