"""The model card of an adapter or a merged model: verdict, description, measurements, the command that makes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.repocard_data import EvalResult, ModelCardData

from steer_heal.config import PACKAGED_GGUF, hub_id, model_name
from steer_heal.eval.catalogue import COHERENT, MASS, NEUTRAL, RELEVANT, RIGHT, Instrument
from steer_heal.eval.harness.record import Benchmarks, Scores
from steer_heal.eval.record import ArmSummary
from steer_heal.report.words import facts, headline
from steer_heal.runs.reproduction import command
from steer_heal.runs.summary import Summary

CARD = """---
{front}
---

# {name}, trained towards: {title}

**{headline}**

{facts}

{kind} {base}, made by steer-heal in {rounds}: each round steers a copy of the model with a persona vector, \
trains a LoRA towards it, and penalises divergence from a reference model. The persona was:

> {persona}

| | {columns} |
|---|{rule}|
{table}

{measured}; "prompted" is the base with the persona as its system prompt. One seed ({seed}): the intervals are over \
probes.
{caveat}{fold}
{load}

Made with `{command}`.{again} The licence of the base model{licence} also applies to models derived from it.
"""
COSTS = (MASS, COHERENT, RIGHT, RELEVANT, NEUTRAL)  # shown where they were read
MEASURED = {
    "contrast": "Trait is the log-probability per token of answers with the trait minus that of answers without it, "
    "over pairs that differ only in the trait",
    "whole": "Trait is the log-probability of whole answers with the trait, their end included, minus that of answers "
    "without it, over pairs that differ in the trait",
    "yes_no": "Trait is the log-odds of the answer that shows the trait, over yes/no questions (for half of them, no)",
}
LIBRARIES = {"model": "transformers", "adapter": "peft", "gguf adapter": "gguf", "gguf model": "gguf"}
ON_FLOAT = "\nIt was trained and measured on the base's NF4 weights; here the update is added to the float weights.\n"
FOLD = (
    "\nFolded from rank {before} to rank {rank}: the update differs by {lost:.1%} (Frobenius norm, all layers "
    "together) from that of the student measured above.\n"
)
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
AGAIN = (
    " `steer-heal reproduce` makes the run again from the `reproduce.json` beside this card and compares the outcomes."
)
NO_ID = (
    "Its base, {base}, has no id at the hub, so nothing finds it by itself: give its place. A whole model, `steer-heal "
    "export RUN --merge`, needs none.\n\n"
)
HARNESS_URL = "https://github.com/EleutherAI/lm-evaluation-harness"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run, as far as a card tells of it."""

    summary: Summary
    """of the run, or of its rounds so far"""
    config: dict
    """contents of config.json"""
    trait: dict
    """contents of trait.json"""
    argv: list[str]
    """the arguments that the run was started with, from its first event"""
    rounds: int
    """the student is that after so many rounds"""


