"""Frames: the ways in which a user's text reaches a model. Those of HELD_OUT are used for reading alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """What stands around a user's text and before the answer."""

    name: str
    system: str | None = None
    """a system text, before the persona if there is one"""
    before: tuple[str, str] | None = None
    """a first exchange: the user's text and the answer to it"""
    ask: str = ""
    """follows the user's text"""
    begun: str = ""
    """the beginning of the answer"""


USUAL = Frame("usual")  # of training, and of all other instruments
HELD_OUT = (
    Frame("assistant", system="You are a helpful assistant."),
    Frame(
        "second turn",
        before=(
            "Which way should a bookshelf face so that the sun does not fade the spines?",
            "Away from the window, so towards the north or along a side wall. A thin curtain helps as well.",
        ),
    ),
    Frame("JSON", ask=' Reply as JSON with one key, "answer".', begun='{"answer": "'),
)
