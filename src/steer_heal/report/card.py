"""The model card of an adapter or a merged model: verdict, description, measurements, the command that makes it."""

from __future__ import annotations

import json
import re
import shlex

from steer_heal.config import FILE, PLACE_FIELDS, model_name
from steer_heal.eval.catalogue import COHERENT, MASS, NEUTRAL, RELEVANT, RIGHT, Instrument
from steer_heal.eval.harness.record import Benchmarks, Scores
from steer_heal.eval.record import ArmSummary
from steer_heal.report.words import facts, headline
from steer_heal.runs.summary import Summary

CARD = """---
base_model: {base}
library_name: {library}
tags: [steering, steer-heal, lora, {trait}]
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
{caveat}
    {load}

Made with `{command}`. The licence of the base model also applies to models derived from it.
"""
COSTS = (MASS, COHERENT, RIGHT, RELEVANT, NEUTRAL)  # shown where they were read
MEASURED = {
    "contrast": "Trait is the log-probability per token of answers with the trait minus that of answers without it, "
    "over pairs that differ only in the trait",
    "whole": "Trait is the log-probability of whole answers with the trait, their end included, minus that of answers "
    "without it, over pairs that differ in the trait",
    "yes_no": "Trait is the log-odds of the answer that shows the trait, over yes/no questions (for half of them, no)",
}
LOAD = {
    "model": 'model = AutoModelForCausalLM.from_pretrained("this folder")',
    "adapter": 'model = PeftModel.from_pretrained(base_model, "this folder")',
    "gguf adapter": "llama-cli -m BASE.gguf --lora THIS.gguf",
    "gguf model": "llama-cli -m THIS.gguf",
}
LIBRARIES = {"model": "transformers", "adapter": "peft", "gguf adapter": "gguf", "gguf model": "gguf"}
ON_FLOAT = "\nIt was trained and measured on the base's NF4 weights; here the update is added to the float weights.\n"


def model_card(summary: Summary, config: dict, trait: dict, argv: list[str], rounds: int, form: str = "adapter") -> str:
    """README of an adapter or a merged model after `rounds` rounds; `form` is one of LOAD.

    `summary` is that of the run or of its rounds so far. `config` and `trait` are the contents of config.json and
    trait.json. `argv` has the arguments that the run was started with, from its first event.
    """
    number = rounds - 1
    healed = summary.rounds[number].healed
    arms = {"base": summary.base, "prompted": summary.prompted, "this": healed}
    read = [one for one in COSTS if getattr(healed, one.measure) is not None]
    columns = [f"trait over base, {summary.unit} [95%]", *(one.label for one in read)]
    base, merged = model_name(config["model"]["path"]), form.endswith("model")
    return CARD.format(
        base=base,
        library=LIBRARIES[form],
        trait=json.dumps(trait["name"]),  # YAML reads a JSON string
        name=base.rstrip("/").split("/")[-1],
        title=trait["title"],
        headline=headline(summary, number)[0],
        facts="\n".join(f"- {fact}" for fact in facts(summary, config["rounds"], number)),
        kind="A model made from" if merged else "An adapter for",
        rounds=f"{rounds} round{'s' * (rounds != 1)}",
        columns=" | ".join(columns),
        rule="|".join(["---"] * len(columns)),
        measured=MEASURED[trait["instrument"]],
        persona=" ".join(trait["positive"].split()),
        table="\n".join(_row(name, arm, read) for name, arm in arms.items()),
        seed=config["seed"],
        caveat=ON_FLOAT if merged and config["model"]["quant"] != "none" else "",
        load=LOAD[form],
        command=command(argv),
    )


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


def command(argv: list[str]) -> str:
    """The command line that a run was started with, without paths of the machine: the flags of PLACE_FIELDS and the
    folders of a trait file, of a vector and of a model."""
    words, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            skipping = word.partition("=")[0].removeprefix("--").replace("-", "_") in PLACE_FIELDS
        if not skipping:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            value = re.sub(r"^.*[/\\\\](.+\.toml)$", r"\1", model_name(value))
            value = re.sub(rf"^{FILE}.*[/\\\\]", FILE, value)
            words.append(f"{flag}{equals}{value}")
    return shlex.join(["steer-heal", *words])