@dataclass(frozen=True)
class Licence:
    """A licence as the front of a card names it."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The rank of an exported adapter."""

    before: int
    """rank of the student's own"""
    rank: int
    lost: float = 0.0
    """relative error of the update, in the Frobenius norm over all layers"""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a card lies beside."""

    kind: str = "adapter"
    """one of LIBRARIES"""
    files: tuple[str, str] = ("THIS.gguf", "BASE.gguf")
    """.gguf: the file itself, and that of its base"""
    fold: Fold | None = None
    licence: Licence | None = None
    """of the base, where it is known"""
    benchmarks: Benchmarks | None = None
    reproduce: bool = False
    """whether reproduce.json lies beside it"""

    @property
    def merged(self) -> bool:
        return self.kind.endswith("model")


def model_card(made: Made, form: Form) -> str:
    """README of an adapter or a merged model."""
    summary, config, trait, number = made.summary, made.config, made.trait, made.rounds - 1
    healed = summary.rounds[number].healed
    arms = {"base": summary.base, "prompted": summary.prompted, "this": healed}
    read = [one for one in COSTS if getattr(healed, one.measure) is not None]
    columns = [f"trait over base, {summary.unit} [95%]", *(one.label for one in read)]
    base, licence = model_name(config["model"]["path"]), form.licence
    card = CARD.format(
        front=_front(made, form).to_yaml().strip(),
        base=base,
        name=base.rstrip("/").split("/")[-1],
        title=trait["title"],
        headline=headline(summary, number)[0],
        facts="\n".join(f"- {fact}" for fact in facts(summary, config["rounds"], number)),
        kind="A model made from" if form.merged else "An adapter for",
        rounds=f"{made.rounds} round{'s' * (made.rounds != 1)}",
        columns=" | ".join(columns),
        rule="|".join(["---"] * len(columns)),
        measured=MEASURED[trait["instrument"]],
        persona=" ".join(trait["positive"].split()),
        table="\n".join(_row(name, arm, read) for name, arm in arms.items()),
        seed=config["seed"],
        caveat=ON_FLOAT if form.merged and config["model"]["quant"] != "none" else "",
        fold=FOLD.format(**vars(form.fold)) if form.fold and form.fold.lost else "",
        load=_load(config["model"]["path"], form),
        command=command(made.argv),
        again=AGAIN if form.reproduce else "",
        licence=f" ({licence.name or licence.id})" if licence else "",
    )
    return card + (benchmark_part(form.benchmarks) if form.benchmarks else "")


def _front(made: Made, form: Form) -> ModelCardData:
    """What the hub reads: base, licence, tags and, where the student as it is here was measured, its benchmarks."""
    base, licence, folded = made.config["model"]["path"], form.licence, form.fold and form.fold.lost
    scores = [] if form.benchmarks is None or folded else list(_scores(form.benchmarks))
    results = {"model_name": f"{model_name(base).split('/')[-1]} {made.trait['name']}", "eval_results": scores}
    return ModelCardData(
        base_model=hub_id(base),
        library_name=LIBRARIES[form.kind],
        license=licence and licence.id,
        license_name=licence and licence.name,
        license_link=licence and licence.link,
        tags=["steering", "steer-heal", *([] if form.merged else ["lora"]), made.trait["name"]],
        **(results if scores else {}),
    )


def _scores(found: Benchmarks) -> Iterator[EvalResult]:
    """The student's benchmarks as the hub's model-index has them."""
    tasks = {task.name: task for task in found.tasks}
    part = "" if found.first_items is None else f", first {found.first_items} items"
    for shown in found.shown:
        scores, task = found.of(found.arms[2], shown), tasks.get(shown.task)
        if math.isfinite(scores.value):  # YAML's .nan is no number to the hub
            yield EvalResult(
                task_type="text-generation",
                dataset_type=scores.task,
                dataset_name=f"{scores.task}{part}",
                dataset_args={"num_few_shot": task.shots} if task else None,
                metric_type=scores.metric,
                metric_name=scores.name,
                metric_value=scores.value,
                source_name=f"lm-evaluation-harness {found.harness}",
                source_url=HARNESS_URL,
            )


def _load(base: str, form: Form) -> str:
    """How to load it, and what to do where the base has no id at the hub."""
    this, of_base = form.files
    match form.kind:
        case "gguf adapter":
            return f"    llama-cli -m {of_base} --lora {this}"
        case "gguf model":
            return f"    llama-cli -m {this}"
        case "model":
            return '    model = AutoModelForCausalLM.from_pretrained("this folder")'
    fits = next((rank for rank in VLLM_RANKS if form.fold and form.fold.rank <= rank), None)
    rank = f"\n\nIts rank is {form.fold.rank}: vLLM takes it with `--max-lora-rank {fits}`." if fits else ""
    if hub_id(base):
        return f'    model = AutoPeftModelForCausalLM.from_pretrained("this folder"){rank}'
    where = f'"path/to/{model_name(base)}"'
    if base in PACKAGED_GGUF or base.lower().endswith(".gguf"):
        file = PACKAGED_GGUF[base][1] if base in PACKAGED_GGUF else Path(base).name
        where = f'"path/to/its/folder", gguf_file="{file}"'
    lines = f"    base = AutoModelForCausalLM.from_pretrained({where})\n"
    lines += '    model = PeftModel.from_pretrained(base, "this folder")'
    return f"{NO_ID.format(base=model_name(base))}{lines}{rank}"


def benchmark_part(found: Benchmarks) -> str:
    """The card's part on benchmarks: a row for each task and metric."""
    arms = {name: arm for name, arm in zip(("base", "prompted", "this"), found.arms, strict=False)}
    lines = [f"\n## Benchmarks\n\n| | {' | '.join(arms)} |", f"|---|{'---|' * len(arms)}"]
    for shown in found.shown:
        cells = [_cell(found.of(arm, shown)) for arm in arms.values()]
        lines.append(f"| {shown.task}, {shown.name} | {' | '.join(cells)} |")
    first = "" if found.first_items is None else f", the first {found.first_items} items of each task"
    lines.append(
        f"\nRead by lm-evaluation-harness {found.harness} with the chat template{first}. In brackets: over base."
    )
    return "\n".join(lines) + "\n"


def _cell(one: Scores) -> str:
    if one.over_base is None:
        return f"{one.value:.3f}"
    low, high = one.over_base.ci
    return f"{one.value:.3f} ({one.over_base.mean:+.3f} [{low:+.3f}, {high:+.3f}])"


def _row(name: str, arm: ArmSummary, read: list[Instrument]) -> str:
    low, high = arm.trait_over_base_ci
    costs = [one.shown(arm) for one in read]
    return f"| {name} | {' | '.join([f'{arm.trait_over_base:+.3f} [{low:+.3f}, {high:+.3f}]', *costs])} |"
