"""The filter's scores of a completion, and its decision. No torch: readers of finished runs use this too."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Log-odds of broken against coherent. Fitted on the tuning half under SmolLM2-135M by `steer-heal bench filter`.
WEIGHTS = {"relevance": -6.361, "confusion": 0.236, "entropy": 2.702, "word_repeat": 14.785, "symbols": 9.393}
BIAS = -9.367


LOOPS = ("word_repeat", "char_repeat", "compress")  # reasons for dropping a text that loops
STYLES = ("boilerplate", "narrates")  # reasons for dropping a text that is unwanted but not damaged


@dataclass(frozen=True)
class Scores:
    """The filter's scores of one completion."""

    ppl: float
    """perplexity under the pristine base"""
    tail_ppl: float
    """perplexity of the last quarter"""
    surge: float
    """largest mean NLL of WINDOW tokens in a row, nats"""
    entropy: float
    """mean predictive entropy, nats"""
    confusion: float
    """largest mean predictive entropy of WINDOW tokens in a row, nats"""
    relevance: float
    """log of the ratio of mean NLL after a prompt that asks nothing to mean NLL after the completion's own prompt"""
    word_repeat: float
    """share of repeated word n-grams, worst of n = 2, 3, 4"""
    char_repeat: float
    """share of the text inside stretches of characters repeated three or more times in a row"""
    compress: float
    """compressed over plain size; 1 for short texts"""
    symbols: float
    """share of characters that are neither letters nor space"""
    words: int
    narrates: bool
    boilerplate: bool

    @property
    def information(self) -> float:
        """Nats per token that the completion is likelier after its own prompt than after one that asks nothing."""
        return math.log(self.ppl) * (math.exp(self.relevance) - 1)

    @property
    def incoherence(self) -> float:
        """Log-odds that the text is broken rather than coherent."""
        return BIAS + sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A completion with its scores and the filter's decision."""

    text: str
    scores: Scores
    incoherence: float
    """log-odds of broken text, by the weights when the run was made"""
    dropped: str
    """the reason why it is dropped, "" when it is kept"""
