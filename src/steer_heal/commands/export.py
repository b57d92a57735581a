"""The verb `export`: write a run's result as an adapter that plain PEFT loads, or a model that transformers loads.

`export_gguf` writes .gguf files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitsandbytes.nn import Linear4bit

from steer_heal.config import UserError
from steer_heal.files import write_text
from steer_heal.model.lm import LM
from steer_heal.report.card import benchmark_part, model_card
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.resume import opened
from steer_heal.runs.student import finished_rounds, student_after


def export(folder: Path, to: Path, round_: int | None, merge: bool) -> None:
    """Write the student after `round_` (the last one if None) into `to`, with a model card.

    The adapter needs the run's base model. With `merge` the update is added to the base's float weights in the run's
    dtype, also when the run trained on NF4 weights.

    Raises UserError when the folder is no run, the round was not finished, or `to` is not empty.
    """
    made = opened(folder)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {str(to)!r} is not an empty folder: choose a new one")
    run = read_run(folder)
    rounds = finished_rounds(folder, run.config["rounds"], round_)
    student = student_after(folder, run.config, rounds, float_weights=merge)
    if merge:
        require_mergeable(student.lm)
    card = model_card(
        run.summary, run.config, made.read("trait.json"), made.first_argv, rounds, "model" if merge else "adapter"
    )
    if run.benchmarks is not None and run.benchmarks.round == rounds - 1:
        card += benchmark_part(run.benchmarks)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".export-") as scratch:
        whole = Path(scratch) / "whole"
        if merge:
            student.merged().save_pretrained(whole)
            student.lm.tokenizer.save_pretrained(whole)
        else:
            student.save(whole, student.history)
        write_text(whole / "README.md", card)
        whole.rename(to)  # also over an empty folder


def require_mergeable(lm: LM, flag: str = "--merge", mend: str = "export the adapter alone, without --merge") -> None:
    """Raise UserError for a base whose own files are quantised: there are no float weights to add an update to."""
    if any(isinstance(module, Linear4bit) for module in lm.model.modules()):
        raise UserError(f"{flag}: the weights of {lm.name!r} are stored in 4 bits: {mend}")
