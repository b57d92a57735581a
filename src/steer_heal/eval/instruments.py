"""Instruments that measure the trait, coherence and the traits that should not move.

All are deterministic, read log-probabilities or greedy text, and compare arms (base, prompted, steered, healed) on the
same items.

* Contrast (primary): a question with two answers that differ in the trait alone; the score is the log-probability per
  token of the trait answer minus that of its opposite, in nats per token. It needs no instruction following, so it
  works from 135M parameters up.
* Whole answers (for styles that show in length or form): the same pairs, each answer scored by the sum over all of its
  tokens and its end, in nats per answer.
* Yes/no self-report (secondary): log-odds of yes against no times the question's polarity, in nats. The probability
  mass on the two answers measures coherence independently of the trait.
* Off target: contrast probes of traits that should not move, both far from and near to the target, in the same unit.
* Coherence: greedy demo answers judged like completions but with separate limits, perplexity of neutral text, plain
  questions with one right answer.
* Frames: answer mass, plain questions and neutral text where training did not look, see `data.frames`.
* Profile: see `foundations`. Refusals: see `refusals`. Relevance: see `relevance`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import numpy as np

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.coherence import judge, persona_narration, verdict
from steer_heal.config import EXTRA, EvalConfig, FilterConfig, UserError
from steer_heal.data import Contrast, Trait, YesNo, bystanders, canary, neutral, spread
from steer_heal.data.frames import HELD_OUT, USUAL, Frame
from steer_heal.eval.arms import Arm
from steer_heal.eval.catalogue import CATALOGUE, MASS, NEUTRAL, OFF_TARGET, RIGHT, WHOLE, in_frame
from steer_heal.eval.foundations import Reading, described, read_profile
from steer_heal.eval.intervals import Interval, interval
from steer_heal.eval.reading import ArmReading, Demo
from steer_heal.eval.refusals import read_refusals
from steer_heal.eval.relevance import relevance
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.decode import Decoded, decode
from steer_heal.model.likelihood import ended_log_probs, row_nll
from steer_heal.model.lm import LM, Row
from steer_heal.model.packing import packed
from steer_heal.scores import LOOPS, STYLES
from steer_heal.terminal import progress

CORE = ("contrast", "yes_no", "neutral", "demos")
YES = ("Yes", "yes", "YES", " Yes", " yes", " YES")
NO = ("No", "no", "NO", " No", " no", " NO")
SOME_TEXT = "Write a short text about anything."
YES_NO_FORM = "{question} Answer with one word, yes or no."


def instruments(config: EvalConfig, at_end: bool) -> tuple[str, ...]:
    """Return the instruments to read. `at_end` adds those of `ends_only`: for base, prompted and the last round."""
    left = {*config.leave_out} if at_end else {*config.leave_out, *config.ends_only}
    return CORE + tuple(name for name in EXTRA if name not in left)


def evaluate(
    student: Student,
    arm: Arm,
    trait: Trait,
    config: EvalConfig,
    which: Iterable[str] = CORE,
    on_read: Callable[[int], None] = lambda instruments: None,
) -> ArmReading:
    """Read instruments on one arm; return means with 95% intervals, the score of every item, the demo answers.

    "relevance" needs "demos" beside it; `with_relevance` adds it to an earlier reading.
    """
    items: dict[str, list[float]] = {}
    asked: dict[str, str] = {}
    which, demos, profile, scenes = tuple(which), None, None, None
    first = [name for name in which if name != "relevance"]
    with packed(student.lm) as lm:
        for name in first:
            with student.view(history=arm.history, now=arm.now):
                read = _read(lm, arm, trait, config, name)
            if name == "demos":
                with student.view(history=0.0, now=0.0):
                    demos = judged_demos(lm, trait, config, read)
                read = demo_items(demos)
            elif name == "profile":
                profile, scenes = described(read, config.profile), read.p.tolist()
                asked[name], read = fingerprint(read.scenes), {}
            for key, (scores, questions) in read.items():
                items[key], asked[key] = scores.tolist(), fingerprint(questions)
            on_read(1)
    found = {"arm": arm.name, "instrument": trait.instrument, "dose": arm.dose, "read": first}
    found |= {"items": items, "asked": asked, "demos": demos, "profile": profile, "scenes": scenes}
    reading = ArmReading(**found, **measures(trait.instrument, items))
    if first == list(which):
        return reading
    reading = with_relevance(student, reading, config)
    on_read(1)
    return reading


def with_relevance(student: Student, reading: ArmReading, config: EvalConfig) -> ArmReading:
    """Return the reading with the relevance of its demo answers added, read under the pristine base."""
    prompts = config.counts.relevance
    with packed(student.lm) as lm, student.view(history=0.0, now=0.0):
        relevant, information = relevance(lm, reading.demos, prompts)
    items = {"relevant": relevant.tolist(), "relevance": information.tolist()}
    same = fingerprint([str(prompts), *(demo.prompt for demo in reading.demos)])
    arm = {"arm": reading.arm, "instrument": reading.instrument, "dose": reading.dose, "read": ["relevance"]}
    arm |= {"items": items, "asked": dict.fromkeys(items, same)}
    return reading.joined(ArmReading(**arm, **measures(reading.instrument, items)))


Read = dict[str, tuple[np.ndarray, list[str]]]  # by kind of item: the scores and the questions


def _read(lm: LM, arm: Arm, trait: Trait, config: EvalConfig, name: str) -> Read | Reading | list[Decoded]:
    """Read one instrument under the model's current view. For demos, return the answers as token ids."""
    counts = config.counts
    match name:
        case "contrast":
            probes, whole = trait.contrast[: counts.contrast], trait.instrument == WHOLE.name
            found = whole_scores(lm, arm, probes) if whole else [contrast_scores(lm, arm, probes)]
            texts = pair_texts(probes)
            return {key: (trait.direction * one, texts) for key, one in zip((name, WHOLE.name), found, strict=False)}
        case "yes_no":
            asked = trait.questions[: counts.yes_no]
            log_odds, mass = yes_no_scores(lm, arm, asked)
            texts = [p.question for p in asked]
            about_trait = {name: (trait.direction * log_odds, texts)} if trait.yes_no else {}
            return about_trait | {"mass": (mass, texts)}
        case "neutral":
            return {"neutral_nll": (neutral_scores(lm, arm, counts.neutral), list(neutral()[: counts.neutral]))}
        case "off_target":
            found = bystanders(trait.name, counts.off_target)
            probes = tuple(probe for some in found.values() for probe in some)
            scores = np.split(contrast_scores(lm, arm, probes), np.cumsum([*map(len, found.values())])[:-1])
            named = zip(found.items(), scores, strict=True)
            return {f"{OFF_TARGET}{other}": (part, pair_texts(some)) for (other, some), part in named}
        case "canary":
            asked = spread(canary(), counts.canary)
            texts = [q["question"] for q in asked]
            right, log_odds = canary_scores(lm, arm, asked)
            return {name: (right, texts), "canary_log_odds": (log_odds, texts)}
        case "profile":
            return read_profile(lm, arm, config)
        case "frames":
            framed = [framed_scores(lm, arm, trait, counts.framed, frame) for frame in HELD_OUT]
            return {key: read for found in framed for key, read in found.items()}
        case "refusals":
            return read_refusals(lm, arm, counts.refusals)
        case "demos":
            prompts = [lm.prompt(p, arm.system) for p in trait.demo_prompts[: counts.demos]]
            dosed = arm.steering(len(prompts))
            return decode(lm, prompts, trait.answer_limit(counts.demo_tokens), dosed)


