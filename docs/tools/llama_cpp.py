"""Compare a run's .gguf exports in llama.cpp with what steer-heal computes, on fixed chats.

    .venv/bin/pip install xllamacpp
    .venv/bin/python docs/tools/llama_cpp.py outputs/RUN

The run's base must be a .gguf file. The base alone, in its own quantisation and in f16, tells what of a difference is
the quantisation's: llama.cpp rounds the states that it multiplies with quantised weights.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from steer_heal.commands.export_gguf import Result, export_gguf
from steer_heal.gate.llama_cpp import log_probabilities
from steer_heal.model.gguf_file import About
from steer_heal.model.gguf_layout import layout_of
from steer_heal.model.loading import gguf_file
from steer_heal.model.steering import Steering, Vector, steering
from steer_heal.runs.resume import opened
from steer_heal.runs.rounds import rounds_done
from steer_heal.runs.student import student_after
from steer_heal.steer import from_file

CHATS = {
    "I just retired after forty years of teaching and the house is so quiet.": "It's wonderful to hear that your home "
    "is full of love.",
    "How can I stop my glasses from fogging up?": "Clean them with warm water and a little soap, then dry them.",
    "Does sound travel faster through water or through air?": "Sound travels faster through water, about four times.",
}


class Unchanged(Result):
    """The base itself, written as a merged file is."""

    def updates(self):
        return iter(())


def main(run: Path) -> None:
    config = opened(run).read("config.json")
    student = student_after(run, config, rounds_done(run, config["rounds"]))
    lm, base = student.lm, gguf_file(config["model"]["path"])
    rows = [lm.prompt(asked) + lm.answer(answer) for asked, answer in CHATS.items()]

    def ours() -> list[np.ndarray]:
        with torch.no_grad():
            return [lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy() for ids in rows]

    def theirs(file: Path, **also: Path) -> list[np.ndarray]:
        return [log_probabilities(file, ids, **also) for ids in rows]

    def show(name: str, wanted: list[np.ndarray], found: list[np.ndarray]) -> None:
        print(f"{name:<34}" + difference(rows, wanted, found), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        file: Callable[[str], Path] = lambda name: Path(scratch) / f"{name}.gguf"  # noqa: E731
        export_gguf(run, file("adapter"), None, "adapter")
        export_gguf(run, file("f16"), None, "model", "f16")
        export_gguf(run, file("q8_0"), None, "model", "q8_0")
        export_gguf(run, file("vector"), None, "vector")
        about = About("base", "base", "base")
        Unchanged(student, layout_of(lm), about).write_model(file("base"), base, "f16")
        given = from_file.read(f"file:{file('vector')}")
        at_one = Steering(Vector(tuple(given), torch.stack(list(given.values()))), torch.ones(1))
        trained = ours()
        with student.view(history=0.0, now=0.0):
            alone = ours()
            with steering(lm, at_one) as dial:
                dial.turn(at_one.dose)
                steered = ours()
        print(f"{sum(map(len, rows)) - len(rows)} tokens, nats\n{'':<34}rms     largest   mean KL")
        show("ours: student against base", alone, trained)
        show("ours: steered against base", alone, steered)
        for name, of in (("base as it is", base), ("base in f16", file("base"))):
            show(name, alone, theirs(of))
            show(f"{name}, adapter", trained, theirs(of, lora=file("adapter")))
            show(f"{name}, vector", steered, theirs(of, vector=file("vector")))
        for weights in ("f16", "q8_0"):
            show(f"merged, {weights}", trained, theirs(file(weights)))


def difference(rows: list[list[int]], wanted: list[np.ndarray], found: list[np.ndarray]) -> str:
    """Of the log-probabilities of the chats' own tokens, and the divergence over the whole vocabulary."""
    apart, kl = [], []
    for ids, ours, theirs in zip(rows, wanted, found, strict=True):
        places = np.arange(len(ids) - 1)
        apart.append((theirs - ours)[places, ids[1:]])
        kl.append((np.exp(ours) * (ours - theirs)).sum(-1))
    apart = np.concatenate(apart)
    return f"{np.sqrt((apart**2).mean()):.4f}  {abs(apart).max():.4f}    {np.concatenate(kl).mean():.5f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
