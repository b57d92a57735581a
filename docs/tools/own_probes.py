"""How well do the probes that a base writes about itself agree with written ones? One table over the arms of some runs.

    .venv/bin/python docs/tools/own_probes.py outputs/RUN [outputs/RUN ...]

Each run's trait must have [[contrast]] pairs. On every arm (base, both personas, plain steering, each round's teacher
and student) both kinds of probe are read: the written ones, and those that the base writes from the personas alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from steer_heal.bake.student import Student
from steer_heal.config import JUDGES
from steer_heal.data import Trait, load_trait, pool
from steer_heal.eval.arms import Arm, plainly, unsteered
from steer_heal.eval.instruments import contrast_scores
from steer_heal.eval.intervals import correlation, interval, reliability
from steer_heal.eval.own_probes import own_probes
from steer_heal.model.decode import rows_that_fit
from steer_heal.runs.resume import opened
from steer_heal.runs.rounds import InRound, rounds_done
from steer_heal.runs.student import base_of, vector_of

PLAIN_DOSES = (0.2, 0.4, 0.8, 1.2)


def main(folders: list[Path]) -> None:
    pooled = []
    for folder in folders:
        written, own, names = read_run(folder)
        agreement(folder.name, moves(written), moves(own))
        show(written, own, names)
        pooled.append((moves(written)[1:], moves(own)[1:]))
    if len(pooled) > 1:
        agreement("all", *(np.concatenate(kind) for kind in zip(*pooled, strict=True)))


def read_run(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The scores [arms, probes] of the written probes and of the base's own, and the arms' names."""
    run = opened(folder)
    config = run.read("config.json")
    lm = base_of(folder)
    trait = load_trait(config["trait"])
    longest = max(len(lm.prompt(text, trait.positive)) for text in pool("probe"))
    student = Student(replace(lm, decode_rows=rows_that_fit(lm, longest, 32)))
    own = own_probes(student, trait, JUDGES["text"], pool("probe"))
    print(f"{folder.name}: {len(trait.contrast)} written probes, {len(own)} of the base's own", flush=True)
    names, written, of_base = [], [], []
    for arm in arms(student, trait, folder, config):
        with student.view(history=arm.history, now=arm.now):
            written.append(trait.direction * contrast_scores(student.lm, arm, trait.contrast))
            of_base.append(trait.direction * contrast_scores(student.lm, arm, tuple(own)))
        names.append(arm.name)
        print(f"  {arm.name:<24} {written[-1].mean():+.3f}  {of_base[-1].mean():+.3f}", flush=True)
    return np.stack(written), np.stack(of_base), names


def arms(student: Student, trait: Trait, folder: Path, config: dict) -> Iterator[Arm]:
    """The arms of a run, base first. A round's student is yielded once its adapter is joined to the history."""
    run = opened(folder)
    yield from unsteered(trait)
    for dose in PLAIN_DOSES:
        yield plainly(f"plain {dose:g}", vector_of(run), dose)
    for number in range(rounds_done(folder, config["rounds"])):
        dose = json.loads(run.find(InRound.DOSE.of(number)).read_text())["dose"]
        yield Arm(f"r{number:02d} teacher", now=0.0, vector=vector_of(run, number), dose=dose)
        student.load_round(run.find(InRound.ADAPTER.of(number)))
        student.fold(config["heal"]["lora"]["fold_rank"])
        yield Arm(f"r{number:02d} student")


def moves(scores: np.ndarray) -> np.ndarray:
    """Each arm's mean over that of base, the first arm."""
    return scores.mean(1) - scores.mean(1)[0]


def agreement(name: str, written: np.ndarray, own: np.ndarray) -> None:
    """How far the arms' moves agree, and how large the own ones are beside the written ones."""
    print(f"{name}: correlation over {len(own)} arms {correlation(own, written):.3f}")
    print(f"  own over written, by least squares: {float(own @ written / (written @ written)):.2f}")


def show(written: np.ndarray, own: np.ndarray, names: list[str]) -> None:
    """The reliability of both kinds, and each arm over base with its intervals."""
    print(f"  reliability: own {reliability(own):.3f}, written {reliability(written):.3f}")
    for arm, a, b in zip(names[1:], own[1:] - own[0], written[1:] - written[0], strict=True):
        (low, high), (least, most) = interval(a), interval(b)
        print(f"  {arm:<24} own {a.mean():+.3f} [{low:+.3f}, {high:+.3f}]  written {b.mean():+.3f}", end="")
        print(f" [{least:+.3f}, {most:+.3f}]")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
