"""The methods of steering-lite (wassname/steering-lite) as `--steer.method lite:NAME`, through its public API.

It is an optional package (`just vendor`). Its hooks take one coefficient for a whole forward pass, so rows are batched
by dose. Methods that hook linear layers inside a block fail once PEFT has wrapped these layers. Methods that act on the
residual stream work.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from steer_heal.config import UserError
from steer_heal.model.lm import LM
from steer_heal.model.steering import ForeignVector
from steer_heal.steer.personas import Personas

PREFIX = "lite:"


class LiteVector(ForeignVector):
    """A trained steering-lite vector; a dose is its coefficient."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.layers = tuple(sorted(inner.state))

    def attached(self, lm: LM, dose: float) -> AbstractContextManager:
        return self.inner(lm.model, C=dose)


def library() -> Any:
    """steering-lite itself. Raises UserError when it is not installed."""
    if importlib.util.find_spec("steering_lite") is None:
        raise UserError("steer.method lite:... needs the package steering-lite, which is not installed: just vendor")
    import steering_lite

    return steering_lite


def check_method(method: str) -> None:
    """Raise UserError for a method that steering-lite does not have."""
    name, known = method.removeprefix(PREFIX), library().REGISTRY
    if name not in known:
        raise UserError(f"steering-lite has no method {name!r}: choose {', '.join(sorted(known))}")


def train(lm: LM, method: str, personas: Personas, layers: tuple[int, ...]) -> LiteVector:
    """Run steering-lite's own extraction on our prompts, in float32, for the given blocks.

    Raises UserError when the method does not work on this model.
    """
    steering_lite = library()
    described = {"method": method.removeprefix(PREFIX), "layers": layers, "coeff": 1.0, "dtype": "float32"}
    contexts, both = personas.contexts, (personas.positive, personas.negative)
    texts = [[_text(lm, text, persona) for text in contexts] for persona in both]
    longest = max(len(lm.prompt(text, persona)) for text in contexts for persona in both)
    config = steering_lite.SteeringConfig.from_dict(described)
    try:
        inner = steering_lite.train(
            lm.model, lm.tokenizer, *texts, config, batch_size=lm.read_rows, max_length=longest + 1
        )
    except RuntimeError as error:
        raise UserError(
            f"steering-lite cannot use {method!r} on this model ({error}): choose another method"
        ) from error
    return LiteVector(inner)


def _text(lm: LM, user: str, system: str) -> str:
    """The prompt as text without the leading BOS that the tokenizer adds. Its tokens are those of `lm.prompt`."""
    ids = lm.prompt(user, system)
    added = lm.tokenizer("").input_ids
    return lm.tokenizer.decode(ids[len(added) :] if added and ids[: len(added)] == added else ids)


def save(path: Path, vector: LiteVector) -> None:
    vector.inner.save(str(path))


def load(path: Path) -> LiteVector:
    return LiteVector(library().Vector.load(str(path)))
