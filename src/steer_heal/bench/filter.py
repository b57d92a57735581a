"""Precision and recall of the filter on the labelled completions.

There are 763 answers, each labelled coherent, broken, narrates or refuses. Most were sampled from the steered
SmolLM2-135M at all doses. Three readers read them one by one and saw neither the dose nor a score. The others are hard
cases written by hand; those with source "unseen" are by someone who did not know the filter, those with source
"affect" are answers that gush: some never come to the question, some do. No prompt is in both the tuning half and the
held-out half. Scores that need a model are stored with each row, computed with SmolLM2-135M, so that the figures can be
checked without the model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import torch

from steer_heal import data
from steer_heal.coherence import Surprise, persona_narration, score, surprises, verdict
from steer_heal.config import FilterConfig
from steer_heal.model.lm import LM, Row
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS
from steer_heal.scores import WEIGHTS, Scores

MODEL_SCORES = ("ppl", "tail_ppl", "surge", "entropy", "confusion", "relevance")
FAULTS = ("loop", "soup", "salad", "thread", "affect")  # what broken text may be
CONTRASTED = ("coherent", "broken")  # narration and refusals are fluent; patterns find them, not the log-odds
SCORE_SIGNS = {  # a larger signed score is worse
    "incoherence": 1,
    "relevance": -1,
    "confusion": 1,
    "entropy": 1,
    "surge": 1,
    "ppl": 1,
    "tail_ppl": 1,
    "word_repeat": 1,
    "char_repeat": 1,
    "compress": -1,
    "symbols": 1,
}
RIDGE = 1.0  # on standardised scores; keeps chance among 300 rows from giving one score a large weight


def stored_scores(row: dict) -> Scores:
    """Return a labelled row's scores: those that need a model as stored, the others computed from the text."""
    nothing = torch.zeros(1)
    return replace(score(row["text"], Surprise(nothing, nothing, nothing), personas()), **row["scores"])


def measured_scores(lm: LM, rows: list[dict]) -> list[Scores]:
    """The scores of labelled rows under `lm`."""
    asked = [Row(lm.prompt(row["prompt"]), lm.answer(row["text"])) for row in rows]
    return [score(row["text"], s, personas()) for row, s in zip(rows, surprises(lm, asked), strict=True)]


@cache
def personas() -> re.Pattern[str]:
    """Return a pattern of the persona narration of all built-in traits; the labelled rows come from these traits."""
    traits = map(data.load_trait, data.BUILT_IN)
    return re.compile(
        "|".join(persona_narration(t.positive, t.negative, t.title).pattern for t in traits), re.IGNORECASE
    )


def precision_recall(rows: list[dict], scores: list[Scores], limits: FilterConfig) -> dict[str, dict]:
    """Measure how well the filter separates each fault from coherent text.

    A row is flagged when it is dropped for any reason. The group `all` holds every row that is not coherent. Returns
    {fault: {"rows", "precision", "recall"}}; the false alarms of precision are the flagged coherent rows.
    """
    flagged = [verdict(s, limits) != "" for s in scores]
    alarms = sum(flag for row, flag in zip(rows, flagged, strict=True) if row["label"] == "coherent")
    groups = {
        "all": lambda row: row["label"] != "coherent",
        "broken": lambda row: row["label"] == "broken",
        "narrates": lambda row: row["label"] == "narrates",
        "refuses": lambda row: row["label"] == "refuses",
        **{fault: lambda row, fault=fault: row["fault"] == fault for fault in FAULTS},
    }
    table = {"coherent": {"rows": sum(r["label"] == "coherent" for r in rows), "flagged": alarms}}
    for name, belongs in groups.items():
        caught = [flag for row, flag in zip(rows, flagged, strict=True) if belongs(row)]
        hits = sum(caught)
        table[name] = {
            "rows": len(caught),
            "recall": hits / max(1, len(caught)),
            "precision": hits / max(1, hits + alarms),
        }
    return table


def sweep(rows: list[dict], values: list[float]) -> list[dict]:
    """Precision and recall of broken against coherent text for every threshold on one score (higher is worse)."""
    pairs = sorted(
        ((v, row["label"] == "broken") for row, v in zip(rows, values, strict=True) if row["label"] in CONTRASTED),
        reverse=True,
    )
    broken, hits, curve = sum(b for _, b in pairs), 0, []
    for flagged, (value, is_broken) in enumerate(pairs, 1):
        hits += is_broken
        if flagged == len(pairs) or pairs[flagged][0] < value:
            curve.append({"threshold": value, "precision": hits / flagged, "recall": hits / broken})
    return curve


def operating_points(curve: list[dict]) -> dict[str, float]:
    """The best recall at a precision of 0.9 or more, and the best precision at a recall of 0.97 or more."""
    return {
        "recall_at_precision_0.90": max((p["recall"] for p in curve if p["precision"] >= 0.90), default=0.0),
        "precision_at_recall_0.97": max((p["precision"] for p in curve if p["recall"] >= 0.97), default=0.0),
    }


def fit(rows: list[dict], scores: list[Scores]) -> tuple[dict[str, float], float]:
    """Fit weights and bias of the log-odds of broken against coherent: ridge logistic regression on the rows given."""
    chosen = [(row, s) for row, s in zip(rows, scores, strict=True) if row["label"] in CONTRASTED]
    x = torch.tensor([[getattr(s, name) for name in WEIGHTS] for _, s in chosen], dtype=torch.float64)
    y = torch.tensor([row["label"] == "broken" for row, _ in chosen], dtype=torch.float64)
    mean, std = x.mean(0), x.std(0)
    z = torch.cat([(x - mean) / std, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    w = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(z @ w, y, reduction="sum")
        value = value + RIDGE / 2 * w[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    weight = w.detach()[:-1] / std
    bias = w.detach()[-1] - (weight * mean).sum()
    return dict(zip(WEIGHTS, weight.tolist(), strict=True)), bias.item()


def half(name: str) -> list[dict]:
    """The labelled rows of one half: "tune" or "held"."""
    return [row for row in data.labelled() if row["half"] == name]


def filter(preset: str) -> dict:
    """Compare the filter with the labels. Scores are under the preset's base model, weights as committed.

    Returns the held-out table, each score's best recall at precision 0.9 and precision at recall 0.97, the sweep of
    the log-odds, and the weights fitted on the tuning half under this model.
    """
    lm = load(PRESETS[preset].model)
    scores = {name: measured_scores(lm, half(name)) for name in ("tune", "held")}
    held = half("held")
    weights, bias = fit(half("tune"), scores["tune"])
    sweeps = {
        name: sweep(held, [sign * getattr(s, name) for s in scores["held"]]) for name, sign in SCORE_SIGNS.items()
    }
    return {
        "model": PRESETS[preset].model.path,
        "held_out": precision_recall(held, scores["held"], FilterConfig()),
        "scores": {name: operating_points(curve) for name, curve in sweeps.items()},
        "sweep": sweeps["incoherence"],
        "weights_of_tuning_half": weights,
        "bias_of_tuning_half": bias,
    }
