"""The inputs of the extraction: contexts, each asked under two opposite personas, and the personas of other traits."""

from __future__ import annotations

from dataclasses import dataclass

from steer_heal.config import UserError
from steer_heal.data import Trait, load_trait


@dataclass(frozen=True)
class Neighbour:
    """A trait whose vector is projected out, see `steer.without`."""

    name: str
    positive: str
    negative: str


def neighbours(named: tuple[str, ...], trait: Trait) -> list[Neighbour]:
    """The traits of `steer.without`. Raises UserError for one that cannot be read, or that is the trait itself."""
    found = []
    for word in named:
        other = load_trait(word)
        if other.name == trait.name or (other.positive, other.negative) == (trait.positive, trait.negative):
            raise UserError(
                f"steer.without {word!r} is the trait that is steered, and nothing would be left of its vector: name "
                "other traits"
            )
        found.append(Neighbour(other.name, other.positive, other.negative))
    return found


@dataclass(frozen=True)
class Personas:
    """Two system personas, and the user messages that are asked under both."""

    positive: str
    negative: str
    contexts: list[str]
    without: tuple[Neighbour, ...] = ()
