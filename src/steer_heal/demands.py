"""What a config must satisfy: the bounds at its fields, and what no bound on one field can say."""

from __future__ import annotations

from datetime import date

from steer_heal.config import FILE, STEER_METHODS, Knob, RunConfig, SteerConfig, UserError, Within, knobs, nearest


def check(config: RunConfig) -> None:
    """Raise UserError for a value that no run can use."""
    for knob in knobs(config):
        for bound in (mark for mark in knob.marks if isinstance(mark, Within)):
            _check_within(knob, bound)
    for fine, complaint in _demands(config):
        if not fine:
            raise UserError(complaint)


def _check_within(knob: Knob, bound: Within) -> None:
    if isinstance(knob.value, tuple):
        low, high = knob.value
        if not (bound.holds(low) and bound.holds(high) and low <= high):
            raise UserError(f"{knob.name} is {low} {high}: give two numbers in {bound.interval}, the smaller one first")
    elif not isinstance(knob.value, str) and not bound.holds(knob.value):
        raise UserError(f"{knob.name} is {knob.value}: it must lie in {bound.interval}")


def _demands(config: RunConfig) -> list[tuple[bool, str]]:
    """Return conditions that a bound on one field cannot express, each with the complaint when it fails."""
    barrier = config.heal.barrier
    ranges = {"dose.range": config.dose.range, "eval.plain_range": config.eval.plain_range}
    ranges = {name: value for name, value in ranges.items() if value != "auto"}
    return [
        *_of_vectors(config.steer),
        (
            config.dose.range != "auto" or config.dose.kl_target == "none",
            "dose.kl_target needs two numbers in dose.range: a search by survival would not find its dose",
        ),
        (
            config.model.date == "auto" or _is_day(config.model.date),
            f"model.date {config.model.date!r} is no day: write YYYY-MM-DD, or auto",
        ),
        *(
            (low < high, f"{name} is {low} {high}: the first number must be below the second")
            for name, (low, high) in ranges.items()
        ),
        (
            barrier.kind == "fixed" or (barrier.tau != 0 and barrier.reg != "nll"),
            "heal.barrier.kind dual needs a divergence to hold at tau: choose heal.barrier.reg kl_rev or kl_fwd and "
            "heal.barrier.tau above 0",
        ),
        (
            barrier.reg != "nll" or config.heal.anchor.prompts == 0,
            "heal.barrier.reg nll has no divergence for heal.anchor to hold: choose kl_rev or kl_fwd, or "
            "heal.anchor.prompts 0",
        ),
        (
            bool(config.resume) or not (config.recompute or config.allow_change),
            "--recompute and --allow-change need a run to resume: give its folder with --resume",
        ),
    ]


def _of_vectors(steer: SteerConfig) -> list[tuple[bool, str]]:
    """The conditions on how the vector is made."""
    method = steer.method
    return [
        (
            method in STEER_METHODS or method.startswith(("lite:", FILE)),
            f"steer.method {method!r} is not known{nearest(method, STEER_METHODS)}: "
            f"choose {', '.join(STEER_METHODS)}, lite:NAME or file:PATH",
        ),
        (
            steer.band != "auto" or method in ("mean_diff", "pca", "random") or method.startswith(FILE),
            "steer.band auto needs a vector that is added: choose steer.method mean_diff or pca instead of "
            f"{method}, or give two shares of depth",
        ),
        (
            not steer.without or method in ("mean_diff", "pca"),
            f"steer.without has no meaning with steer.method {method}: choose mean_diff or pca, or leave it out",
        ),
        (
            steer.read == "assistant_tag" or method in STEER_METHODS,
            f"steer.read answer has no meaning with steer.method {method}: choose {', '.join(STEER_METHODS)}",
        ),
    ]


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
