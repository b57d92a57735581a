"""Try a trait out on a model, without training: `steer-heal trait check FILE --model M`."""

from __future__ import annotations

from dataclasses import replace

from steer_heal.bake.student import Student
from steer_heal.config import EvalConfig, FilterConfig, ModelConfig
from steer_heal.data import Trait, pool
from steer_heal.eval.arms import Arm
from steer_heal.eval.catalogue import ENDED, OF_TRAIT, UNITS, WORDS
from steer_heal.eval.instruments import dropped, read_arm
from steer_heal.eval.intervals import interval
from steer_heal.eval.own_probes import probed
from steer_heal.eval.reading import ArmReading, paired
from steer_heal.eval.verdict import off_target_moves
from steer_heal.model.decode import rows_that_fit
from steer_heal.model.loading import load
from steer_heal.report.tables import filter_text

SHOWN = 3  # probes and answers
EVERY = 2  # of the pool's questions, every second: half the time, and an interval a little wider


def try_out(trait: Trait, model: ModelConfig, config: EvalConfig) -> str:
    """Whether the model can express the trait, in lines: how far its personas are apart on the probes, with interval
    and halves; what the filter drops of its answers; some probes; its answers under both personas, and their lengths;
    which built-in traits move along."""
    lm = load(model)
    longest = max(len(lm.prompt(text, trait.positive)) for text in (*pool("probe"), *trait.demo_prompts))
    limit = trait.answer_limit(config.counts.demo_tokens)
    student = Student(replace(lm, decode_rows=rows_that_fit(lm, longest, limit)))
    trait = probed(student, trait, config.judge, pool("probe")[::EVERY])
    sides = {"base": None, "positive": trait.positive, "negative": trait.negative}
    arms = [Arm(name, history=0.0, now=0.0, system=text) for name, text in sides.items()]
    which = {name: (OF_TRAIT[trait.instrument].read_with, "demos", "off_target") for name in sides}
    which["base"] = ("demos",)
    base, positive, negative = (
        read_arm(f"check, {arm.name}", student, arm, trait, config, which[arm.name]) for arm in arms
    )
    lines = [_separation(trait, model.path, positive, negative)]
    lines.append(filter_text(dropped(base.demos, FilterConfig()), dropped(positive.demos, FilterConfig())))
    lengths = [
        f"{arm.label} {WORDS.form.format(arm.demo_words)} words, {ENDED.form.format(arm.ended_share)} end"
        for arm in (base, positive, negative)
    ]
    lines.append(f"answers of at most {limit} tokens: {'; '.join(lengths)}")
    for probe in trait.contrast[:SHOWN]:
        lines += [f"  probe: {probe.question}", f"    trait:    {probe.trait}", f"    opposite: {probe.opposite}"]
    for one, other in list(zip(positive.demos, negative.demos, strict=True))[:SHOWN]:
        lines += [f"  asked: {one.prompt}", f"    positive: {one.text}", f"    negative: {other.text}"]
    along = [f"{name} {move:+.2f}" for name, move in off_target_moves(positive, negative).items()]
    return "\n".join([*lines, f"what moves along: {', '.join(along) or 'none of the other traits that were read'}"])


def _separation(trait: Trait, model: str, positive: ArmReading, negative: ArmReading) -> str:
    change = paired(positive, negative, trait.instrument)
    low, high = interval(change)
    return (
        f"{model} {'can' if low > 0 else 'cannot'} express {trait.title!r}: positive over negative persona "
        f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}] {UNITS[trait.instrument]} on {len(change)} probes "
        f"({OF_TRAIT[trait.instrument].label}), "
        f"{change[0::2].mean():+.3f} and {change[1::2].mean():+.3f} on their halves"
    )
