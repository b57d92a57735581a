"""Send every event of a run to a tracker: trackio (local, open) or wandb, which share one interface."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from steer_heal.config import UserError, flat

PROJECT = "steer-heal"


def check_tracker(name: str) -> None:
    """Raise UserError when the tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: it is not installed: pip install 'steer_heal[{name}]', or leave --track out")


def follower(name: str, run: str, config: dict) -> Callable[[dict], None]:
    """A function to call with each event. It logs numbers and strings under the event's kind; "done" ends tracking."""
    if name == "none":
        return lambda event: None
    tracker = importlib.import_module(name)
    tracker.init(project=PROJECT, name=run, config=config)

    def follow(event: dict) -> None:
        kind = event["event"]
        said = {key: value for key, value in flat(event, "/") if isinstance(value, int | float | str)}
        tracker.log({f"{kind}/{key}": value for key, value in said.items() if key not in ("event", "time")})
        if kind == "done":
            tracker.finish()

    return follow
