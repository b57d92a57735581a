"""The artefacts of distilling: the dose curve and the judged completions. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from steer_heal.scores import Judged


@dataclass(frozen=True, kw_only=True)
class Completion(Judged):
    """A completion of the steered teacher, with its scores and the reason why it was dropped."""

    prompt: str
    dose: float
    ids: list[int]
    ended: bool
    """whether the model wrote its end token within the length limit"""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """A completion of a mundane prompt by the base."""

    prompt: str
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
    kl_p95: float | None = None
    """rule iso_kl: 95th percentile over tokens of KL(steered || unsteered), nats"""


@dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """Survival against the dose, and the dose chosen. The first point is dose 0."""

    rule: str
    target: float
    """survival to reach; rule iso_kl: KL to reach, nats"""
    dose: float | None = None
    """None: no dose meets the target, see `require_dose`"""
    kl: float | None = None
    """rule iso_kl: KL that the chosen dose reaches, nats"""
    curve: list[DosePoint]
    completions: list[Completion]

    @property
    def survivals(self) -> str:
        return ", ".join(f"{point.dose:.2f}: {point.survival:.0%}" for point in self.curve)
