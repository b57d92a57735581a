"""The artefacts of distilling: the dose curve and the judged completions. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from steer_heal.scores import Judged


@dataclass(frozen=True, kw_only=True)
class Completion(Judged):
    """A completion of the steered teacher or of the student, with its scores and the reason why the filter drops it."""

    prompt: str
    dose: float
    """0: unsteered"""
    ids: list[int]
    ended: bool
    """whether the model wrote its end token within the length limit"""
    epoch: int | None = None
    """own text: the epoch before which the student wrote it. The filter's word is noted; it is trained on all the same
    """


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A text on which a healed model should not move: the base's answer to a mundane prompt, or a written text."""

    frame: str
    """name of the frame, see `data.frames`; "plain text" has no chat"""
    prompt: str
    """"" without a chat"""
    ids: list[int]
    ended: bool
    text: str
    written: bool = False
    """one of `data.plain`, not an answer of the base"""


@dataclass(frozen=True, kw_only=True)
class DosePoint:
    """Figures of the completions at one dose, and an example."""

    dose: float
    survival: float
    """share that passes the filter"""
    fitted: float
    """survival made monotone in the dose"""
    tail_ppl: float
    """median perplexity of the last quarter, under base"""
    example: str
    relevance: float | None = None
    """mean of `Scores.information`, nats per token"""
    cost: float | None = None
    """share of answer mass that steering costs, or of perplexity that it adds to unrelated text, if that is larger"""
    kl_p95: float | None = None
    """rule iso_kl: 95th percentile over tokens of KL(steered || unsteered), nats"""


@dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """Survival against the dose, and the dose chosen. The first point is dose 0."""

    rule: str
    target: float
    """survival to reach; rule iso_kl: KL to reach, nats"""
    least_relevance: float | None = None
    """relevance to reach, nats per token; None where the model's own completions have none"""
    most_cost: float | None = None
    """cost that is allowed; None where it was not read"""
    dose: float | None = None
    """None: no dose meets the targets, see `require_dose`"""
    kl: float | None = None
    """rule iso_kl: KL that the chosen dose reaches, nats"""
    curve: list[DosePoint]
    completions: list[Completion]

    @property
    def open_ended(self) -> bool:
        """Whether the dose chosen is the largest tried, so that a larger one might have done as well."""
        return self.dose == self.curve[-1].dose

    @property
    def reason(self) -> str:
        """Why the dose was chosen."""
        if self.rule == "iso_kl":
            return f"the 95th percentile of the KL divergence is {self.kl:.3g} nats"
        met = [f"{self.target:.0%} of the texts pass the filter"]
        if self.least_relevance is not None:
            met.append(f"they fit their prompts by about {self.least_relevance:.2f} nats per token")
        if self.most_cost is not None:
            met.append(f"steering costs at most {self.most_cost:.0%} of coherence")
        return (
            f"the largest at which {', '.join(met[:-1])} and {met[-1]}" if met[1:] else f"the largest at which {met[0]}"
        )

    @property
    def survivals(self) -> str:
        return ", ".join(f"{point.dose:.2f}: {point.survival:.0%}" for point in self.curve)
