"""Atomic writes: a file exists whole or not at all, even when the process that writes it is killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from steer_heal.config import UserError

SMALL = 1 << 18  # bytes; `file_digest` allocates and clears a buffer of this size for every file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing `path` inside the block into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = re.sub(r".*I/O error: | \(os error \d+\)", "", str(error))
        raise UserError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str, before_rename: Callable[[Path], None] = lambda scratch: None) -> None:
    """Write a file whole or not at all. Raises UserError when it cannot be written."""
    with writing(path):
        scratch = scratch_of(path)
        try:
            scratch.write_text(text, "utf-8")
            sync(scratch)
            before_rename(scratch)
            os.rename(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        sync(path.parent)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def append_row(path: Path, row: Any) -> None:
    """Add a line to a JSON lines file. Raises UserError when it cannot be written."""
    with writing(path), path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if end and file.read(1) != b"\n":  # a process was killed while it wrote a line
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


def appended_rows(path: Path) -> list[Any]:
    """The lines of a file that `append_row` wrote; none without a file. A torn line at the end is left out.

    Raises UserError for any other line that is damaged.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {number}: delete that line") from error
    return found


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def scratch_of(target: Path) -> Path:
    scratch = target.with_name(f".{target.name}.part")
    remove(scratch)  # left by a process that was killed
    return scratch


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1)


def jsonl_text(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        start = stream.read(SMALL)
        if len(start) < SMALL:
            return hashlib.sha256(start).hexdigest()
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder and its contents, to the disk."""
    for part in [*path.rglob("*"), path] if path.is_dir() else [path]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
