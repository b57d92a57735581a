"""`run`, `chat`, `eval` and `export --merge` as a user types them, and plain transformers on the result, for a family.

    python -m steer_heal.gate.five_commands --out /tmp/five [FAMILY ...]

The families are those of families.json that work, with random weights; each takes some ten seconds. The merged model's
logits on a prompt must be the student's, and not the base's. Ends with status 1 when a family fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_heal.cli import main as steer_heal
from steer_heal.gate.conftest import FEW
from steer_heal.gate.families import WORK, save
from steer_heal.runs.student import student_after

LESS = ("--eval.leave-out", "plain")
SAID = "Hello there\n/gate 0.5\nAnd you?\n/quit\n"
NEAR = 1e-4  # of logits that are sums in another order


def difference(folder: Path, name: str) -> tuple[float, float]:
    """Carry out the five commands; return how far the merged logits lie from the student's, and those from base's."""
    model, merged = folder / "model", folder / "merged"
    model.mkdir(parents=True)
    save(name, model)
    steer_heal(["run", "tiny-random", "--model.path", str(model), "--out", str(folder / "runs"), *FEW, *LESS])
    (run,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
    sys.stdin = io.StringIO(SAID)
    steer_heal(["chat", str(run), "--max-new-tokens", "8"])
    steer_heal(["eval", str(run), "--eval.size", "tiny"])
    steer_heal(["export", str(run), "--to", str(merged), "--merge"])
    plain = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    turn = [{"role": "user", "content": "Hi."}]
    text = AutoTokenizer.from_pretrained(merged).apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    student = student_after(run, json.loads((run / "config.json").read_text("utf-8")), 1)
    ids = torch.tensor([student.lm.tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        ours = student.lm.model(ids).logits
        with student.view(history=0.0):
            base = student.lm.model(ids).logits
        return (plain(ids).logits - ours).abs().max().item(), (ours - base).abs().max().item()


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given.add_argument("families", nargs="*", help=f"of {', '.join(WORK)}; all by default")
    given.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    given = given.parse_args()
    failed = []
    for name in given.families or WORK:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                merged, moved = difference(given.out / name, name)
            fine = merged < NEAR < moved
            print(f"{name}: merged - student {merged:.1e}, student - base {moved:.2f}", flush=True)
        except (Exception, SystemExit):
            traceback.print_exc()
            fine = False
        failed += [] if fine else [name]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
