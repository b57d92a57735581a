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
    """A text on which a healed model should not move: the base's answer to a mundane prompt, or plain text."""

    frame: str
    """name of the frame, see `data.frames`; plain text has no chat"""
    prompt: str
    """"" for plain text"""
    ids: list[int]
    ended: bool
    text: str


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
    dose: float | None = None
    """None: no dose meets the target, see `require_dose`"""
    kl: float | None = None
    """rule iso_kl: KL that the chosen dose reaches, nats"""
    curve: list[DosePoint]
    completions: list[Completion]

    @property
    def open_ended(self) -> bool:
        """Whether the dose chosen is the largest tried, so that a larger one might have done as well."""
        return self.dose == self.curve[-1].dose

    @property
    def survivals(self) -> str:
        return ", ".join(f"{point.dose:.2f}: {point.survival:.0%}" for point in self.curve)
