"""What a run's arms and rounds come to: the part of summary.json that follows from the artefacts.

No torch: a report on an unfinished run takes the same figures from the folder.
"""

from __future__ import annotations

import statistics

import numpy as np

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.intervals import interval, log_mean_over, paired, trait_over
from steer_heal.eval.opponents import coherence_cost
from steer_heal.eval.verdict import care_over_authority, expressible, validity, verdict

UNITS = {"contrast": "nats/token", "yes_no": "nats"}  # of a trait score, by instrument
NOT_SUMMED = ("arm", "instrument", "dose", "read", "items", "asked", "demos")


def arm_record(arm: dict, base: dict) -> dict:
    """Every measure of an arm with its interval, and how far each stands over base on the same items.

    "over_base" has the mean difference and its 95% interval for every kind of item that both were asked (log
    perplexities in nats), "profile_over_base" the change of each foundation in nats and of care against authority.
    """
    record = {key: value for key, value in arm.items() if key not in NOT_SUMMED} | trait_over(arm, base)
    record["over_base"] = over(arm, base)
    record["coherence_cost"] = coherence_cost(arm, base)
    if "profile" in arm["items"] and "profile" in base["items"]:
        paired(arm, base, "profile")
        p, p_base = (np.array(a["items"]["profile"]) for a in (arm, base))
        change = care_over_authority(arm) - care_over_authority(base)
        record["profile_over_base"] = {
            **{name: log_mean_over(p[:, i], p_base[:, i]) for i, name in enumerate(FOUNDATIONS)},
            "care_over_authority": {"nats": float(change.mean()), "ci": interval(change)},
        }
    return record


def arms_record(
    base: dict | None, prompted: dict | None, negative: dict | None, plain: list[dict], rounds: list[dict]
) -> dict:
    """Arms, rounds, validity of the instruments and verdicts; of an unfinished run, what is there so far.

    `plain` has the base plainly steered, dose by dose. A round has {"layers", "dose", "completions", "heal", "steered",
    "healed", "geometry"} and, where it was asked for, "equal_cost" and "equal_trait": see `opponents`.
    """
    unit = UNITS[base["instrument"]] if base else None
    named = {"base": base, "prompted": prompted, "negative": negative}
    record: dict = {"instrument": base and base["instrument"], "unit": unit} | {
        name: arm and arm_record(arm, base) for name, arm in named.items()
    }
    if negative is None:
        return record | {"validity": [], "plain": [], "rounds": []}
    record["validity"] = validity([base, prompted, negative, *(r[a] for r in rounds for a in ("steered", "healed"))])
    valid = expressible([base, prompted, negative], base["instrument"])
    record["plain"] = [arm_record(arm, base) | {"dose": arm["dose"]} for arm in plain]
    record["rounds"] = [round_record(index, parts, base, valid) for index, parts in enumerate(rounds)]
    return record


def round_record(index: int, parts: dict, base: dict, valid: bool) -> dict:
    heal = parts["heal"]
    record = {
        "round": index,
        "verdict": verdict(base, parts["steered"], parts["healed"], valid),
        "layers": parts["layers"],
        "dose": parts["dose"]["dose"],
        "generated": len(parts["completions"]),
        "kept": sum(not c["dropped"] for c in parts["completions"]),
        "steered": arm_record(parts["steered"], base),
        "healed": arm_record(parts["healed"], base),
        **fired_shares(heal),
        "tau_nats": heal[0]["tau"],
        "operating_kl_nats": statistics.median(r["divergence"] for r in heal),
        "val_objective": heal[-1].get("val_objective"),
        **parts["geometry"],
    }
    for name in ("equal_cost", "equal_trait"):
        if arm := parts.get(name):
            more = {key: arm[key] for key in ("dose", "reached") if key in arm}
            record[name] = arm_record(arm, base) | more | {"healed_over": over(parts["healed"], arm)}
    return record


def over(arm: dict, other: dict) -> dict:
    """How far one arm is above another, item by item, on what both were asked; log perplexities in nats."""
    common = [key for key in arm["items"] if key in other["items"] and key != "profile"]
    changes = {key: paired(arm, other, key) for key in common}
    return {key: {"mean": float(change.mean()), "ci": interval(change)} for key, change in changes.items()}


def fired_shares(records: list[dict]) -> dict[str, float]:
    """Shares of the steps on which the divergence was above tau, and the anchor's above its own."""
    return {
        "barrier_fired_share": sum(r["fired"] for r in records) / len(records),
        "anchor_fired_share": sum(r["anchor_fired"] for r in records) / len(records),
    }
