"""Checks that need a GPU, in ten minutes: `python -m steer_heal.gate.gpu --out gpu.json`, or `just gpu-check`.

Each part runs in a process of its own with a time limit. Its findings are written to the file at once, and the next
part runs even if it fails or exceeds its limit. The last lines give the numbers of passed and failed checks, and the
estimated time of eight rounds on this card. Nothing is downloaded: gemma has its shapes and random weights, SmolLM2 is
the real model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from steer_heal.runs.folder import RunDir

GEMMA = "gemma-3-1b"  # the shapes
PRESET = "gemma-3-1b-published"  # its loss, thresholds and doses are given, so that what is timed is always the same
DECODED_ROWS = (1, 8, 32, 128, 256)
DECODED_TOKENS = 64
CARD_BYTES = 24 * 2**30  # memory of an RTX 3090, the card that the preset is made for
OPEN_FILTER = "--filter.incoherence 1e9 --filter.loops off"
# A round that is short enough for the check: fewer probes, rows, tokens and doses than in the preset.
SMALL_ROUND = (
    "--distil.n-keep 48 --distil.max-new-tokens 128 --dose.steps 3 --eval.size tiny --eval.leave-out profile off_target"
)
WHOLE_ROUND_OVER_SMALL = {"r00/dose.json": 256 / 128, "r00/completions.jsonl": 256 / 128, "r00/adapter": 128 / 48}
KILL_AFTER = 5.0  # seconds after the artefact `kill_at`, at most
# The demo on a CPU, round 2 (docs/results.md): change over base with its 95% interval, then shares of base.
DEMO_TRAIT, DEMO_ANSWER_MASS, DEMO_PERPLEXITY = (0.319, 0.446), 1.096, 0.964
SHARE_TOLERANCE = 0.1
LAYERS_4B_OVER_1B, WEIGHTS_4B_OVER_1B = 34 / 26, 3.9
ROUNDS = 8


class Found:
    """The findings of a part so far; each is written to the file at once."""

    def __init__(self, file: Path) -> None:
        self.file, self.facts, self.checks = file, {}, {}

    def note(self, **facts: object) -> None:
        self.facts |= facts
        self._write()

    def check(self, name: str, passed: bool, seen: object = None) -> None:
        self.checks[name] = {"passed": bool(passed), "seen": seen}
        self._write()

    def _write(self) -> None:
        text = json.dumps({"facts": self.facts, "checks": self.checks}, indent=1)
        scratch = self.file.with_suffix(".new")
        scratch.write_text(text, "utf-8")
        os.replace(scratch, self.file)


def card(found: Found, work: Path) -> None:
    """The card and its speed; NF4 products and their gradients against the dequantised weights."""
    import transformers
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from steer_heal.gate.conftest import tiny

    properties = torch.cuda.get_device_properties(0)
    found.note(
        card=properties.name,
        memory_gib=properties.total_memory / 2**30,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        transformers=transformers.__version__,
        driver=_said("nvidia-smi --query-gpu=driver_version --format=csv,noheader"),
    )
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found.note(bf16_tflops=2 * 8192**3 / _fastest(lambda: a @ b) / 1e12)
    found.note(copy_gb_per_s=2 * a.numel() * 2 / _fastest(lambda: b.copy_(a)) / 1e9)
    worst = {"forward": 0.0, "backward": 0.0}
    for module in tiny(quant="nf4", dtype="bfloat16").blocks.modules():
        if not isinstance(module, Linear4bit):
            continue
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        x = torch.randn(48, module.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        up = torch.randn(48, module.out_features, device="cuda", dtype=torch.bfloat16)
        y = module(x)
        (gradient,) = torch.autograd.grad(y, x, up)
        for name, ours, exact in (
            ("forward", y, x.float() @ weight.T),
            ("backward", gradient, up.float() @ weight),
        ):
            worst[name] = max(worst[name], ((ours.float() - exact).norm() / exact.norm()).item())
    found.check("NF4 products equal those of the dequantised weights", max(worst.values()) < 0.01, worst)


def checks(found: Found, work: Path) -> None:
    """The gate's `device` checks on this card."""
    report = work / "checks.txt"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "4",
        "-m",
        "device",
        "--pyargs",
        "steer_heal.gate",
        "-p",
        "no:cacheprovider",
    ]
    with report.open("w") as out:
        done = subprocess.run(words, stdout=out, stderr=out, env=os.environ | {"STEER_HEAL_GATE_DEVICE": "cuda"})
    text = report.read_text()
    failed = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    found.note(failed=failed, last=text.splitlines()[-1:], trouble=text[-6000:] if failed else "")
    found.check("the gate's device checks", done.returncode == 0, text.splitlines()[-1:])


