"""steer-heal in Python: `import steer_heal as sh`. The verbs of the command line call the same functions.

>>> import steer_heal as sh
>>> patient = sh.Trait.from_personas("patient", "You have all the time in the world.", "You are always in a hurry.")
>>> lm = sh.load("tiny-random")
>>> vector = sh.extract(lm, patient, contexts=4, band=(0.3, 0.7)).vector
>>> steered = sh.answer(lm, "Hello!", vector=vector, dose=1.0, tokens=4)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
import torch

from steer_heal import data, flags
from steer_heal.bake.student import Student
from steer_heal.commands.preset import chosen, with_preset
from steer_heal.commands.run import run as carry_out
from steer_heal.config import ModelConfig, SteerConfig
from steer_heal.data import Trait, load_trait
from steer_heal.model.decode import decode
from steer_heal.model.lm import LM
from steer_heal.model.loading import load as load_model
from steer_heal.model.steering import AnyVector, Steering
from steer_heal.presets import PRESETS
from steer_heal.report.figures import frontier_figure
from steer_heal.report.page import build
from steer_heal.report.words import headline
from steer_heal.runs.resume import opened
from steer_heal.runs.student import finished_rounds, student_after, vector_of
from steer_heal.runs.summary import SUMMARY, Summary
from steer_heal.steer.extract import Extraction, Personas
from steer_heal.steer.extract import extract as extract_vector
from steer_heal.verbs import verbs

Value = str | int | float | bool | Iterable[str | int | float]


def load(
    model: str,
    quant: Literal["none", "nf4"] = "none",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> LM:
    """Load a chat model: a hub id, a folder, a .gguf file, `random:ARCHITECTURE`, or the model of a preset.

    Raises UserError for a model that cannot be loaded, or that steer-heal would compute otherwise than transformers.
    """
    path = PRESETS[model].model.path if model in PRESETS else model
    return load_model(ModelConfig(path=path, quant=quant, dtype=dtype, device=device))


def extract(lm: LM, trait: Trait, contexts: int = 64, band: tuple[float, float] = (0.3, 0.7)) -> Extraction:
    """Compute the steering vector of a trait: `.vector`, and in `.report` how reliable it is in each block.

    Args:
        contexts: user messages over which the difference of the two personas is averaged, at most 256.
        band: the blocks to steer, as shares of depth.

    Raises UserError when both personas leave the model in the same state.
    """
    asked = list(data.contexts()[:contexts])
    return extract_vector(lm, Personas(trait.positive, trait.negative, asked), SteerConfig(band=band))


def answer(
    lm: LM,
    message: str,
    system: str | None = None,
    vector: AnyVector | None = None,
    dose: float = 1.0,
    tokens: int = 64,
) -> str:
    """The greedy answer to a message, at most `tokens` long; with a `vector`, steered by `dose` times it."""
    steering = None if vector is None else Steering(vector, torch.tensor([dose]))
    (written,) = decode(lm, [lm.prompt(message, system)], tokens, steering)
    return lm.text(written.ids)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path

    @cached_property
    def summary(self) -> Summary:
        """Every arm of every round with its intervals, as in summary.json."""
        return opened(self.folder).load(Summary, SUMMARY)

    @property
    def verdict(self) -> str:
        """The result in two or three sentences."""
        return headline(self.summary)[0]

    @cached_property
    def student(self) -> Student:
        """The base model with the history of all rounds on it, loaded at the first use."""
        config = opened(self.folder).read("config.json")
        return student_after(self.folder, config, finished_rounds(self.folder, config["rounds"], None))

    @cached_property
    def vector(self) -> AnyVector:
        """The first round's steering vector."""
        return vector_of(opened(self.folder))

    def chat(self, message: str, gate: float = 1.0, system: str | None = None, tokens: int = 64) -> str:
        """The greedy answer to a message. `gate` dials between the base (0) and the student (1)."""
        with self.student.view(history=gate, now=0.0):
            return answer(self.student.lm, message, system, tokens=tokens)

    def figure(self) -> go.Figure:
        """Trait against cost: plain steering at each dose, and the student after each round."""
        return frontier_figure(self.summary)

    def report(self) -> Path:
        """Write report.html anew; return its path."""
        return build(self.folder).path


def run(model: str, trait: Trait | str, **settings: Value) -> Result:
    """Train a trait into a model, as `steer-heal run` does; progress is printed.

    Args:
        model: a preset, or a model as for `load`, whose settings are then measured.
        trait: one of yours, the name of a built-in one, or a .toml file.
        settings: the flags of `steer-heal run`, by their names: `rounds=1, **{"heal.lora.r": 8}`.

    Raises UserError for what the command line would refuse.
    """
    named, given = (trait, None) if isinstance(trait, str) else (f"{trait.name}.toml", trait)
    flagged = [
        word for name, value in settings.items() for word in flags.words_of(name.replace("_", "-"), *_values(value))
    ]
    _, words = with_preset(["run", model, "--trait", named, *flagged])
    asked = flags.read(verbs(chosen(words)), words, "steer_heal.run")
    folder, _ = carry_out(asked.config, asked.preset, words, given)
    return Result(folder.path)


def _values(value: Value) -> list[str]:
    """A setting's value, or its values, as words of the command line."""
    several = not isinstance(value, str) and isinstance(value, Iterable)
    return [str(one) for one in (value if several else [value])]


def resume(folder: str | Path) -> Result:
    """Go on with a run that was stopped; a finished one is opened. Raises UserError when it is no run folder."""
    words = ["run", "--resume", str(folder)]
    asked = flags.read(verbs(chosen(words)), words, "steer_heal.resume")
    if not (Path(folder) / SUMMARY).is_file():
        carry_out(asked.config, asked.preset, words)
    return Result(Path(folder))


__all__ = ["Result", "Trait", "answer", "extract", "load", "load_trait", "resume", "run"]
