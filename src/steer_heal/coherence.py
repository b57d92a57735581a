"""Scores that tell coherent text from broken text without a judge, and the filter built on them.

Three ways in which steered text breaks, and what sees each: it drifts into word salad (perplexity of the *tail* under
the pristine base: the collapse comes mid-completion, so the whole text's perplexity dilutes it); it falls into a loop,
which is cheap for every model (repetition of words and characters, compressibility); or it stays fluent and talks about
itself instead of answering (persona narration, refusal boilerplate).
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

from steer_heal.config import FilterConfig
from steer_heal.lm import LM, Row, row_nll

NGRAMS = (2, 3, 4)
COMPRESS_MIN_BYTES = 200  # below this the compressor's own header decides

NARRATION = re.compile(
    r"\bI(?: a|')m (?:a|the|an?\s\w+) (?:person|someone|somebody|being|individual|soul)\b"
    r"|\bI(?: a|')m (?:someone|somebody|one) who\b"
    r"|\bas (?:a person|someone|somebody|one) who (?:love|hate|despise|value|put|obey|care)",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|language model|large language model|virtual assistant)\b"
    r"|\bI(?: a|')m (?:sorry|afraid),? but I (?:can't|cannot|can not|am unable|am not able)"
    r"|\bI (?:can't|cannot) (?:help|assist|comply|fulfil|answer)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scores:
    """What the filter sees of one completion. Perplexities under the pristine base; the rest from the text alone."""

    ppl: float
    tail_ppl: float
    word_repeat: float
    char_repeat: float
    compress: float
    words: int
    narrates: bool
    boilerplate: bool


def score(text: str, nll: Float[Tensor, "n"]) -> Scores:
    """Scores of a completion from its text and the base's NLL of each of its tokens (nats)."""
    tail = nll[-max(1, len(nll) // 4) :]
    size = len(text.encode())
    plain = text.replace("\u2019", "'")
    return Scores(
        ppl=math.exp(min(nll.mean().item(), 50.0)),
        tail_ppl=math.exp(min(tail.mean().item(), 50.0)),
        word_repeat=max(_repeated_share(text.lower().split(), n) for n in NGRAMS),
        char_repeat=_looped_share(text),
        compress=len(zlib.compress(text.encode(), 9)) / size if size >= COMPRESS_MIN_BYTES else 1.0,
        words=len(text.split()),
        narrates=NARRATION.search(plain) is not None,
        boilerplate=BOILERPLATE.search(plain) is not None,
    )


def _repeated_share(words: list[str], n: int) -> float:
    """Share of the word n-grams that occurred before in the text."""
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return 1.0 - len(grams) / total if total else 0.0


def _looped_share(text: str) -> float:
    """Share of the text covered by a stretch of 1 to 24 characters said three or more times in a row."""
    return sum(len(m.group(0)) for m in re.finditer(r"(.{1,24}?)\1{2,}", text, re.DOTALL)) / max(1, len(text))


def verdict(scores: Scores, limits: FilterConfig) -> str:
    """Why a completion is dropped, or "" when it is kept."""
    if scores.words < limits.min_words:
        return "empty"
    if scores.boilerplate:
        return "boilerplate"
    if scores.narrates:
        return "narrates"
    if scores.word_repeat > limits.word_repeat:
        return "word_repeat"
    if scores.char_repeat > limits.char_repeat:
        return "char_repeat"
    if scores.compress < limits.compress:
        return "compress"
    if not scores.tail_ppl <= limits.tail_ppl:
        return "tail_ppl"
    return ""


def judge(lm: LM, rows: list[Row], limits: FilterConfig, batch_size: int) -> list[dict]:
    """Text, scores and the reason it was dropped ("" when kept) of every completion; `lm` must be the base view."""
    judged = []
    for row, nll in zip(rows, row_nll(lm, rows, batch_size), strict=True):
        text = lm.text(row.completion)
        scores = score(text, nll)
        judged.append({"text": text, **asdict(scores), "dropped": verdict(scores, limits)})
    return judged
