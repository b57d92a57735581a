"""The word after `run`: a preset, or a model that is run with the settings of one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from steer_heal.config import PLACE_FIELDS, Knob, UserError, knobs, nearest
from steer_heal.data import Trait, restored
from steer_heal.files import read_json
from steer_heal.flags import words_of
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


def with_config(argv: list[str]) -> tuple[list[str], Trait | None]:
    """`run --config FILE ...` as `run PRESET` with the flags that the file stands for, and the file's trait.

    The file is a config.json of a run or a reproduce.json. Flags that are given beside it go before its own, and its
    trait is None where one of them is --trait. Raises UserError for a file that does not give a config.
    """
    if argv[:1] != ["run"] or (file := flag_value("--config", argv)) is None:
        return argv, None
    if (resumed := flag_value("--resume", argv)) is not None:
        raise UserError(f"--config and --resume {resumed!r}: a run that is resumed has its own config, leave one out")
    cut = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--config")
    rest = argv[1:cut] + argv[cut + (1 if "=" in argv[cut] else 2) :]
    if rest and not rest[0].startswith("-"):
        raise UserError(f"--config {file!r} names its preset: leave {rest[0]!r} out (a model is --model.path)")
    with giving_config(file):
        table, trait = read_config(Path(file).expanduser())
        preset, flagged = config_words(table)
        trait = None if trait is None else restored(trait)
    given = {_knob_of(word) for word in rest if word.startswith("--")}
    kept = [word for name, words in flagged.items() if name not in given for word in words]
    return ["run", preset, *kept, *rest], None if "trait" in given else trait


@contextmanager
def giving_config(file: str) -> Iterator[None]:
    """Turn what is wrong with a config from `file` into a UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(file)!r} gives no config of this version of steer-heal ({said}): give the config.json of a run, or "
            "the reproduce.json of an export"
        ) from error


def read_config(file: Path) -> tuple[dict, dict | None]:
    """The contents of a config.json, or the config of a reproduce.json, and the contents of its trait.json."""
    table, beside = read_json(file), file.with_name("trait.json")
    if "config" in table:
        return table["config"], table["trait"]
    return table, read_json(beside) if beside.is_file() else None


def config_words(table: dict) -> tuple[str, dict[str, list[str]]]:
    """The preset of the contents of a config.json, and by knob the flags in which the config differs from it.

    The type of a value is checked when the flags are read. Raises KeyError and ValueError for other fields, and for a
    value that would be read as a flag.
    """
    from steer_heal.runs.resume import preset_and_config

    preset, config = preset_and_config({key: value for key, value in table.items() if key not in PLACE_FIELDS})
    usual = {knob.name: knob.value for knob in knobs(PRESETS[preset])}
    return preset, {knob.name: _words(knob) for knob in knobs(config) if knob.value != usual[knob.name]}


def _words(knob: Knob) -> list[str]:
    values = [str(value) for value in (knob.value if isinstance(knob.value, tuple) else (knob.value,))]
    if any(value.startswith("--") for value in values):
        raise ValueError(f"{knob.name} is {' '.join(values)}")
    return words_of(knob.name.replace("_", "-"), *values)


def _knob_of(word: str) -> str:
    """The knob that a flag sets; a switch has two, --a.b and --a.no-b."""
    section, dot, name = word.partition("=")[0].removeprefix("--").replace("-", "_").rpartition(".")
    return f"{section}{dot}{name.removeprefix('no_')}"


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
