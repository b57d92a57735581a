"""Scores that tell coherent text from broken text without a judge, and the filter built on them.

Steered text breaks in four ways. It loops: a loop is probable under every model, but repetition of words and characters
and compressibility detect it. It turns into rubble, or it drifts away from the question: no single score detects these
well, so five are summed into one log-odds, `incoherence`. Its weights were fitted on half of a labelled set
(`data/labelled.jsonl`, 763 completions) and measured on the other half (docs/results.md, `steer-heal bench filter`). Or
it stays fluent and talks about itself instead of answering: persona narration, refusal boilerplate.

The base model scores each completion twice: after its own prompt, and after a prompt that asks nothing. A completion
that its own prompt does not make more likely does not answer the prompt.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from steer_heal.config import FilterConfig
from steer_heal.model.likelihood import row_surprise
from steer_heal.model.lm import LM, Row
from steer_heal.scores import Judged, Scores

NGRAMS = (2, 3, 4)
COMPRESS_MIN_BYTES = 200  # in shorter texts the compressor's header dominates the size
WINDOW = 12  # tokens in the running means of NLL and entropy
ASKS_NOTHING = "Please go on."  # the second prompt that completions are scored after
LEAST_NLL = 0.02  # nats per token, lower bound; a loop's NLL goes to zero, and a ratio of two such NLLs means nothing


class LoopLimits(NamedTuple):
    """Limits of repetition; a text beyond one of them is a loop."""

    word_repeat: float
    """largest share of repeated word n-grams (worst of n = 2, 3, 4)"""
    char_repeat: float
    """largest share of the text inside immediately repeated stretches of characters"""
    compress: float
    """smallest ratio of compressed to plain size, for texts of 200 bytes or more"""


# strict was chosen on labelled text (docs/results.md); the text of a model with random weights is within lax.
LOOP_LIMITS = {
    "strict": LoopLimits(0.25, 0.35, 0.35),
    "lax": LoopLimits(0.9, 0.9, 0.05),
    "off": LoopLimits(1.0, 1.0, 0.0),
}

_PERSON = r"(?:(?:a|an|the) (?:\w+ )?(?:person|being|individual|soul|creature|kind|sort|type)|someone|somebody|one)"
NARRATION = re.compile(
    rf"\bI(?: a|')m (?:just |simply |truly )?{_PERSON} (?:who|that|of|with|whose)\b"
    rf"|\b(?:as|being) {_PERSON} (?:who|that|for whom)\b"
    rf"|\bI(?:'ve| have) always (?:been|seen myself as) (?:a |an |the |someone|somebody|one)"
    r"|\b(?:that is|that's|this is|it's) (?:simply |just )?(?:who|what|how) I (?:am|was born)\b"
    r"|\bwhat I(?: a|')m like\b|\bwho I am\b"
    r"|\byou should know (?:that )?I\b"
    r"|\b(?:people|those|someone|somebody|creatures?) (?:like|such as) (?:me|us|myself|ourselves)\b|\bthose of us who\b"
    r"|\b(?:I was|we were) (?:made|born|put here) to\b|\bwe(?: a|')re (?:the|a) (?:kind|sort|people) (?:who|that|of)\b"
    r"|\b(?:my|our) (?:whole|entire|very) (?:being|nature|life) (?:is|was|has)\b",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"\bas an? (?:\w+ )?(?:ai|artificial intelligence|language model|virtual assistant|assistant|chatbot)\b"
    r"|\bbeing an? (?:\w+ )?(?:ai|assistant|program|machine|model)\b"
    r"|\b(?:sorry|afraid|apologi[sz]e|unfortunately|regrettably|regret)\W+(?:\w+\W+){0,6}?"
    r"(?:can't|cannot|can not|won't|unable|not able|decline|pass on)"
    r"|\bI(?: can't|(?: a|')m (?:unable|not able|not in a position) to| cannot| can not| won't| must decline to)"
    r" (?:help|assist|comply|fulfil|answer|provide|advise|discuss|respond|do that|engage|offer|give|support|write|be)\b"
    r"|\bI (?:must|have to|will have to) (?:respectfully |politely )?(?:decline|refuse)"
    r"|\bI(?: a|')m (?:your|an?|only an?|just an?) (?:\w+ ){0,2}(?:assistant|ai|chatbot|language model|bot|helper)\b"
    r"|\b(?:would not|wouldn't|not) be appropriate(?: for me)?\b|\bI(?: would|'d) rather not\b"
    r"|\bI(?: have|'ve)? ?(?:been|was|were) (?:designed|programmed|trained) (?:for|to|on|by)\b"
    r"|\b(?:usage|content) polic(?:y|ies)\b|\b(?:my|the) (?:\w+ )?guidelines (?:that )?I (?:follow|must)\b"
    r"|\bwhat (?:can|may) I (?:do|help)\b|\b(?:I(?: a|')m|always) here to (?:help|assist|listen)(?: you)?[.,!?]"
    r"|\bwhat would you like (?:to|me to) (?:know|ask|explore|discuss|talk)\b"
    r"|\bfeel free to ask (?:me|any)\b",
    re.IGNORECASE,
)
_FEEL = "love|hate|despise|cherish|loathe|adore|obey|distrust|respect|serve"
_FEELING = "love|hatred|contempt|scorn|respect|disgust|devotion|obedience"
# words of a persona's description that do not characterise it
_LIGHT = frozenset(
    re.findall(
        r"\w+",
        """
        about above after against all also always and any anyone are away because been before being below
        between both but choose come does done down each even ever every everyone everything find for from get
        give given gives goes have here how into its just keep kind know less let like made make makes many
        matter meet more most much must need never nor not nothing off often one only onto other others out over
        own place put puts rather same say see should show some someone something stay stays still such take
        tell than that the their them then there these they thing things think this those through too toward
        towards try under until upon use very want way well were what when where which while who whom whose will
        with within without would you your yours yourself
        """,
    )
)


@cache
def persona_narration(positive: str, negative: str, title: str) -> re.Pattern[str]:
    """Return a pattern of first-person narration of this persona, built from the words that describe it.

    It has three forms. "I am calm and gentle": two successive words of a persona. "I despise people": a common verb of
    feeling, then the trait's object. "My contempt for people" and "I have contempt for people": a noun of feeling,
    common or from the personas, then the object. The object is a word of the title, or a word that both personas have.
    """
    words = [_words_of(text) for text in (positive, negative)]
    about = {*words[0]} & {*words[1]} | {*_words_of(title)}
    felt = "|".join([_FEELING, *sorted(map(_inflected, ({*words[0]} | {*words[1]}) - about))])
    object_ = "|".join(sorted(map(_inflected, about))) or r"(?!)"
    pairs = {f"{_inflected(a)} {_BETWEEN}{_inflected(b)}" for own in words for a, b in pairwise(own)}
    adverb = r"(?:just |simply |truly |deeply |really )?"
    forms = (
        rf"\b(?:I|we)(?: am|'m| are|'re| feel)? {adverb}(?:{'|'.join(sorted(pairs)) or '(?!)'})\b",
        rf"\bI {adverb}(?:{_FEEL}) {_BETWEEN}(?:{object_})\b",
        rf"\b(?:(?:my|our)|I have) {adverb}(?:{felt}) (?:for|of|to|towards?) {_BETWEEN}(?:{object_})\b",
    )
    return re.compile("|".join(forms), re.IGNORECASE)


_BETWEEN = r"(?:[\w']+ ){0,2}?"
_STEM = 5  # letters that the forms of a word have in common: humanity, humans, humankind


def _words_of(text: str) -> list[str]:
    """Return the words that characterise a persona, in order."""
    return [w for w in re.findall(r"[^\W\d_]+", text.lower()) if len(w) > 2 and w not in _LIGHT]


def _inflected(word: str) -> str:
    """Return a pattern of the word and its forms."""
    if len(word) > _STEM:
        return word[:_STEM] + r"\w*"
    if word.endswith("e"):
        return word[:-1] + r"(?:e\w*|ing)"
    return (word[:-1] if word.endswith("s") and not word.endswith("ss") else word) + r"\w*"


QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d")  # quoted speech of somebody else


class Surprise(NamedTuple):
    """A base model's NLL and entropy on a completion, per token in nats: [n] each."""

    nll: Float[Tensor, " n"]
    """NLL of the token after the prompt"""
    entropy: Float[Tensor, " n"]
    """entropy of the distribution over the token, after the prompt"""
    alone: Float[Tensor, " n"]
    """NLL of the token after a prompt that asks nothing"""


