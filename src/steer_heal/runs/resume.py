"""Create or resume a run folder; refuse changes that --allow-change does not name."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from steer_heal import VERSION
from steer_heal.config import PLACE_FIELDS, ModelConfig, RunConfig, UserError, nearest, of_record, of_today
from steer_heal.data import Contrast, Trait, restored
from steer_heal.files import remove, writing
from steer_heal.records import unstructured
from steer_heal.runs.folder import EVENTS, GIVEN, PROBES, RunDir

LONGEST_NAME = 40  # characters of a model's or a trait's name in a folder's name
# A change of these changes a round's result by rounding at most.
MAY_CHANGE = (
    "model.decode_rows",
    "model.read_rows",
    "heal.training.pass_rows",
    "heal.training.checkpointing",
    "eval.harness",
)
# Of env.json. A resumed run takes the threads, the type of the weights and the date of prompts from there; what is not
# compared changes no result.
NOT_COMPARED = ("cpus", "threads", "processor", "mkl_cbwr", "dtype.why", "model.name")
SURROUNDINGS = ("python", "platform", "gpu", "git", "packages.")


class Difference(NamedTuple):
    """A value that has changed since the run was started."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.then!r} then, {self.now!r} now"


def check_place(out: Path) -> None:
    """Raise UserError, before any work, if no run folder can be made under `out`."""
    if is_run(out):
        raise UserError(
            f"--out {str(out)!r} is a run itself, not a folder of runs: --resume goes on with it, leave --out out"
        )
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        wrong = "may not be written" if there.is_dir() else "is no folder"
        raise UserError(f"--out {str(out)!r}: {str(there)!r} {wrong}: give another")


def is_run(folder: Path) -> bool:
    """Whether this is a run folder."""
    return any((folder / name).is_file() for name in ("config.json", EVENTS))


def create(config: RunConfig, preset: str, trait: Trait, env: dict, argv: list[str]) -> RunDir:
    """A new run folder, outputs/<time>_<model>_<trait>_s<seed>, with config.json, trait.json and env.json.

    It appears whole or not at all. `argv` has the arguments of the command. Raises UserError when it cannot be made.
    """
    model = _word(config.model.path.split("/")[-1]) or "model"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{model}_{_word(trait.name)}_s{config.seed}"
    out = Path(config.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out, prefix=".", suffix=".part"))
        try:
            given = dict(zip(GIVEN, (record_of(config, preset), unstructured(trait), env), strict=True))
            RunDir.begin(scratch, given, argv)
            scratch.chmod(0o777 & ~_umask())  # mkdtemp gives access to the owner only
            return RunDir(_renamed(scratch, out / name))
        finally:
            remove(scratch)


def _word(text: str) -> str:
    """The text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:LONGEST_NAME].strip("-.")


def _renamed(scratch: Path, target: Path) -> Path:
    """Rename `scratch` to `target`, with a number appended if another run took that name in the same second."""
    for number in range(1, 100):
        path = target if number == 1 else target.with_name(f"{target.name}_{number}")
        try:
            os.rename(scratch, path)
            return path
        except OSError:
            if not path.exists():
                raise
    raise UserError(f"{target} and its names with the numbers 2 to 99 are taken: give another --out")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class OtherVersion(UserError):
    """A run folder that this version cannot read."""


def opened(folder: Path) -> RunDir:
    """Open a run folder for reading.

    Raises UserError when it is none, OtherVersion when another version made it.
    """
    if not is_run(folder):
        raise UserError(f"{str(folder)!r} is no run folder: it has no config.json")
    run = RunDir(folder)
    require_version(run)
    settings(run)
    return run


def require_version(run: RunDir) -> None:
    """Raise OtherVersion, which names the version, when a version with another artefact format made the folder."""
    try:
        env = json.loads((run.path / "env.json").read_text("utf-8"))
    except (OSError, ValueError):  # missing or damaged: reading it later raises the error
        return
    made = env.get("packages", {}).get("steer_heal", "0.0")
    if made.split(".")[:2] != VERSION.split(".")[:2]:
        raise OtherVersion(
            f"{str(run.path)!r} was made by steer-heal {made}, this is {VERSION}: read it with steer-heal {made}, "
            "or start a new run"
        )


def started(folder: Path, named: str | None = None) -> tuple[str, RunConfig]:
    """Preset and config that a run was started with.

    Raises UserError when `folder` is no run folder, of another version, or of another preset than `named`.
    """
    preset, config = settings(opened(folder))
    if named not in (None, preset):
        raise UserError(f"--resume {folder}: its preset is {preset}, not {named}: leave the preset out")
    return preset, config


def settings(run: RunDir) -> tuple[str, RunConfig]:
    """Preset and config of an opened run. Raises OtherVersion when the config has other fields than this version's."""
    try:
        return preset_and_config(run.read("config.json"))
    except KeyError as error:
        raise OtherVersion(
            f"{str(run.path)!r} was made by another version of steer-heal (its config differs in {error.args[0]}): "
            "start a new run, or use the version in its env.json"
        ) from error


