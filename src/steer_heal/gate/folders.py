"""Run folders for the checks: written by hand and sealed with checksums, or cut back as by a kill."""

import hashlib
import json
from pathlib import Path

from steer_heal.files import remove
from steer_heal.runs.folder import EVENTS, GIVEN, RunDir


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_events(folder: Path, events: list[dict]) -> None:
    (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")


def seal(folder: Path) -> Path:
    """Note the current files of the folder in events.jsonl, as if the run had written them."""
    log = folder / EVENTS
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    first = events[0] if events else {"event": "start", "argv": ["run", "tiny-random"]}
    stages = [e for e in events if e["event"] == "stage" and (folder / e["artefact"]).exists()]
    parts = [path for path in folder.rglob("*") if path.is_file() and path != log and path.name[0] != "."]
    sums = {str(path.relative_to(folder)): sha256(path) for path in parts}
    first["sha256"] = {name: sums[name] for name in GIVEN if name in sums}
    for event in stages:
        name = event["artefact"]
        event["sha256"] = {file: sha for file, sha in sums.items() if file == name or file.startswith(f"{name}/")}
    known = {*first["sha256"], *(file for event in stages for file in event["sha256"])}
    others = [{"event": "file", "artefact": n, "sha256": {n: sha}} for n, sha in sums.items() if n not in known]
    write_events(folder, [first, *others, *stages])
    return folder


def cut(folder: Path, artefact: str) -> None:
    """Leave the folder as after a kill before `artefact` was made: remove it and all later artefacts."""
    events = RunDir(folder).events()
    before = next(i for i, event in enumerate(events) if event.get("artefact") == artefact)
    made = {file for event in events[:before] for file in event.get("sha256", {})}
    added_to = [e for e in events[before:] if e["event"] == "file" and e["sha256"].keys() <= made]  # as it lies there
    write_events(folder, [*events[:before], *added_to])
    kept = RunDir(folder).record.sums
    for event in events[before:]:
        for file in event.get("sha256", {}):
            if file not in kept:
                remove(folder / file)
        if "artefact" in event and (folder / event["artefact"]).is_dir():
            remove(folder / event["artefact"])
