"""What a round comes to, in a word, and whether the instruments that say so can be believed.

numpy alone: a report draws the same verdicts from a run's folder, without a model.
"""

from __future__ import annotations

import math

import numpy as np

from steer_heal.data import FOUNDATIONS
from steer_heal.eval.intervals import correlation, interval, paired, reliability, trait_over

# Absolute bounds come first: beyond them a model is broken whatever its ratios say.
LEAST = {"coherent_share": ("coherent share", 0.5), "answer_mass": ("answer mass", 0.05)}
HIGHEST_NEUTRAL_PPL = 200.0
COHERENCE = (  # then damage relative to base: key, name, bound of value / base, side of it that is damage
    ("coherent_share", "coherent share", 0.95, -1),
    ("answer_mass", "answer mass", 0.85, -1),
    ("neutral_ppl", "neutral perplexity", 1.05, +1),
)
CHANCE = 1 / len(FOUNDATIONS)


def verdict(base: dict, steered: dict, healed: dict, valid: bool) -> dict[str, str]:
    """{"word", "why"} of a healed student.

    In this order: broken (beyond an absolute bound of coherence, or damaged relative to base), unreadable (the
    instrument is not valid on this model), undone (steering moved the trait and healing lost it), unmoved (neither
    did), broad (an off-target trait moved as far as this one on the contrast probes: one unit for both), moved.

    A trait that is read on yes/no questions may not move on the contrast probes. Then it is not called broad: there is
    no unit in which to compare it with the others.
    """
    if damage := damages(healed, base):
        return {"word": "broken", "why": "; ".join(damage)}
    if not valid:
        return {"word": "unreadable", "why": "the two personas do not move this instrument apart on this model"}
    change, (low, high) = trait_over(healed, base).values()
    seen = f"{change:+.3f} nats over base [{low:+.3f}, {high:+.3f}]"
    if low <= 0:
        before, (steered_low, _) = trait_over(steered, base).values()
        if steered_low > 0:
            return {"word": "undone", "why": f"steering moved the trait by {before:+.3f}, the student stands {seen}"}
        return {"word": "unmoved", "why": f"the student stands {seen}, steering moved it by {before:+.3f}"}
    own = _moves(healed, base, "contrast")
    wide = [(name, move) for name, move in off_target_moves(healed, base).items() if own and abs(move) >= abs(own)]
    if wide:
        also = ", ".join(f"{name} {move:+.3f}" for name, move in wide)
        return {"word": "broad", "why": f"the trait stands {seen}, but others moved as far: {also}"}
    if not any(key.startswith("off:") for key in healed["items"]):
        others = "other traits were not read"
    elif not own:
        others = "contrast probes do not show it, so off-target traits, which they measure, were not compared"
    else:
        others = "no off-target trait moved as far"
    return {"word": "moved", "why": f"the trait stands {seen}, coherence held, {others}"}


def damages(arm: dict, base: dict) -> list[str]:
    """What is wrong with an arm's coherence, in words; absolute bounds first and alone."""
    watched = (arm["trait_nats"], arm["answer_mass"], arm["coherent_share"], arm["neutral_ppl"])
    if not all(map(math.isfinite, watched)):
        return ["its scores are not finite"]
    found = [
        f"{name} {arm[key]:.3g}, below the floor of {least}" for key, (name, least) in LEAST.items() if arm[key] < least
    ]
    if arm["neutral_ppl"] > HIGHEST_NEUTRAL_PPL:
        found.append(f"neutral perplexity {arm['neutral_ppl']:.0f}, above {HIGHEST_NEUTRAL_PPL:.0f}")
    return found or [
        f"{name} {arm[key] / base[key]:.0%} of base"
        for key, name, bound, side in COHERENCE
        if side * arm[key] > side * bound * base[key]
    ]


def off_target_moves(arm: dict, base: dict) -> dict[str, float]:
    """Changes over base, nats per token, of the off-target traits whose interval leaves out zero."""
    moves = {key.removeprefix("off:"): _moves(arm, base, key) for key in arm["items"] if key.startswith("off:")}
    return {name: move for name, move in moves.items() if move}


def _moves(arm: dict, base: dict, key: str) -> float:
    """Mean change over base on these items, 0 where its interval holds zero."""
    change = paired(arm, base, key)
    low, high = interval(change)
    return 0.0 if low <= 0 <= high else float(change.mean())


def expressible(arms: list[dict], instrument: str) -> bool:
    """Whether the model expresses the trait on an instrument: the positive persona scores above the negative one by
    more than the interval. `arms` begins with base, prompted and negative."""
    return interval(paired(arms[1], arms[2], instrument))[0] > 0


def validity(arms: list[dict]) -> list[dict]:
    """One row an instrument: does this model express the trait on it, and does the instrument agree with itself.

    `arms` begins with base, prompted (positive persona) and negative (negative persona). "valid": the positive persona
    scores above the negative one by more than its 95% interval. "halves": that difference on every other probe.
    "reliability": split-half, over all arms. "agreement": correlation with the other instrument, over all arms. The
    profile is valid when base names the breached foundation more often than by chance.
    """
    _, positive, negative = arms[:3]
    rows = []
    for key, other in (("contrast", "yes_no"), ("yes_no", "contrast")):
        change = paired(positive, negative, key)
        ci = interval(change)
        scores = {name: np.array([arm["items"][name] for arm in arms]) for name in (key, other)}
        rows.append(
            {
                "instrument": key,
                "positive_over_negative": float(change.mean()),
                "ci": ci,
                "valid": ci[0] > 0,
                "halves": [float(change[half::2].mean()) for half in (0, 1)],
                "reliability": reliability(scores[key]),
                "agreement": correlation(scores[key].mean(1), scores[other].mean(1)),
                "arms": len(arms),
            }
        )
    read = [arm for arm in arms if "profile" in arm["items"]]
    if read:
        rows.append(_profile_validity(read))
    return rows


def _profile_validity(arms: list[dict]) -> dict:
    """The profile's row; its score is care against authority, log of the ratio of their probabilities, a scene."""
    scores = np.array([care_over_authority(arm) for arm in arms])
    change = scores[1] - scores[2]
    top1, ci = arms[0]["profile"]["top1"], arms[0]["profile"]["top1_ci"]
    return {
        "instrument": "profile",
        "positive_over_negative": float(change.mean()),
        "ci": interval(change),
        "valid": ci[0] > CHANCE,
        "halves": [float(change[half::2].mean()) for half in (0, 1)],
        "reliability": reliability(scores),
        "arms": len(arms),
        "top1": top1,
        "top1_ci": ci,
    }


def care_over_authority(arm: dict) -> np.ndarray:
    """Nats by which a scene is seen as a matter of care rather than of authority, one a scene."""
    p = np.array(arm["items"]["profile"])
    names = list(FOUNDATIONS)
    return np.log(p[:, names.index("care")]) - np.log(p[:, names.index("authority")])