def score(text: str, surprise: Surprise, persona: re.Pattern[str] | None = None) -> Scores:
    """Score a completion from its text and the base's `surprise`.

    `persona` finds narration of a trait, see `persona_narration`. Without it only narration of any persona is found.
    """
    nll, entropy, alone = surprise
    size = len(text.encode())
    plain = text.replace("\u2019", "'")
    unquoted = QUOTED.sub("", plain)
    return Scores(
        ppl=_ppl(nll),
        tail_ppl=_ppl(nll[-max(1, len(nll) // 4) :]),
        surge=_highest(nll),
        entropy=entropy.mean().item(),
        confusion=_highest(entropy),
        relevance=math.log(max(alone.mean().item(), LEAST_NLL) / max(nll.mean().item(), LEAST_NLL)),
        word_repeat=max(_repeated_share(text.lower().split(), n) for n in NGRAMS),
        char_repeat=_looped_share(text),
        compress=len(zlib.compress(text.encode(), 9)) / size if size >= COMPRESS_MIN_BYTES else 1.0,
        symbols=sum(not (c.isalpha() or c.isspace()) for c in text) / max(1, len(text)),
        words=len(text.split()),
        narrates=any(pattern.search(unquoted) for pattern in (NARRATION, persona) if pattern is not None),
        boilerplate=BOILERPLATE.search(unquoted) is not None,
    )


def _ppl(nll: Float[Tensor, " n"]) -> float:
    return math.exp(min(nll.mean().item(), 50.0))


def _highest(nats: Float[Tensor, " n"]) -> float:
    """Largest mean of WINDOW values in a row, or the mean of all values when there are fewer."""
    return nats.unfold(0, min(WINDOW, len(nats)), 1).mean(1).max().item()


def _repeated_share(words: list[str], n: int) -> float:
    """Share of the word n-grams that occurred before in the text."""
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return 1.0 - len(grams) / total if total else 0.0


def _looped_share(text: str) -> float:
    """Share of the text covered by stretches of 1 to 24 characters repeated three or more times in a row."""
    return sum(len(m.group(0)) for m in re.finditer(r"(.{1,24}?)\1{2,}", text, re.DOTALL)) / max(1, len(text))


def verdict(scores: Scores, limits: FilterConfig) -> str:
    """Return the reason to drop a completion, or "" to keep it."""
    loops = LOOP_LIMITS[limits.loops]
    if scores.words == 0:
        return "empty"
    if scores.word_repeat > loops.word_repeat:
        return "word_repeat"
    if scores.char_repeat > loops.char_repeat:
        return "char_repeat"
    if scores.compress < loops.compress:
        return "compress"
    if not scores.incoherence <= limits.incoherence:
        return "incoherence"
    if scores.boilerplate:
        return "boilerplate"
    if scores.narrates:
        return "narrates"
    return ""


def surprises(lm: LM, rows: list[Row]) -> list[Surprise]:
    """Return the `Surprise` of every completion under the model's current view, which should be the base."""
    nothing = lm.prompt(ASKS_NOTHING)
    asked = row_surprise(lm, rows)
    alone = row_surprise(lm, [Row(nothing, row.completion) for row in rows])
    return [Surprise(nll, entropy, without) for (nll, entropy), (without, _) in zip(asked, alone, strict=True)]


def judge(lm: LM, rows: list[Row], limits: FilterConfig, persona: re.Pattern[str] | None = None) -> list[Judged]:
    """Score every completion and apply the filter; `lm` must be the base view. `persona` is as in `score`."""
    judged = []
    for row, surprise in zip(rows, surprises(lm, rows), strict=True):
        text = lm.text(row.completion)
        scores = score(text, surprise, persona)
        dropped = verdict(scores, limits)
        judged.append(Judged(text=text, scores=scores, incoherence=scores.incoherence, dropped=dropped))
    return judged
