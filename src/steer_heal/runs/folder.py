"""A run's folder: atomic artefacts, their checksums, the lock, the event log.

A stage is done if and only if its artefact exists. An artefact is written under a temporary name, fsynced, noted in
events.jsonl with the checksums of its files, and renamed. So a killed run never leaves half an artefact, and reading
one raises an error if anything but the run changed it. Resuming loads the artefacts that exist and computes the rest.
No torch here: a report needs only the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from loguru import logger

from steer_heal.config import UserError
from steer_heal.files import (
    json_text,
    jsonl_text,
    read_json,
    read_jsonl,
    remove,
    scratch_of,
    sha256,
    sync,
    write_text,
    writing,
)
from steer_heal.records import structured, unstructured
from steer_heal.terminal import program

T = TypeVar("T")
EVENTS, LOCK, PROBES = "events.jsonl", ".lock", "probes.jsonl"
WITHOUT = "without.json"  # traits that are projected out of the vector
HARNESS, ROBUSTNESS = "harness.json", "robustness.json"  # which `eval` adds to a finished run
ADDED = {HARNESS: "--harness TASKS", ROBUSTNESS: "--robustness"}  # by the flag that makes them again
GIVEN = ("config.json", "trait.json", "env.json")  # written at the start, before any stage


class Damaged(UserError):
    """An artefact differs from what the run wrote. The message says how to make it again."""


@dataclass
class Record:
    """The artefacts that events.jsonl lists as written."""

    files: dict[str, list[str]] = field(default_factory=dict)
    """the files of every artefact"""
    sums: dict[str, set[str]] = field(default_factory=dict)
    """every SHA-256 that a file was ever written with"""
    part_of: dict[str, str] = field(default_factory=dict)
    """the artefact that last wrote a file"""
    last: str = ""
    """the artefact noted last; it may be missing, if the run was killed before the rename"""

    def add(self, event: dict) -> None:
        made = {event["artefact"]: event["sha256"]} if "artefact" in event else {}
        self.last = event.get("artefact", self.last)
        if event["event"] == "start":
            made = {name: {name: sha} for name, sha in event["sha256"].items()}
        for artefact, sums in made.items():
            self.files[artefact] = list(sums)
            for file, sha in sums.items():
                self.sums.setdefault(file, set()).add(sha)
                self.part_of[file] = artefact


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.follow: Callable[[dict], None] = lambda event: None  # also receives every event, see `tracking`
        self._sound: dict[str, tuple[int, int]] = {}  # mtime and size of files whose checksum was right
        self.again: set[str] = set()  # artefacts to make again although they exist, see `--recompute`
        self.doing = "loading"  # the artefact being made, for error messages

    @classmethod
    def begin(cls, path: Path, given: dict[str, Any], argv: list[str]) -> None:
        """Turn an empty folder into a run folder: write the given files, and the first event with their checksums."""
        run = cls(path)
        (path / EVENTS).touch()
        for name, value in given.items():
            write_text(path / name, json_text(value))
        run.event("start", argv=argv, sha256={name: sha256(path / name) for name in given})

    @cached_property
    def record(self) -> Record:
        record, events = Record(), self.events()
        if "sha256" not in events[0]:
            raise Damaged(f"{self.path} is of an older version of steer-heal that kept no checksums: start a new run")
        for event in events:
            record.add(event)
        return record

    # ---- artefacts

    def stage(
        self,
        name: str,
        compute: Callable[[], T],
        write: Callable[[Path, T], None],
        read: Callable[[Path], T],
        also: tuple[str, ...] = (),
    ) -> T:
        """The artefact `name`, a file or a folder: read if it exists, else computed and written.

        `also` names further files that `write` puts into the run folder and that belong to the artefact.

        Raises UserError when an existing artefact differs from what the run wrote, and when it cannot be written.
        """
        target = self.path / name
        if name not in self.again and (there := self.find(name)) is not None:
            return read(there)
        self.again.discard(name)
        self.doing = name
        began = time.perf_counter()
        value = compute()
        seconds = time.perf_counter() - began
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = scratch_of(target)
            try:
                write(scratch, value)
                sync(scratch)
                sums = self._sums(scratch, target) | {file: sha256(self.path / file) for file in also}
                self._compare(name, {file: sha for file, sha in sums.items() if file not in also})
                self.event("stage", artefact=name, seconds=seconds, sha256=sums)  # before it exists
                remove(target)
                os.rename(scratch, target)
            finally:
                remove(scratch)
            sync(target.parent)
        return value

    def artefact(self, kind: Any, name: str, compute: Callable[[], T]) -> T:
        """An artefact of this kind, stored as a JSON file."""

        def write(path: Path, value: T) -> None:
            path.write_text(json_text(unstructured(value)), "utf-8")

        return self.stage(name, compute, write, lambda path: structured(kind, read_json(path)))

    def artefacts(self, kind: type[T], name: str, compute: Callable[[], list[T]]) -> list[T]:
        """Artefacts of this kind, stored as a JSON lines file."""

        def write(path: Path, rows: list[T]) -> None:
            path.write_text(jsonl_text(unstructured(rows)), "utf-8")

        return self.stage(name, compute, write, lambda path: structured(list[kind], read_jsonl(path)))

    def load(self, kind: Any, name: str) -> Any:
        """The artefact `name`, of this kind; None when it is not made yet."""
        there = self.read(name)
        return None if there is None else structured(kind, there)

    def find(self, name: str) -> Path | None:
        """The path of an artefact, or of one of its files; None when it is not made yet.

        Raises UserError when it differs in any bit from what the run wrote.
        """
        target, record = self.path / name, self.record
        artefact = name if name in record.files else record.part_of.get(name, name)
        if not target.exists():
            if artefact in record.files and artefact != record.last:
                raise self._damaged(artefact, target, f"is missing, though {EVENTS} says that it was made")
            return None
        if artefact not in record.files:
            raise self._damaged(name, target, f"was not made by this run: {EVENTS} has no checksum of it")
        for file in record.files.get(name, [name]):
            self._require_sound(artefact, file)
        if target.is_dir():
            for path in sorted(target.rglob("*")):
                strange = path.is_file() and str(path.relative_to(self.path)) not in record.sums
                if strange and not path.name.startswith("."):  # hidden files are left by killed processes
                    raise self._damaged(artefact, path, "was not made by this run")
        return target

    def _require_sound(self, artefact: str, file: str) -> None:
        """Raise UserError for a file that differs from what the run wrote. A file whose mtime and size are unchanged
        since the last check is not read again."""
        path = self.path / file
        if not path.is_file():
            raise self._damaged(artefact, path, "is missing")
        stat = path.stat()
        if self._sound.get(file) == (stat.st_mtime_ns, stat.st_size):
            return
        if sha256(path) not in self.record.sums[file]:
            why = f"does not have the checksum that {EVENTS} has of it" if stat.st_size else "is empty"
            raise self._damaged(artefact, path, why)
        self._sound[file] = (stat.st_mtime_ns, stat.st_size)

    def read(self, name: str, missing: Any = None) -> Any:
        """Contents of a JSON or JSON lines file; `missing` if it is not made yet. Raises UserError as `find` does."""
        path = self.find(name)
        if path is None:
            return missing
        return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)

    def write_jsonl(self, name: str, rows: list) -> None:
        self.replace_text(name, jsonl_text(unstructured(rows)))

    def replace_json(self, name: str, value: Any, **noted: Any) -> None:
        self.replace_text(name, json_text(unstructured(value)), **noted)

    def replace_text(self, name: str, text: str, **noted: Any) -> None:
        """Write a file, or overwrite it, and note its checksum, and what else is given, in events.jsonl."""

        def note(scratch: Path) -> None:
            sha = sha256(scratch)
            if sha not in self.record.sums.get(name, ()):
                self.event("file", artefact=name, sha256={name: sha}, **noted)

        write_text(self.path / name, text, note)

    def _sums(self, scratch: Path, target: Path) -> dict[str, str]:
        """Checksums of the files under `scratch`, keyed by their final names in the run folder."""
        if scratch.is_file():
            return {str(target.relative_to(self.path)): sha256(scratch)}
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        return {str((target / f.relative_to(scratch)).relative_to(self.path)): sha256(f) for f in files}

    def _compare(self, name: str, sums: dict[str, str]) -> None:
        """Warn when a recomputed artefact differs from the old one: later artefacts still use the old one."""
        if any(sha not in self.record.sums.get(file, {sha}) for file, sha in sums.items()):
            logger.warning(f"{name} was recomputed with another result; later artefacts still use the old one")

    def put_back(self, name: str, value: Any, otherwise: str) -> None:
        """Write a file of GIVEN again. Raises UserError, with `otherwise`, when it would differ from the old one."""
        text = json_text(value)
        if hashlib.sha256(text.encode()).hexdigest() not in self.record.sums[name]:
            raise UserError(f"--recompute {name}: {otherwise}")
        write_text(self.path / name, text)

    def _damaged(self, artefact: str, path: Path, why: str) -> Damaged:
        again = self.resuming
        if artefact in GIVEN:  # these are made from the flags
            again = f"{program()} {shlex.join([*self.first_argv, '--resume', str(self.path)])}"
        elif artefact in ADDED:
            return Damaged(
                f"{path} {why}. Make it again: {program()} eval {shlex.quote(str(self.path))} {ADDED[artefact]}"
            )
        return Damaged(f"{path} {why}. Make it again: {again} --recompute {shlex.quote(artefact)}")

    # ---- events

    def event(self, kind: str, **fields: Any) -> None:
        event = {"time": time.time(), "event": kind, **fields}
        log = self.path / EVENTS
        with writing(log), log.open("ab", buffering=0) as file:
            before = file.tell()
            line = (json.dumps(event) + "\n").encode()
            try:
                while line:  # a disk that is nearly full may take only a part at first
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        self.record.add(event)
        self.follow(event)

    def events(self) -> list[dict]:
        """All complete lines of events.jsonl. A killed or still writing process may leave half a line at its end."""
        log = self.path / EVENTS
        if not log.is_file():
            raise UserError(f"{log} is missing: without it nothing in this folder can be trusted, start a new run")
        lines = log.read_bytes().split(b"\n")[:-1]
        try:
            return json.loads(b"[" + b",".join(lines) + b"]")  # takes a third of the time of parsing line by line
        except ValueError:
            pass
        events = []
        for number, line in enumerate(lines, 1):
            try:
                events.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{log} is damaged in line {number}: delete that line and resume; the run then names the artefact "
                    "of that line and the command that makes it again"
                ) from error
        return events

    def stage_seconds(self) -> dict[str, float]:
        """Seconds that computing each artefact took, and adding to it, also before the run was resumed."""
        seconds: dict[str, float] = {}
        for event in self.events():
            if event["event"] == "stage":
                seconds[event["artefact"]] = event["seconds"]
            elif event["event"] == "file" and "seconds" in event:
                seconds[event["artefact"]] += event["seconds"]
        return seconds

    @property
    def first_argv(self) -> list[str]:
        """The arguments that the run was started with."""
        return self.events()[0]["argv"]

    @property
    def resuming(self) -> str:
        """The command that resumes this run."""
        return f"{program()} run --resume {shlex.quote(str(self.path))}"

    # ---- lock

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder until the `with` block ends. The system frees the lock of a process that dies.

        Raises UserError, with the holder, when another process has the lock.
        """
        where, lock = self.path / LOCK, FileLock(self.path / LOCK, blocking=False)
        with writing(where):
            try:
                lock.acquire()
            except Timeout:
                raise UserError(
                    f"{self.path} is in use by {where.read_text('utf-8')}: wait for it or stop it, or start a new run"
                ) from None
            if dead := where.read_text("utf-8"):
                logger.info(f"taken over from {dead}, which did not end as it should")
            where.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", "utf-8"
            )
        try:
            _drop_torn_line(self.path / EVENTS)
            yield
        finally:
            where.write_text("", "utf-8")
            lock.release()


def _drop_torn_line(log: Path) -> None:
    """Remove the half line of a process killed while writing an event. Its stage has no artefact and is redone."""
    whole, newline, torn = log.read_bytes().rpartition(b"\n")
    if torn:
        with log.open("r+b") as file:
            file.truncate(len(whole + newline))
