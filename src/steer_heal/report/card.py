"""The model card of an adapter or a merged model: description, measurements, and the command that makes it."""

from __future__ import annotations

import re
import shlex

from steer_heal.config import PLACE_FIELDS, model_name
from steer_heal.eval.harness.record import Benchmarks, Scores
from steer_heal.eval.record import ArmSummary
from steer_heal.runs.summary import Summary

CARD = """---
base_model: {base}
library_name: {library}
tags: [steering, steer-heal, lora]
---

# {name} that {title}

This {kind} moves {base} towards one trait: it {title}. It was made by steer-heal in {rounds}: each round steers a \
copy of the model with a persona vector, distils it into a LoRA, and penalises divergence from a reference model. The \
persona was:

> {persona}

| | trait over base, {unit} [95%] | answer mass | coherent answers | perplexity of neutral text |
|---|---|---|---|---|
{table}

{measured}; "prompted" is the base with the persona as its system prompt. One seed ({seed}): the intervals are over \
probes.
{caveat}
    {load}

Made with `{command}`. The licence of the base model also applies to models derived from it.
"""
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
}
ON_FLOAT = "\nIt was trained and measured on the base's NF4 weights; here the update is added to the float weights.\n"


def model_card(summary: Summary, config: dict, trait: dict, argv: list[str], rounds: int, merged: bool = False) -> str:
    """README of an adapter or a merged model after `rounds` rounds.

    `summary` is that of the run or of its rounds so far. `config` and `trait` are the contents of config.json and
    trait.json. `argv` has the arguments that the run was started with, from its first event.
    """
    healed = summary.rounds[rounds - 1].healed
    arms = {"base": summary.base, "prompted": summary.prompted, "this": healed}
    base, kind = model_name(config["model"]["path"]), "model" if merged else "adapter"
    return CARD.format(
        base=base,
        library="transformers" if merged else "peft",
        name=base.rstrip("/").split("/")[-1],
        title=trait["title"],
        kind=kind,
        rounds=f"{rounds} round{'s' * (rounds != 1)}",
        unit=summary.unit,
        measured=MEASURED[trait["instrument"]],
        persona=" ".join(trait["positive"].split()),
        table="\n".join(_row(name, arm) for name, arm in arms.items()),
        seed=config["seed"],
        caveat=ON_FLOAT if merged and config["model"]["quant"] != "none" else "",
        load=LOAD[kind],
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


def _row(name: str, arm: ArmSummary) -> str:
    low, high = arm.trait_over_base_ci
    return (
        f"| {name} | {arm.trait_over_base:+.3f} [{low:+.3f}, {high:+.3f}] | {arm.answer_mass:.3f} | "
        f"{arm.coherent_share:.0%} | {arm.neutral_ppl:.2f} |"
    )


def command(argv: list[str]) -> str:
    """The command line that a run was started with, without paths of the machine: the flags of PLACE_FIELDS and the
    folders of a trait file and of a model."""
    words, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            skipping = word.partition("=")[0].removeprefix("--").replace("-", "_") in PLACE_FIELDS
        if not skipping:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            value = re.sub(r"^.*[/\\\\](.+\.toml)$", r"\1", model_name(value))
            words.append(f"{flag}{equals}{value}")
    return shlex.join(["steer-heal", *words])
