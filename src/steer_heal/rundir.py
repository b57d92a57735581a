"""A run's folder: atomic artefacts, resume, the record of what happened.

A stage is done if and only if its artefact exists. An artefact is written under a temporary name, fsynced and renamed,
so a killed run never leaves half of one; resuming loads what exists and computes the rest. Only this module and the
report touch the disk.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from steer_heal.config import PLACE_FIELDS, RunConfig, UserError
from steer_heal.data import Trait

T = TypeVar("T")
PACKAGES = ("steer_heal", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.follow: Callable[[dict], None] = lambda event: None  # who else hears of events, see `tracking`

    def stage(
        self, name: str, compute: Callable[[], T], write: Callable[[Path, T], None], read: Callable[[Path], T]
    ) -> T:
        """The artefact `name`: read when it is there, computed and written when it is not."""
        target = self.path / name
        if target.exists():
            return read(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - began
        scratch = target.with_name(f".{target.name}.part")
        _remove(scratch)
        write(scratch, value)
        _sync(scratch)
        self.event("stage", artefact=name, seconds=seconds)  # first: an artefact that exists has its seconds on record
        os.rename(scratch, target)
        _sync(target.parent)
        return value

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        return self.stage(name, compute, _write_json, lambda path: json.loads(path.read_text("utf-8")))

    def jsonl(self, name: str, compute: Callable[[], list[dict]]) -> list[dict]:
        return self.stage(name, compute, lambda path, rows: path.write_text(_lines(rows), "utf-8"), read_jsonl)

    def write_jsonl(self, name: str, rows: list[dict]) -> None:
        self.replace_text(name, _lines(rows))

    def read_jsonl(self, name: str) -> list[dict]:
        return read_jsonl(self.path / name)

    def replace_json(self, name: str, value: Any) -> None:
        """Write a file anew, whether it is there or not."""
        self.replace_text(name, json.dumps(value, indent=1))

    def replace_text(self, name: str, text: str) -> None:
        target = self.path / name
        scratch = target.with_name(f".{target.name}.part")
        scratch.write_text(text, "utf-8")
        _sync(scratch)
        os.rename(scratch, target)
        _sync(target.parent)

    def event(self, kind: str, **fields: Any) -> None:
        event = {"time": time.time(), "event": kind, **fields}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self.follow(event)

    def first_argv(self) -> list[str]:
        """The arguments that the run was started with."""
        first = json.loads((self.path / "events.jsonl").read_text("utf-8").splitlines()[0])
        return first["argv"]

    def stage_seconds(self) -> dict[str, float]:
        """Seconds each artefact took when it was computed, resumed runs included."""
        events = read_jsonl(self.path / "events.jsonl")
        return {e["artefact"]: e["seconds"] for e in events if e["event"] == "stage"}


def create(config: RunConfig, preset: str, trait: Trait) -> RunDir:
    """A new run folder, outputs/<time>_<model>_<trait>_s<seed>, with config.json, trait.json and env.json."""
    model = re.sub(r"[^A-Za-z0-9.]+", "-", config.model.path.rstrip("/").split("/")[-1]).strip("-.")
    word = re.sub(r"[^A-Za-z0-9]+", "-", trait.name).strip("-")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{model}_{word}_s{config.seed}"
    path = Path(config.out) / name
    for attempt in range(1, 100):
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            path = Path(config.out) / f"{name}_{attempt + 1}"
    run = RunDir(path)
    run.replace_json("trait.json", asdict(trait))
    run.replace_json("env.json", environment())
    run.replace_json("config.json", {"preset": preset, **described(config)})  # last: it makes the folder a run
    run.event("start", argv=sys.argv[1:])
    return run


def reopen(config: RunConfig, trait: Trait) -> RunDir:
    """The folder given by --resume. Raises UserError when it is no run, or a run of another config."""
    path = Path(config.resume)
    if not (path / "config.json").is_file():
        raise UserError(f"--resume {config.resume}: no run folder there (it has no config.json)")
    now = json.loads(json.dumps(described(config)))
    differing = [f"{key}: {old!r} then, {new!r} now" for key, old, new in _differences(recorded(path), now)]
    if differing:
        raise UserError(
            f"--resume {config.resume}: the run was started with another config ({'; '.join(differing)}). "
            "Give the same preset and flags, or start a new run"
        )
    if json.loads((path / "trait.json").read_text("utf-8")) != json.loads(json.dumps(asdict(trait))):
        raise UserError(
            f"--resume {config.resume}: the trait file has changed since the run was started; see trait.json there"
        )
    run = RunDir(path)
    _drop_torn_line(path / "events.jsonl")
    run.event("resume", argv=sys.argv[1:])
    return run


def _drop_torn_line(log: Path) -> None:
    """A process that was killed while it noted an event leaves half a line: its stage has no artefact and is redone."""
    whole, newline, torn = log.read_bytes().rpartition(b"\n")
    if torn:
        with log.open("r+b") as file:
            file.truncate(len(whole + newline))


def recorded(folder: Path) -> dict:
    """The config of a run folder, as `described` has it."""
    found = json.loads((folder / "config.json").read_text("utf-8"))
    return {key: value for key, value in found.items() if key != "preset"}


def described(config: RunConfig) -> dict:
    """The config without what only says where it lies."""
    return {key: value for key, value in asdict(config).items() if key not in PLACE_FIELDS}


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def environment() -> dict:
    """Versions and hardware; no user name, no token, no path."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or a folder and what lies in it, to the disk."""
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
