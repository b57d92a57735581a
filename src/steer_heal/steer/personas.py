"""The inputs of the extraction: contexts, each asked under two opposite personas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Personas:
    """Two system personas, and the user messages that are asked under both."""

    positive: str
    negative: str
    contexts: list[str]
