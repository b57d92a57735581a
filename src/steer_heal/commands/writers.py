"""Who writes the rows of a trait file: a model behind an OpenAI-compatible endpoint, or one that is loaded here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from steer_heal.commands.endpoint import Endpoint, Flags, Form, object_of
from steer_heal.config import ModelConfig, model_name
from steer_heal.data.frames import Frame

ROWS = {"endpoint": 16, "local": 4}  # that a writer is asked for at once
DRAWS = 8  # answers that a local model draws to an ask, together: that takes little longer than one
TOKENS = 90  # of a row, from a local model; personas are longer
FLAGS = Flags("--write", "--writer-model", "write")
BEGUN = Frame("rows", begun='{"rows": [{"')  # a small model goes on with JSON where it would not begin it


@dataclass(frozen=True)
class Ask:
    """Rows that are wanted: the request in words, the keys of a row, and the number of rows."""

    text: str
    keys: tuple[str, ...]
    rows: int

    @property
    def schema(self) -> dict:
        """The form of the answer as a JSON schema."""
        texts = {key: {"type": "string"} for key in self.keys}
        if "trait_answer" in texts:
            texts["trait_answer"]["enum"] = ["yes", "no"]
        return object_of({"rows": {"type": "array", "items": object_of(texts)}})


@dataclass(frozen=True)
class Writer:
    """Answers asks in text, which may be anything."""

    name: str
    rows: int
    """that it is best asked for at once"""
    write: Callable[[Ask], str]
    draws: int = 1
    """answers to an ask, joined"""


def local(config: ModelConfig) -> Writer:
    """A chat model that is loaded here. Raises UserError for one that cannot be loaded."""
    from steer_heal.model.decode import Sampling, decode
    from steer_heal.model.loading import load

    lm, numbers = load(config), count()

    def write(ask: Ask) -> str:
        drawn = Sampling(("trait file", next(numbers)), temperature=0.7)
        prompts = [lm.prompt(ask.text, frame=BEGUN)] * DRAWS
        answers = decode(lm, prompts, TOKENS * max(3, ask.rows), None, drawn)
        return "\n".join(BEGUN.begun + lm.text(answer.ids) for answer in answers)

    return Writer(model_name(config.path), ROWS["local"], write, DRAWS)


def endpoint(url: str, model: str) -> Writer:
    """A model behind an OpenAI-compatible endpoint; without a name, the first one that the endpoint lists.

    The key is that of the environment variable OPENAI_API_KEY.

    Raises UserError when the package openai is missing, for a URL that is none, and for an endpoint that does not
    answer as one.
    """
    server = Endpoint(url, FLAGS)
    model = server.model(model)
    return Writer(model, ROWS["endpoint"], lambda ask: server.answer(model, ask.text, Form("rows", ask.schema)).text)
