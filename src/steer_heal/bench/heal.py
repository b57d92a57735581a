"""Benchmark of one heal step: with full logits and a reference forward pass every step, plain fine-tuning, and ours.

Each alternative runs in a process of its own. The alternatives take turns, and the best turn counts.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig, BarrierConfig, HealConfig, ModelConfig, TrainingConfig
from steer_heal.heal.barrier import KL_EPS
from steer_heal.heal.examples import Example
from steer_heal.heal.step import Multipliers, accumulate
from steer_heal.model.forward import states
from steer_heal.model.lm import LM, Row
from steer_heal.model.loading import load

ALTERNATIVES = ("naive", "sft", "ours")
TURNS = 2  # processes per alternative
STEPS = 3  # timed steps per process, after one untimed step
CONFIG = HealConfig(
    barrier=BarrierConfig(tau=0.0, lam=1.0),
    training=TrainingConfig(epochs=1, pass_rows=64),
    lora=AdapterConfig(r=16),
)
ROUNDS = 8
DECODED = (32, 64)  # rows and tokens decoded to time a folded history


@dataclass(frozen=True)
class Case:
    """A model and the shape of a batch."""

    model: ModelConfig
    rows: int
    tokens: int
    completion: int


def cases() -> list[Case]:
    """Return two cases on the CPU, and a third when there is a CUDA GPU."""
    cpu = ModelConfig(quant="none", dtype="float32", device="cpu")
    found = [
        Case(replace(cpu, path="smollm2-135m"), 3, 192, 128),
        Case(replace(cpu, path="random:gemma-3-270m"), 3, 256, 192),
    ]
    if torch.cuda.is_available():
        found.append(Case(ModelConfig("random:gemma-3-1b", "nf4", "bfloat16", "cuda"), 3, 1024, 768))
    return found


def heal() -> dict:
    """Return each alternative's seconds per step and peak bytes besides the model, and folded rounds' cost."""
    measured = []
    for case in cases():
        row: dict = {"model": case.model.path, "dtype": case.model.dtype}
        turns = {how: [_apart(_step, case, how) for _ in range(TURNS)] for how in ALTERNATIVES}
        for how, found in turns.items():
            row[f"{how}_step_s"] = min(seconds for seconds, _ in found)
            row[f"{how}_peak_bytes"] = min(peak for _, peak in found)
        row["time_over_naive"] = row["ours_step_s"] / row["naive_step_s"]
        row["time_over_sft"] = row["ours_step_s"] / row["sft_step_s"]
        row["peak_over_naive"] = row["ours_peak_bytes"] / row["naive_peak_bytes"]
        measured.append({**row, **{key: value for key, value in asdict(case).items() if key != "model"}})
    return {"cases": measured, "folded": _apart(_folded)}


def _apart(work: Callable, *args: object) -> object:
    """Run a function in a fresh process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1, _quiet) as pool:
        return pool.apply(work, args)


def _quiet() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls deprecated names


def _step(case: Case, how: str) -> tuple[float, int]:
    return timed_step(load(case.model), case, how)


def timed_step(lm: LM, case: Case, how: str) -> tuple[float, int]:
    """Return the seconds of the fastest training step, and the most bytes that a step holds besides the model.

    The bytes are those that torch allocates for the tensors of a step and for what the method keeps between steps,
    counted in a further step that is not timed.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 1000, (case.rows, case.tokens), generator=draw)
    student = Student(lm)
    student.begin_round(CONFIG.lora, 0)
    optimiser = torch.optim.AdamW(student.trainable(), lr=1e-4)

    def prepared() -> Callable[[], None]:
        return {"naive": _naive, "sft": _sft, "ours": _ours}[how](student, ids, case.tokens - case.completion)

    def do(step: Callable[[], None]) -> None:
        with student.view(train=True):
            step()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()

    step, seconds = prepared(), []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        do(step)
        seconds.append(time.perf_counter() - began)
    del step
    peak = peak_of(lambda: do(prepared()), lm.device)
    student.peft.unload()
    return min(seconds[1:]), peak


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that torch holds at once for tensors that `work` makes.

    The operating system's peak is no measure on a CPU: it counts the loading of the model as well, and not every system
    resets it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def _naive(student: Student, ids: torch.Tensor, start: int) -> Callable[[], None]:
    """All logits of both models; the reference's are recomputed every step."""
    model, ids = student.lm.model, ids.to(student.lm.device)
    targets = ids[:, start:]

    def step() -> None:
        with torch.no_grad(), student.view(now=0.0):
            reference = model(input_ids=ids).logits[:, start - 1 : -1].float().log_softmax(-1)
        log_p = model(input_ids=ids).logits[:, start - 1 : -1].float().log_softmax(-1)
        nll = -log_p.gather(-1, targets[..., None])[..., 0].mean()
        kl = (log_p.exp() * (log_p - reference)).sum(-1)
        (nll + torch.relu((kl.square().mean() + KL_EPS).sqrt())).backward()

    return step


def _sft(student: Student, ids: torch.Tensor, start: int) -> Callable[[], None]:
    """transformers' own loss, no barrier."""
    ids = ids.to(student.lm.device)
    labels = ids.clone()
    labels[:, :start] = -100
    return lambda: student.lm.model(input_ids=ids, labels=labels).loss.backward()


def _ours(student: Student, ids: torch.Tensor, start: int) -> Callable[[], None]:
    rows = [Row(row[:start], row[start:]) for row in ids.tolist()]
    with student.view(now=0.0):
        reference = states(replace(student.lm, read_rows=len(rows)), rows)
    examples = [Example(row, states, None) for row, states in zip(rows, reference, strict=True)]
    return lambda: accumulate(student.lm, examples, CONFIG, Multipliers(1.0, 1.0, 1.0))


def _folded() -> dict:
    """Return decoding times after 1 and 8 folded rounds, stacked and at a fixed rank, relative to 1 round."""
    from steer_heal.model.decode import decode

    rows, tokens = DECODED
    students = {}
    for name, rounds, rank in (
        ("1", 1, 0),
        (f"{ROUNDS}_stacked", ROUNDS, 0),
        (f"{ROUNDS}_fold_rank", ROUNDS, CONFIG.lora.r),
    ):
        student = students[name] = Student(load(cases()[0].model))
        for round_ in range(rounds):
            student.begin_round(CONFIG.lora, round_)
            draw = torch.Generator().manual_seed(round_)
            for parameter in student.trainable():
                parameter.data.normal_(0.0, 0.01, generator=draw)
            student.fold(rank)
    seconds = dict.fromkeys(students, float("inf"))
    for _ in range(1 + STEPS):
        for name, student in students.items():
            prompts = [student.lm.prompt("Tell me about rivers.")] * rows
            began = time.perf_counter()
            decode(replace(student.lm, decode_rows=rows), prompts, tokens)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return {f"cost_after_{name}": seconds[name] / seconds["1"] for name in students}