def speed(found: Found, work: Path) -> None:
    """Speed of decoding and training steps at gemma's shapes, in bf16 and NF4; the heal stage within 24 GiB."""
    from steer_heal.config import ModelConfig
    from steer_heal.model.loading import load

    model = _built(work)
    for quant in ("none", "nf4"):
        lm = load(ModelConfig(str(model), quant, "bfloat16", "cuda"))
        name = "bf16" if quant == "none" else quant
        decoded = _decoding(lm)
        found.note(**{f"decode_{name}": decoded})
        found.check(f"{name}: 128 rows decode 40 times as fast as one", decoded["128_over_1"] >= 40, decoded)
        steps = _steps(lm)
        found.note(**{f"step_{name}": steps})
        for ratio, most in (("time_over_naive", 0.6), ("time_over_sft", 1.05), ("peak_over_naive", 0.35)):
            found.check(f"{name}: a training step's {ratio} is at most {most}", steps[ratio] <= most, steps[ratio])
        if quant == "nf4":
            stage = _heal_stage(lm)
            found.note(heal_stage_nf4=stage)
            found.check("the heal stage fits 24 GiB", stage["peak_bytes"] <= CARD_BYTES, stage)
        del lm
        torch.cuda.empty_cache()


def _decoding(lm) -> dict:
    """Tokens per second, steered and sampled, for each number of rows; and one row of transformers' `generate`."""
    from steer_heal.bench.decode import plain_generate
    from steer_heal.model.decode import Sampling, decode
    from steer_heal.model.steering import Steering

    lm = replace(lm, end_tokens=frozenset())
    prompts = [
        lm.prompt(f"Tell me about river number {i}, and what it means to you.") for i in range(max(DECODED_ROWS))
    ]
    vector = _some_vector(lm)
    found = {}
    for rows in DECODED_ROWS:
        steering = Steering(vector, torch.full((rows,), 0.5))

        def work(tokens: int, rows: int = rows, steering: Steering = steering) -> None:
            decode(replace(lm, decode_rows=rows), prompts[:rows], tokens, steering, Sampling(("gpu",)))

        work(3)
        found[f"rows_{rows}"] = rows * DECODED_TOKENS / _seconds(lambda work=work: work(DECODED_TOKENS))
    one = Steering(vector, torch.full((1,), 0.5))
    plain_generate(lm, prompts[0], one, 3)
    alone = DECODED_TOKENS / _seconds(lambda: plain_generate(lm, prompts[0], one, DECODED_TOKENS))
    return {
        **found,
        "generate_one_row": alone,
        "128_over_1": found["rows_128"] / found["rows_1"],
        "128_over_generate": found["rows_128"] / alone,
    }


def _steps(lm) -> dict:
    """Seconds and peak bytes of a training step of 3 x 1,024 tokens, by the three methods of `bench heal`."""
    from steer_heal.bench.heal import ALTERNATIVES, Case, timed_step

    case, row = Case(None, 3, 1024, 768), {}
    for how in ALTERNATIVES:
        row[f"{how}_step_s"], row[f"{how}_peak_bytes"] = timed_step(lm, case, how)
    row["time_over_naive"] = row["ours_step_s"] / row["naive_step_s"]
    row["time_over_sft"] = row["ours_step_s"] / row["sft_step_s"]
    row["peak_over_naive"] = row["ours_peak_bytes"] / row["naive_peak_bytes"]
    return row