def preset_and_config(table: dict) -> tuple[str, RunConfig]:
    """Preset and config of the contents of config.json. Raises KeyError where their fields are not this version's."""
    return table["preset"], of_record({key: value for key, value in of_today(table).items() if key != "preset"})


def as_recorded(config: ModelConfig, env: dict) -> ModelConfig:
    """The model of a run with what "auto" was when it began: the type of the weights, the day that prompts show."""
    chosen = {"dtype": env["dtype"]["weights"], "date": env.get("template", {}).get("date")}
    return replace(config, **{key: then for key, then in chosen.items() if then and getattr(config, key) == "auto"})


def record_of(config: RunConfig, preset: str) -> dict:
    """The contents of config.json."""
    return {"preset": preset, **described(config)}


def described(config: RunConfig) -> dict:
    """The config without the fields of PLACE_FIELDS, which do not change results."""
    return {key: value for key, value in asdict(config).items() if key not in PLACE_FIELDS}


def recorded(folder: Path) -> dict:
    """The config in a run folder, with the keys of `described`."""
    return {key: value for key, value in of_today(RunDir(folder).read("config.json")).items() if key != "preset"}


@contextmanager
def reopened(config: RunConfig, preset: str) -> Iterator[RunDir]:
    """The folder given by --resume, locked until the `with` block ends.

    Raises UserError when it is no run folder, has another config, is in use, or has no artefact named by --recompute.
    """
    path = Path(config.resume)
    if not (path / EVENTS).is_file():
        raise UserError(f"--resume {config.resume}: no run folder there (it has no {EVENTS})")
    run = RunDir(path)
    require_version(run)
    with run.held():
        _again(run, config, preset)
        then, now = of_today(run.read("config.json")), json.loads(json.dumps(record_of(config, preset)))
        changes = _differences(then, now)
        _require(run, changes, config)
        if changes:
            run.replace_json("config.json", record_of(config, preset))
        yield run


def _again(run: RunDir, config: RunConfig, preset: str) -> None:
    """Mark the artefacts named by --recompute to be made again; write config.json again now."""
    made = run.record.files.keys() - {*GIVEN}
    for name in config.recompute:
        foreign = ".." not in Path(name).parts and not Path(name).is_absolute() and (run.path / name).exists()
        if name in made or (foreign and name not in GIVEN):
            run.again.add(name)
        elif name == "config.json":
            run.put_back(name, record_of(config, preset), "these are not the flags that the run was started with")
        elif name not in GIVEN:  # see `trait_of` for trait.json, `require_surroundings` for env.json
            hint = nearest(name, made)
            raise UserError(f"--recompute {name!r}: the run has made no such artefact{hint}; see {run.path / EVENTS}")


def trait_of(run: RunDir, config: RunConfig, given: Trait | None) -> Trait:
    """The run's own trait. `given` is the current content of the trait file, None if the file is gone.

    Raises UserError when the file was changed since the run was started.
    """
    if "trait.json" in config.recompute and given is not None:
        run.put_back("trait.json", unstructured(given), "the trait file is not the one that the run was started with")
    stored = run.read("trait.json")
    if given is not None and stored != json.loads(json.dumps(unstructured(given))):
        raise UserError(
            f"--resume {config.resume}: the trait file has changed since the run was started; see trait.json there. "
            "Restore the old file, or start a new run"
        )
    return restored(stored)


def measured_trait(run: RunDir) -> Trait:
    """A run's trait, with the probes that the base wrote for it, if it did."""
    trait = restored(run.read("trait.json"))
    return trait if trait.contrast else replace(trait, contrast=tuple(run.load(list[Contrast], PROBES) or ()))


def require_surroundings(run: RunDir, config: RunConfig, env: dict) -> None:
    """Raise UserError when model or software differ from those at the start of the run; record allowed changes."""
    if "env.json" in config.recompute:
        run.put_back("env.json", env, "this is not the machine, or not the software, that the run was started with")
    then = run.read("env.json")
    changes = [d for d in _differences(then, env) if d.key not in NOT_COMPARED]
    _require(run, changes, config)
    if changes:
        run.replace_json("env.json", env)


def _require(run: RunDir, changes: list[Difference], config: RunConfig) -> None:
    for key in config.allow_change:
        if not _may_differ(key):
            raise UserError(
                f"--allow-change {key!r}: a run with that changed is a different run. These may be allowed: "
                f"{', '.join(MAY_CHANGE)}, {', '.join(SURROUNDINGS)}NAME"
            )
    refused = [change for change in changes if change.key not in config.allow_change]
    if refused:
        keys = [change.key for change in refused]
        mend = (
            f"Allow it with --allow-change {' '.join(keys)}"
            if all(map(_may_differ, keys))
            else "Restore the old values, or start a new run"
        )
        raise UserError(f"--resume {config.resume}: changed since the start ({'; '.join(map(str, refused))}). {mend}")
    for change in changes:
        run.event("change", **change._asdict())


def _may_differ(key: str) -> bool:
    return key in MAY_CHANGE or key in SURROUNDINGS or key.startswith("packages.")


def _differences(old: dict, new: dict, prefix: str = "") -> list[Difference]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(Difference(f"{prefix}{key}", a, b))
    return found
