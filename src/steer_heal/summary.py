"""What a run comes to: the table after each round, summary.json, the warnings."""

from __future__ import annotations

import resource
import statistics

import polars as pl
import torch
from loguru import logger

from steer_heal.bootstrap import fired_shares, trait_over
from steer_heal.config import FIRED_FLOOR, HealConfig, RunConfig
from steer_heal.data import Trait
from steer_heal.steer import cosine

ARM_KEYS = ("trait_nats", "trait_ci", "answer_mass", "demo_kept_share", "demo_ppl", "neutral_ppl")
MORE_ARM_KEYS = ("yes_no_nats", "yes_no_ci", "answer_mass_ci")


def arm_table(*arms: dict) -> str:
    """One row an arm, for the terminal."""
    base = arms[0]
    frame = pl.DataFrame(
        {
            "arm": [arm["arm"] + (f" @{arm['dose']:.2f}" if arm["dose"] else "") for arm in arms],
            "trait nats/token": [f"{arm['trait_nats']:+.3f}" for arm in arms],
            "95% interval": ["[{:+.3f}, {:+.3f}]".format(*arm["trait_ci"]) for arm in arms],
            "over base": [_over(arm, base) for arm in arms],
            "answer mass": [f"{arm['answer_mass']:.3f}" for arm in arms],
            "coherent": [f"{arm['demo_kept_share']:.0%}" for arm in arms],
            "neutral ppl": [f"{arm['neutral_ppl']:.2f}" for arm in arms],
        }
    )
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120):
        return str(frame)


def _over(arm: dict, base: dict) -> str:
    if arm is base:
        return ""
    change = trait_over(arm, base)
    low, high = change["trait_over_base_ci"]
    return f"{change['trait_over_base']:+.3f} ±{(high - low) / 2:.3f}"


def demo_rows(**arms: dict) -> list[dict]:
    """The free-text answers of several arms, one row a prompt."""
    first = next(iter(arms.values()))
    return [
        {"prompt": demo["prompt"], **{name: arm["demos"][i]["text"] for name, arm in arms.items()}}
        for i, demo in enumerate(first["demos"])
    ]


def barrier_warning(records: list[dict], config: HealConfig) -> None:
    """Say loudly that the barrier was off, with the tau to try: nobody notices a constraint that never binds."""
    if config.reg == "nll":
        return
    operating = statistics.median(r["divergence"] for r in records)
    own, anchor = fired_shares(records).values()
    seen = f"the barrier fired on {own:.0%} of the steps" + f", its anchor on {anchor:.0%}" * (config.anchor != "none")
    at = f"operating {config.agg} of {config.reg} {operating:.3g} nats, tau {records[0]['tau']:.3g}"
    if max(own, anchor) < FIRED_FLOOR:
        logger.warning(f"{seen}: this round was plain fine-tuning ({at}). Try --heal.tau {operating / 2:.2g}")
    elif own < FIRED_FLOOR:
        logger.info(f"{seen}: the anchor alone held this round back ({at})")
    else:
        logger.info(f"{seen} ({at})")


def arm_summary(arm: dict, base: dict) -> dict:
    return {key: arm[key] for key in ARM_KEYS + MORE_ARM_KEYS} | trait_over(arm, base)


def summarise(
    config: RunConfig,
    preset: str,
    trait: Trait,
    base: dict,
    prompted: dict,
    rounds: list[dict],
    seconds: dict[str, float],
) -> dict:
    """The run's record: every arm of every round with its intervals, and what each stage cost."""
    return {
        "model": config.model.path,
        "trait": trait.name,
        "seed": config.seed,
        "preset": preset,
        "base": arm_summary(base, base),
        "prompted": arm_summary(prompted, base),
        "rounds": [
            {
                **_round_summary(i, r, base, seconds),
                "layers": r["layers"],
                "cos_first_vector": cosine(r["vector"], rounds[0]["vector"]),
            }
            for i, r in enumerate(rounds)
        ],
        "seconds": sum(seconds.values()),
    }


def _round_summary(index: int, parts: dict, base: dict, seconds: dict[str, float]) -> dict:
    where = f"r{index:02d}"
    records = parts["heal"]
    return {
        "round": index,
        "dose": parts["dose"]["dose"],
        "generated": len(parts["completions"]),
        "kept": sum(not c["dropped"] for c in parts["completions"]),
        "steered": arm_summary(parts["steered"], base),
        "healed": arm_summary(parts["healed"], base),
        **fired_shares(records),
        "tau_nats": records[0]["tau"],
        "operating_kl_nats": statistics.median(r["divergence"] for r in records),
        "val_nll": records[-1].get("val_nll"),
        "stage_seconds": {
            "extract": seconds[f"{where}/vector"],
            "dose": seconds[f"{where}/dose.json"],
            "distil": seconds[f"{where}/completions.jsonl"],
            "heal": seconds[f"{where}/adapter"],
            "eval": seconds[f"{where}/steered.json"] + seconds[f"{where}/healed.json"],
        },
    }


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: on the GPU when the model is there, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
