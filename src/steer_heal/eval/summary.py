"""What a run comes to: summary.json, the figures noted after each round, the warnings."""

from __future__ import annotations

import resource
import statistics
import sys

import torch
from loguru import logger

from steer_heal.config import FIRED_FLOOR, HealConfig, RunConfig
from steer_heal.data import Trait
from steer_heal.eval.record import arms_record, fired_shares
from steer_heal.eval.verdict import expressible, verdict

STAGES = {
    "extract": ("vector",),
    "dose": ("dose.json",),
    "distil": ("completions.jsonl",),
    "heal": ("adapter",),
    "eval": ("steered.json", "healed.json", "equal_cost.json", "equal_trait.json", "geometry.json"),
}


def last_verdict(arms: dict[str, dict], rounds: list) -> dict[str, str]:
    """The last round's verdict, {"word", "why"}."""
    base, steered, healed = arms["base"], rounds[-1].steered, rounds[-1].healed
    return verdict(base, steered, healed, expressible(list(arms.values()), base["instrument"]))


def headline(arm: dict) -> dict[str, float]:
    """An arm in four numbers, for the run's events."""
    return {key: arm[key] for key in ("trait_nats", "answer_mass", "coherent_share", "neutral_ppl")}


def demo_rows(**arms: dict) -> list[dict]:
    """The free-text answers of several arms, one row a prompt."""
    first = next(iter(arms.values()))
    return [
        {"prompt": demo["prompt"], **{name: arm["demos"][i]["text"] for name, arm in arms.items()}}
        for i, demo in enumerate(first["demos"])
    ]


def barrier_warning(records: list[dict], config: HealConfig) -> None:
    """Say loudly that the barrier was off, with the tau to try: nobody notices a constraint that never binds."""
    barrier = config.barrier
    if barrier.reg == "nll":
        return
    operating = statistics.median(r["divergence"] for r in records)
    own, anchor = fired_shares(records).values()
    seen = f"the barrier fired on {own:.0%} of the steps" + f", its anchor on {anchor:.0%}" * (
        config.anchor.prompts > 0
    )
    at = f"operating {barrier.agg} of {barrier.reg} {operating:.3g} nats, tau {records[0]['tau']:.3g}"
    if max(own, anchor) < FIRED_FLOOR and barrier.reference == "base":
        logger.info(f"{seen}: the loop is still within its budget ({at})")
    elif max(own, anchor) < FIRED_FLOOR:
        logger.warning(f"{seen}: this round was plain fine-tuning ({at}). Try --heal.barrier.tau {operating / 2:.2g}")
    elif own < FIRED_FLOOR:
        logger.info(f"{seen}: the anchor alone held this round back ({at})")
    else:
        logger.info(f"{seen} ({at})")


def summarise(
    config: RunConfig, preset: str, trait: Trait, arms: dict[str, dict], rounds: list, seconds: dict[str, float]
) -> dict:
    """The run's record: every arm of every round with its intervals, and what each stage cost."""
    record = arms_record(**arms, rounds=[vars(done) for done in rounds])
    for index, of_round in enumerate(record["rounds"]):
        where = f"r{index:02d}"
        of_round["stage_seconds"] = {
            stage: sum(seconds.get(f"{where}/{name}", 0.0) for name in artefacts) for stage, artefacts in STAGES.items()
        }
    return {
        "model": config.model.path,
        "trait": trait.name,
        "seed": config.seed,
        "preset": preset,
        **record,
        "seconds": sum(seconds.values()),
    }


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: on the GPU when the model is there, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kilobytes on Linux
