"""Who is talked to: the student of a run or an adapter, beside its base; or a model alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from steer_heal.bake.foreign import scalable
from steer_heal.bake.student import Student
from steer_heal.commands.target import opened as without_run
from steer_heal.config import ModelConfig, UserError
from steer_heal.eval.arms import Arm
from steer_heal.model import gguf_file
from steer_heal.model.steering import AnyVector
from steer_heal.runs.folder import EVENTS
from steer_heal.runs.resume import measured_trait
from steer_heal.runs.resume import opened as opened_run
from steer_heal.runs.student import finished_rounds, student_after, vector_of

AS_IT_IS = ModelConfig(path="", quant="none")  # without --base, --quant, --dtype and --device


@dataclass(frozen=True)
class OfRun:
    """What only a run has: the round that is talked to, the positive persona, and the first round's vector."""

    folder: Path
    round: int
    persona: str
    vector: AnyVector


@dataclass(frozen=True)
class Subject:
    """A model with its trained part, the arm that has all of that part, and the run that it comes from."""

    student: Student
    own: Arm
    run: OfRun | None = None

    @property
    def alone(self) -> bool:
        """Whether it is a model with no adapter on it, which is its own base."""
        return self.student.peft is None

    @property
    def gradual(self) -> bool:
        """Whether its gate may lie between base (0) and all of the adapter (1)."""
        return self.run is not None or (not self.alone and scalable(self.student))

    def of_run(self, command: str) -> OfRun:
        """The run. Raises UserError, which names the command that needs it, where there is none."""
        if self.run is None:
            kind = "a model alone" if self.alone else "an adapter"
            raise UserError(f"{command} needs a run, and this is {kind}: chat with a run's folder")
        return self.run

    def require_gate(self, gate: float, command: str) -> None:
        """Raise UserError for a gate that there is not."""
        if self.alone:
            raise UserError(f"{command} needs a run or an adapter, and this is a model alone: chat with one of those")
        if gate not in (0.0, 1.0) and not self.gradual:
            raise UserError(f"{command} {gate:g}: a DoRA adapter is on (1) or off (0)")


def opened(what: str, round_: int | None, model: ModelConfig) -> Subject:
    """The run, the adapter or the model that is named. `model` says how a model, or an adapter's base, is loaded.

    Raises UserError for what is none of them, cannot be loaded, or has not what the flags ask for.
    """
    folder = Path(what).expanduser()
    if (folder / EVENTS).is_file():
        if model != AS_IT_IS:
            raise UserError(
                f"{what!r} is a run, which is loaded as it was made: leave out --base, --quant, --dtype and --device"
            )
        return of_run(folder, round_)
    if model.path and not (folder / "adapter_config.json").is_file():
        raise UserError(f"--base {model.path!r} is of an adapter, and {what!r} is none: leave it out")
    try:
        target = without_run(what, round_, None, model)
    except UserError as error:
        if _on_top_of_a_model(folder):
            raise UserError(
                f"{what!r} goes on top of a model in llama.cpp and is none: chat with the run, with its adapter's "
                "folder, or with an export of --merge"
            ) from error
        if folder.exists() or what.startswith("random:"):
            raise
        raise UserError(f"{what!r} is no run folder and no adapter's folder; as a model: {error}") from error
    if target.arm is None:
        return Subject(target.student, Arm("model", history=0.0, now=0.0))
    return Subject(target.student, replace(target.arm, name="adapter"))


def _on_top_of_a_model(file: Path) -> bool:
    """Whether it is a .gguf file with an adapter or a control vector."""
    if file.suffix.lower() != ".gguf" or not file.is_file():
        return False
    try:
        reader = gguf_file.opened(file, "chat")
    except UserError:
        return False
    kinds = {gguf_file.value(reader, f"general.{key}") for key in ("type", "architecture")}
    return bool(kinds & {"adapter", gguf_file.CONTROL_VECTOR})


def of_run(folder: Path, round_: int | None) -> Subject:
    """The student of a run after `round_`, the last finished round if None.

    Raises UserError when the folder is no run or the round was not finished.
    """
    run = opened_run(folder)
    config = run.read("config.json")
    rounds = finished_rounds(folder, config["rounds"], round_)
    student = student_after(folder, config, rounds)
    known = OfRun(folder, rounds - 1, measured_trait(run).positive, vector_of(run))
    return Subject(student, Arm(f"student after round {known.round}", now=0.0), known)
