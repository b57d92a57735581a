"""The verb `export`: write a result into a folder or a file, and with --push put it at the hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steer_heal.commands import hub
from steer_heal.commands.export import export
from steer_heal.commands.export_gguf import export_gguf
from steer_heal.config import FILE, UserError
from steer_heal.runs.reproduction import REPRODUCE
from steer_heal.runs.resume import opened

NOT_TOLD = ("tokenizer.json", "vocab.json", "merges.txt")  # tokens may look like paths
TEXT = (".md", ".json", ".Modelfile", ".jinja")


@dataclass(frozen=True)
class Wanted:
    """What is exported, see `verbs.Export`."""

    run: Path
    round: int | None = None
    merge: bool = False
    vector: bool = False
    type: Literal["f16", "q8_0"] = "f16"
    rank: int | None = None


@dataclass(frozen=True)
class Push:
    """Where to at the hub."""

    repo: str
    public: bool = False
    dry_run: bool = False


def share(wanted: Wanted, to: Path | None, push: Push | None) -> str:
    """Export to `to`, and push it; without `to` it is only pushed. Returns what was done, in words.

    A dry run pushes nothing, writes nothing to `to` and lists the files.

    Raises UserError as `export` and `export_gguf` do, for what the hub refuses, and for a path of this machine in what
    would be pushed. What is at the hub is whole or not there.
    """
    if push is None:
        write(wanted, to)
        return f"written: {to}"
    opened(wanted.run)
    if not push.dry_run:
        hub.require_free(push.repo, push.public)
    with place(None if push.dry_run else to, to.name if to else "") as where:
        write(wanted, where)
        files = published(where)
        require_no_paths(files, known_paths(wanted.run, where))
        who = "public" if push.public else "private"
        listed = "\n".join(f"  {file.stat().st_size:>12,} bytes  {name}" for name, file in files.items())
        if push.dry_run:
            return f"{push.repo}, {who}, would hold:\n{listed}"
        try:
            address = hub.push(push.repo, files, push.public)
        except UserError as error:
            kept = f". The export is whole in {str(to)!r}" if to else ""
            raise UserError(f"{error}{kept}") from error
    return f"pushed, {who}: {address}\n{listed}"


@contextmanager
def place(to: Path | None, name: str) -> Iterator[Path]:
    """The place to write to, or one that is gone after the block."""
    if to is not None:
        yield to
        return
    with tempfile.TemporaryDirectory(prefix="steer-heal-") as scratch:
        yield Path(scratch) / (name or "export")


def write(wanted: Wanted, to: Path) -> None:
    if to.suffix.lower() == ".gguf":
        kind = "model" if wanted.merge else "vector" if wanted.vector else "adapter"
        export_gguf(wanted.run, to, wanted.round, kind, wanted.type, wanted.rank)
    else:
        export(wanted.run, to, wanted.round, wanted.merge, wanted.rank)


def published(to: Path) -> dict[str, Path]:
    """The files of an export, by their names at the hub."""
    if to.is_dir():
        return {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()}
    card, again = to.with_suffix(".md"), to.with_suffix(f".{REPRODUCE}")
    modelfile = to.with_suffix(".Modelfile")
    return {"README.md": card, REPRODUCE: again, to.name: to, modelfile.name: modelfile}


def known_paths(run: Path, to: Path) -> set[str]:
    """Paths of this machine that an export could tell: of the run, its model and its flags, of the user."""
    folder = opened(run)
    config, words = folder.read("config.json"), folder.first_argv
    said = [config["model"]["path"], config["steer"]["method"], *(word.rpartition("=")[2] for word in words)]
    said = [Path(word.removeprefix(FILE)) for word in said]
    places = [run, to.parent, Path.cwd(), Path.home(), *(path for path in said if path.is_absolute())]
    return {str(path.absolute()) for path in places} - {"/"}


def require_no_paths(files: dict[str, Path], known: set[str]) -> None:
    """Raise UserError for a text that has one of these paths."""
    longest_first = sorted(known, key=len, reverse=True)
    seen = re.compile(rf"(?<![\w/])(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
    for name, file in files.items():
        if file.suffix in TEXT and file.name not in NOT_TOLD and (found := seen.search(file.read_text("utf-8"))):
            raise UserError(
                f"--push: {name} would tell the path {found[0]!r} of this machine: take it out of the trait, or run "
                "with other names"
            )