def pair_texts(probes: tuple[Contrast, ...]) -> list[str]:
    return [f"{p.question}|{p.trait}|{p.opposite}" for p in probes]


def measures(instrument: str, items: dict[str, list[float]]) -> dict[str, float | Interval]:
    """Return the means of the items read, with 95% intervals; the trait's are those of `instrument`."""
    out = {}
    for one in (one for one in CATALOGUE if one.name in items):
        scores = np.array(items[one.name])
        out[one.measure] = one.mean(items[one.name])
        if not one.log:
            out[one.interval] = interval(scores)
        if one.name == instrument:
            out |= {"trait_nats": out[one.measure], "trait_ci": out[one.interval]}
    return out


def contrast_scores(lm: LM, arm: Arm, probes: tuple[Contrast, ...], frame: Frame = USUAL) -> np.ndarray:
    """Log-probability per token of the trait answer minus its opposite, nats per token, one per probe."""
    prompts = [lm.prompt(p.question, arm.system, frame) for p in probes]
    answers = [[lm.answer(frame.continued(text), frame.begun) for text in (p.trait, p.opposite)] for p in probes]
    scored = choice_log_probs(lm, prompts, answers, arm.steering(len(probes)))
    per_token = np.array([[answer.double().mean().item() for answer in pair] for pair in scored])
    return per_token[:, 0] - per_token[:, 1]