def _heal_stage(lm) -> dict:
    """Prepare and train as in the preset, on rows of full length, with the memory limited to 24 GiB."""
    from steer_heal.bake.student import Student
    from steer_heal.heal.examples import LONGEST, prepare, with_tau
    from steer_heal.heal.train import Turn, heal
    from steer_heal.model.lm import Row
    from steer_heal.model.steering import Steering
    from steer_heal.presets import PRESETS

    torch.cuda.set_per_process_memory_fraction(CARD_BYTES / torch.cuda.get_device_properties(0).total_memory)
    heal_config = PRESETS[PRESET].heal
    config = replace(heal_config, training=replace(heal_config.training, epochs=1))
    ids = torch.randint(100, 1000, (24, LONGEST), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row(row[:256], row[256:]) for row in ids]
    student = Student(lm)
    student.begin_round(config.lora, 0)
    torch.cuda.reset_peak_memory_stats()
    steering = Steering(_some_vector(lm), torch.full((len(rows),), 0.5))
    began = time.perf_counter()
    examples = prepare(student, rows, steering, config)
    prepared = time.perf_counter() - began
    records = heal(student, lambda epoch: examples, [], with_tau(lm, examples, config), Turn(0, 0))
    student.peft.unload()
    torch.cuda.set_per_process_memory_fraction(1.0)
    seconds = sorted(record.step_seconds for record in records[1:])
    return {
        "prepare_s": prepared,
        "steps": len(records),
        "median_step_s": seconds[len(seconds) // 2],
        "tokens_per_s": records[-1].tokens_per_s,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def demo(found: Found, work: Path) -> None:
    """The demo's three rounds of a real model on the card; its figures must agree with those of a CPU."""
    summary = _run(found, work, "smollm2-135m --model.device cuda --model.dtype float32 --eval.leave-out plain")
    base, healed = summary["base"], summary["rounds"][-1]["healed"]
    low, high = DEMO_TRAIT
    shares = {
        "answer mass": (healed["answer_mass"] / base["answer_mass"], DEMO_ANSWER_MASS),
        "neutral perplexity": (healed["neutral_ppl"] / base["neutral_ppl"], DEMO_PERPLEXITY),
    }
    found.note(trait_over_base=healed["trait_over_base"], shares={name: share for name, (share, _) in shares.items()})
    found.check("the demo's trait lies in the CPU's interval", low <= healed["trait_over_base"] <= high, [low, high])
    for name, (share, on_cpu) in shares.items():
        found.check(f"the demo's {name} is the CPU's", abs(share - on_cpu) <= SHARE_TOLERANCE, [share, on_cpu])


def qlora(found: Found, work: Path) -> None:
    """One round of the preset at its real shapes, killed in training, resumed, exported."""
    flags = f"{PRESET} --anyway --model.path {_built(work)} --rounds 1 {OPEN_FILTER} {SMALL_ROUND}"
    summary = _run(found, work, flags, kill_at="r00/completions.jsonl")
    found.note(peak_memory_gib=summary["peak_memory_bytes"] / 2**30)
    found.check("the run fits 24 GiB", summary["peak_memory_bytes"] <= CARD_BYTES, summary["peak_memory_bytes"])
    rounds = _eight_rounds(summary["seconds_by_stage"])
    found.note(minutes_of_eight_rounds=rounds)
    folder = found.facts["folder"]
    exported = _call(work, f"export {folder} --to {work / 'exported'}")
    found.check("the adapter is exported", exported.returncode == 0, exported.stderr[-500:])


def _eight_rounds(seconds: dict[str, float]) -> dict[str, float]:
    """Minutes for eight rounds of the full preset on this card, estimated from one small round: the round's stages
    eight times, the rest once, evaluation as short as here. For gemma-3-4b decoding and reading scale with the layers,
    training with the weights."""
    per_round = {
        name: s * WHOLE_ROUND_OVER_SMALL.get(name, 1) for name, s in seconds.items() if name.startswith("r00/")
    }
    once = sum(s for name, s in seconds.items() if name not in per_round)
    larger = {
        name: s * (WEIGHTS_4B_OVER_1B if name == "r00/adapter" else LAYERS_4B_OVER_1B) for name, s in per_round.items()
    }
    return {
        GEMMA: (once + ROUNDS * sum(per_round.values())) / 60,
        "gemma-3-4b": (LAYERS_4B_OVER_1B * once + ROUNDS * sum(larger.values())) / 60,
    }


def resume(found: Found, work: Path) -> None:
    """A killed and resumed tiny NF4 run against an undisturbed one, bit for bit."""
    flags = "tiny-random --model.device cuda --model.quant nf4 --eval.leave-out plain"
    adapters = []
    for kill_at in (None, "r00/completions.jsonl"):
        _run(found, work, flags, kill_at)
        written = Path(found.facts["folder"]) / "adapter" / "adapter_model.safetensors"
        adapters.append(hashlib.sha256(written.read_bytes()).hexdigest())
    found.check("a killed and resumed run ends in the same bits", adapters[0] == adapters[1], adapters)


def _run(found: Found, work: Path, flags: str, kill_at: str | None = None) -> dict:
    """Do a run; returns its summary, with the seconds of its stages. With `kill_at` the run is killed shortly after
    that artefact exists, and then resumed. Raises RuntimeError with the end of its output when it fails."""
    out = Path(tempfile.mkdtemp(dir=work))
    began = time.perf_counter()
    if kill_at is not None:
        started = _start(work, f"run {flags} --out {out}")
        while started.poll() is None and not list(out.glob(f"*/{kill_at}")):
            time.sleep(0.1)
        time.sleep(min(KILL_AFTER, 0.1 * (time.perf_counter() - began)))
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        (folder,) = [path for path in out.iterdir() if path.is_dir()]
        found.note(killed_with=started.returncode, had_adapter=(folder / "r00/adapter").exists())
        done = _call(work, f"run --resume {folder}")
    else:
        done = _call(work, f"run {flags} --out {out}")
    found.note(wall_seconds=time.perf_counter() - began, said=done.stderr[-1500:])
    if done.returncode != 0:
        raise RuntimeError(f"{flags}: exit code {done.returncode}: {done.stderr[-3000:]}")
    (folder,) = [path for path in out.iterdir() if path.is_dir()]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    summary["seconds_by_stage"] = RunDir(folder).stage_seconds()
    found.note(folder=str(folder), stage_seconds=summary["seconds_by_stage"], table=done.stdout[-3000:])
    return summary


def _start(work: Path, words: str, **more: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "steer_heal.cli", *words.split()]
    return subprocess.Popen(
        command,
        cwd=work,
        start_new_session=True,
        **{"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **more},
    )


def _call(work: Path, words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "steer_heal.cli", *words.split()], cwd=work, capture_output=True, text=True
    )


def _some_vector(lm):
    """A random vector in the preset's band: normal, with a standard deviation of 0.1."""
    from steer_heal.model.steering import Vector

    layers = lm.band((0.45, 0.55))
    width = lm.model.config.get_text_config().hidden_size
    return Vector(layers, 0.1 * torch.randn(len(layers), width, generator=torch.Generator().manual_seed(0)))


def build(found: Found, work: Path) -> None:
    """Build a model with gemma's shapes and random weights, once for all parts."""
    from steer_heal.model.random_weights import build_random

    scratch = Path(tempfile.mkdtemp(dir=work))
    build_random(GEMMA, scratch)
    os.rename(scratch, work / GEMMA)


def _built(work: Path) -> Path:
    while not (work / GEMMA).is_dir():
        time.sleep(0.2)
    return work / GEMMA


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _fastest(work: Callable[[], object], turns: int = 10) -> float:
    work()
    return min(_seconds(work) for _ in range(turns))


def _said(command: str) -> str:
    try:
        return subprocess.run(command.split(), capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


@dataclass(frozen=True)
class Part:
    work: Callable[[Found, Path], None]
    seconds: int
    """time limit"""


PARTS = {
    "card": Part(card, 45),
    "checks": Part(checks, 110),
    "speed": Part(speed, 140),
    "demo": Part(demo, 120),
    "qlora": Part(qlora, 180),
    "resume": Part(resume, 80),
}


def carry_out(names: list[str], out: Path, work: Path) -> bool:
    """Run the parts one after another; returns whether every part ended and every check passed."""
    builder = _child("build", work)  # on the CPU, while the first parts use the card
    whole: dict[str, dict] = {}
    for name in names:
        began, child = time.perf_counter(), _child(name, work)
        try:
            ended = "done" if child.wait(PARTS[name].seconds) == 0 else "crashed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            ended = f"out of time ({PARTS[name].seconds} s)"
        file = work / f"{name}.json"
        said = (work / f"{name}.txt").read_text("utf-8", "replace")
        whole[name] = {"ended": ended, "seconds": round(time.perf_counter() - began, 1)}
        whole[name] |= json.loads(file.read_text("utf-8")) if file.exists() else {"facts": {}, "checks": {}}
        if ended != "done":
            whole[name]["said"] = said[-4000:]
        out.write_text(json.dumps(whole, indent=1), "utf-8")
        print(f"{name}: {ended} after {whole[name]['seconds']} s", flush=True)
        for check, result in whole[name]["checks"].items():
            print(f"  {'passed' if result['passed'] else 'FAILED'}  {check}: {result['seen']}", flush=True)
        if ended != "done":
            print(said[-1500:], flush=True)
    builder.wait()
    results = [result["passed"] for part in whole.values() for result in part["checks"].values()]
    sound = all(results) and all(part["ended"] == "done" for part in whole.values())
    eight = whole.get("qlora", {}).get("facts", {}).get("minutes_of_eight_rounds", {})
    for model, minutes in eight.items():
        print(f"eight rounds of {model} on this card: about {minutes:.0f} minutes")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return sound


def _child(name: str, work: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "steer_heal.gate.gpu", "--part", name, "--work", str(work)]
    with (work / f"{name}.txt").open("w") as said:
        return subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--out", type=Path, default=Path("gpu.json"), help="file for all that is found")
    asked.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts alone")
    asked.add_argument("--part", choices=[*PARTS, "build"], help=argparse.SUPPRESS)
    asked.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.part is not None:
        os.environ["STEER_HEAL_GATE_DEVICE"] = "cuda"
        work = build if given.part == "build" else PARTS[given.part].work
        try:
            work(Found(given.work / f"{given.part}.json"), given.work)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    if not torch.cuda.is_available():
        print(
            "steer-heal gpu-check: torch sees no CUDA GPU here; `just test` has the checks for a CPU", file=sys.stderr
        )
        sys.exit(2)
    with tempfile.TemporaryDirectory() as work:
        sys.exit(0 if carry_out(given.only, given.out, Path(work)) else 1)


if __name__ == "__main__":
    main()
