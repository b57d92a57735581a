"""The word after `run`: a preset, or a model that is run with the settings of one."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

from steer_heal.config import UserError, nearest
from steer_heal.presets import DEFAULT_PRESET, MODELS_TOO, PRESETS, RECIPES, is_model
from steer_heal.verbs import Run


def with_preset(argv: list[str]) -> tuple[str, list[str]]:
    """`run MODEL ...` as `run PRESET --model.path MODEL ...`, and a line that says so; other words as they are."""
    if argv[:1] != ["run"] or len(argv) < 2 or argv[1].startswith("-") or not is_model(argv[1]):
        return "", argv
    from steer_heal.runs.folder import EVENTS  # not before a model is named: --help and the presets start faster

    name, rest = argv[1], argv[2:]
    if (other := flag_value("--model.path", rest)) is not None:
        raise UserError(f"run {name!r} names a model, and so does --model.path {other!r}: leave one of them out")
    if (Path(name).expanduser() / EVENTS).is_file():
        raise UserError(f"{name!r} is a run folder: go on with it by --resume {shlex.quote(name)}, or name a preset")
    preset = RECIPES["cuda" if flag_value("--model.device", rest) != "cpu" and _has_gpu() else "cpu"]
    return (
        f"{name!r} is no preset: band, dose, thresholds and steps are measured on the model (settings of {preset})",
        ["run", preset, "--model.path", name, *rest],
    )


def chosen(argv: list[str]) -> Run:
    """Return the preset named after `run` and its config, or, with --resume, those of the run to resume.

    The config's values are the defaults of the flags.
    """
    if argv[:1] != ["run"]:
        return Run()
    named = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else None
    if named is not None and named not in PRESETS:
        raise UserError(f"{unknown_preset(named)}; or give {MODELS_TOO}")
    folder = flag_value("--resume", argv)
    if folder is not None and "config.json" not in argv:  # with --recompute config.json the flags give the config
        from steer_heal.runs.resume import started

        return Run(*started(Path(folder), named))
    return Run(named or DEFAULT_PRESET, PRESETS[named or DEFAULT_PRESET])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def flag_value(flag: str, argv: list[str]) -> str | None:
    """The value of a flag among the words of a command line, "--flag value" or "--flag=value"."""
    for word, following in pairwise([*argv, ""]):
        if word == flag and following:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def unknown_preset(name: str) -> str:
    return f"preset {name!r} is not known{nearest(name, PRESETS)}: choose {', '.join(PRESETS)}"