def whole_scores(lm: LM, arm: Arm, probes: tuple[Contrast, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(contrast in nats per token, the same of whole answers in nats per answer), one of each per probe.

    A whole answer's log-probability is summed over its tokens and its end. Raises UserError for a model without one.
    """
    if not lm.end_tokens:
        raise UserError(f"model {lm.name!r} has no end token: whole answers cannot be scored, measure it by contrast")
    rows = [Row(lm.prompt(p.question, arm.system), lm.answer(text)) for p in probes for text in (p.trait, p.opposite)]
    scored = [answer.double() for answer in ended_log_probs(lm, rows, arm.steering(len(rows)))]
    both = np.array([[answer[:-1].mean().item(), answer.sum().item()] for answer in scored])
    per_token, whole = (both[0::2] - both[1::2]).T
    return per_token, whole


def yes_no_scores(lm: LM, arm: Arm, probes: tuple[YesNo, ...], frame: Frame = USUAL) -> tuple[np.ndarray, np.ndarray]:
    """(polarity * log-odds of yes in nats, probability mass on yes and no), one of each per probe.

    An answer's probability is the sum over its spellings. Each spelling is scored by all of its tokens.
    """
    prompts = [lm.prompt(YES_NO_FORM.format(question=p.question), arm.system, frame) for p in probes]
    spelled = [lm.template.spellings(word, frame.begun) for word in (YES, NO)]
    either = [[*spelled[0], *spelled[1]]] * len(prompts)
    scored = choice_log_probs(lm, prompts, either, arm.steering(len(prompts)))
    log_p = np.array([[answer.double().sum().item() for answer in options] for options in scored])
    with np.errstate(invalid="ignore"):  # a broken model gives NaN, which the verdict reports
        yes, no = (np.logaddexp.reduce(part, axis=1) for part in np.split(log_p, [len(spelled[0])], axis=1))
    polarity = np.array([1.0 if p.trait_answer == "yes" else -1.0 for p in probes])
    return polarity * (yes - no), np.exp(yes) + np.exp(no)


def framed_scores(lm: LM, arm: Arm, trait: Trait, count: int, frame: Frame) -> Read:
    """Answer mass, plain questions and neutral text in a frame that neither training nor its anchor has.

    The neutral text is what the assistant writes, after a request for some text.
    """
    asked, questions, texts = trait.questions[:count], spread(canary(), 2 * count), neutral()[:count]
    _, mass = yes_no_scores(lm, arm, asked, frame)
    right, _ = canary_scores(lm, arm, questions, frame)
    prompt = lm.prompt(SOME_TEXT, arm.system, frame)
    rows = [Row(prompt, lm.answer(text, frame.begun)) for text in texts]
    nll = np.array([row.double().mean().item() for row in row_nll(lm, rows, arm.steering(len(rows)))])
    return {
        in_frame(frame.name, MASS): (mass, [p.question for p in asked]),
        in_frame(frame.name, RIGHT): (right, [q["question"] for q in questions]),
        in_frame(frame.name, NEUTRAL): (nll, list(texts)),
    }


def neutral_scores(lm: LM, arm: Arm, texts: int) -> np.ndarray:
    """Mean NLL per token of each neutral text after its first token, in nats; plain text without a chat template."""
    rows = neutral_rows(lm, texts)
    nll = row_nll(lm, rows, arm.steering(len(rows)))
    return np.array([row.double().mean().item() for row in nll])


def neutral_rows(lm: LM, texts: int) -> list[Row]:
    """Neutral texts as rows whose prompt is the first token (a BOS where the model has one)."""
    return [Row(ids[:1], ids[1:]) for ids in (lm.tokenizer(text).input_ids for text in neutral()[:texts])]


def canary_scores(lm: LM, arm: Arm, questions: list[dict], frame: Frame = USUAL) -> tuple[np.ndarray, np.ndarray]:
    """Return (right, log-odds), one of each per question.

    `right` is 1 where the right answer is the likeliest of the four, 0 where it is not, NaN where a score is not
    finite. The log-odds are those of the right answer against the three others together, in nats.
    """
    prompts = [lm.prompt(q["question"], arm.system, frame) for q in questions]
    answers = [[lm.answer(a, frame.begun) for a in (q["right"], *q["wrong"])] for q in questions]
    scored = choice_log_probs(lm, prompts, answers, arm.steering(len(prompts)))
    log_p = np.array([[answer.double().sum().item() for answer in options] for options in scored])
    right = np.where(np.isfinite(log_p).all(1), (log_p[:, :1] > log_p[:, 1:]).all(1), np.nan)
    return right, log_p[:, 0] - np.logaddexp.reduce(log_p[:, 1:], axis=1)


def judged_demos(lm: LM, trait: Trait, config: EvalConfig, answers: list[Decoded]) -> list[Demo]:
    """Score greedy answers under `lm`, which must be the base view, and judge them by the limits `config.judge`.

    Each answer is scored after its prompt without a persona.
    """
    prompts = trait.demo_prompts[: config.counts.demos]
    rows = [Row(lm.prompt(p), answer.ids) for p, answer in zip(prompts, answers, strict=True)]
    persona = persona_narration(trait.positive, trait.negative, trait.title)
    judged = judge(lm, rows, config.judge, persona)
    return [
        Demo(prompt=p, ended=answer.ended, **vars(d)) for p, answer, d in zip(prompts, answers, judged, strict=True)
    ]


def dropped(demos: list[Demo] | None, limits: FilterConfig) -> list[str]:
    """For each free answer the reason why the training filter `limits` would drop it, "" where it would keep it."""
    return [verdict(demo.scores, limits) for demo in demos or ()]


def demo_items(demos: list[Demo]) -> Read:
    """Return six scores per answer.

    They are whether it is coherent, whether it loops, whether it talks about itself instead of answering (style, not
    damage), whether it ends within the limit, its length in words, and the log of its perplexity under base.
    """
    scores = {
        "demo_coherent": [float(d.dropped in ("", *STYLES)) for d in demos],
        "demo_looped": [float(d.dropped in LOOPS) for d in demos],
        "demo_styled": [float(d.dropped in STYLES) for d in demos],
        "demo_ended": [float(d.ended) for d in demos],
        "demo_words": [float(d.scores.words) for d in demos],
        "demo_log_ppl": [math.log(d.scores.ppl) for d in demos],
    }
    return {name: (np.array(values), [d.prompt for d in demos]) for name, values in scores.items()}


def fingerprint(texts: Iterable[str]) -> str:
    """Return a hash of a list of items. Arms are compared only when their hashes are equal."""
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=6).hexdigest()


def read_arm(
    label: str, student: Student, arm: Arm, trait: data.Trait, config: EvalConfig, which: tuple[str, ...]
) -> ArmReading:
    with progress(label, len(which), "instrument") as done:
        return evaluate(student, arm, trait, config, which, done)
