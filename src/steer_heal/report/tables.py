"""Tables for the terminal: arms, validity of the instruments, the verdict in a line."""

from __future__ import annotations

import textwrap
from collections import Counter

import numpy as np
import polars as pl

from steer_heal.data import Trait
from steer_heal.eval.catalogue import OF_TRAIT, UNITS
from steer_heal.eval.harness.record import Benchmarks
from steer_heal.eval.intervals import interval
from steer_heal.eval.reading import ArmReading, paired, printed, trait_over
from steer_heal.eval.robustness import Held, Robustness
from steer_heal.eval.verdict import Validity, Verdict
from steer_heal.runs.recipe import Choice
from steer_heal.scores import STYLES
from steer_heal.terminal import harmless

SHOWN_ANSWERS = 2
ANSWER_WIDTH = 300  # characters


def arm_table(*arms: ArmReading) -> str:
    """One row per arm."""
    base = arms[0]
    frame = pl.DataFrame(
        {
            "arm": [arm.label + (f" @{arm.dose:.2f}" if arm.dose else "") for arm in arms],
            f"trait {UNITS[base.instrument]}": [f"{arm.trait_nats:+.3f}" for arm in arms],
            "95% interval": ["[{:+.3f}, {:+.3f}]".format(*arm.trait_ci) for arm in arms],
            "over base": [_over(arm, base) for arm in arms],
            "answer mass": [f"{arm.answer_mass:.3f}" for arm in arms],
            "coherent": ["" if arm.coherent_share is None else f"{arm.coherent_share:.0%}" for arm in arms],
            "neutral ppl": [f"{arm.neutral_ppl:.2f}" for arm in arms],
        }
    )
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120):
        return str(frame)


def first_look_text(trait: Trait, arms: list[ArmReading]) -> str:
    """Whether the trait's instrument tells the personas apart on this model, and the base's first answers."""
    base, positive, negative = arms
    change = paired(positive, negative, trait.instrument)
    low, high = interval(change)
    told = "yes" if low > 0 else "no"
    parts = [
        f"Can {trait.title!r} be measured on this model? {told}. The positive persona as a prompt scores "
        f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}] {UNITS[trait.instrument]} above the negative one "
        f"({OF_TRAIT[trait.instrument].label}, {len(change)} probes).",
        "The base answers:",
    ]
    for one in base.demos[:SHOWN_ANSWERS]:
        parts += [f"  > {_line(one.prompt)}", f"    {_line(one.text)}"]
    return "\n".join(parts)


def filter_text(base: list[str], persona: list[str]) -> str:
    """What the filter drops of the base's answers and of those under the positive persona, and whether it is the style.

    `base` and `persona` have the reason for each answer to the same prompts, "" for one that is kept. Narration and
    refusals are meant to be dropped, so they are no style that is lost.
    """
    if not persona:  # in a first look that an older version wrote
        return ""
    shown = []
    for reasons in (base, persona):
        counts = Counter(filter(None, reasons))
        named = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        shown.append(f"{counts.total()}{f' ({named})' if named else ''}")
    lost = [[float(reason not in ("", *STYLES)) for reason in reasons] for reasons in (base, persona)]
    of_style = interval(np.subtract(lost[1], lost[0]))[0] > 0
    end = ": it would drop the style, loosen --filter.*" if of_style else ""
    return f"Of {len(base)} such answers the filter drops {shown[0]}; under the persona, {shown[1]}{end}."


def _line(text: str) -> str:
    return textwrap.shorten(harmless(text), ANSWER_WIDTH, placeholder=" ...")


def validity_table(rows: list[Validity]) -> str:
    """One row per instrument, see `verdict.validity`."""
    frame = pl.DataFrame(
        {
            "instrument": [row.instrument for row in rows],
            "positive over negative": [f"{row.positive_over_negative:+.3f}" for row in rows],
            "95% interval": ["[{:+.3f}, {:+.3f}]".format(*row.ci) for row in rows],
            "valid": ["yes" if row.valid else "no" for row in rows],
            "reliability": [f"{row.reliability:.2f}" for row in rows],
            "agreement": ["" if row.agreement is None else f"{row.agreement:+.2f}" for row in rows],
        }
    )
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120):
        return str(frame)


def benchmark_table(record: Benchmarks) -> str:
    """One row per task, metric and arm. Groups stand for their tasks."""
    rows = []
    for shown in record.shown:
        for arm in record.arms:
            one = record.of(arm, shown)
            change = one.over_base
            row = {"task": shown.task, "metric": shown.name} if arm is record.arms[0] else {"task": "", "metric": ""}
            row["arm"] = printed(arm.arm) + (f" @{arm.dose:.2f}" if arm.dose else "")
            row["score"] = f"{one.value:.4g}"
            row["95% interval"] = "" if one.ci is None else "[{:.4g}, {:.4g}]".format(*one.ci)
            row["over base"] = "" if change is None else "{:+.3g} [{:+.3g}, {:+.3g}]".format(change.mean, *change.ci)
            rows.append(row)
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=140, tbl_rows=-1):
        return str(pl.DataFrame(rows))


def robustness_text(record: Robustness) -> str:
    """One row per condition, and what the shares are of."""
    frame = pl.DataFrame(
        {
            "condition": [one.condition for one in record.held],
            "trait over base": [f"{one.over_base.mean:+.3f}" for one in record.held],
            "95% interval": ["[{:+.3f}, {:+.3f}]".format(*one.over_base.ci) for one in record.held],
            "of it left": [share_left(one) for one in record.held],
        }
    )
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120, tbl_rows=-1):
        return f"{frame}\n{robustness_note(record)}"


def share_left(one: Held) -> str:
    """The share of the trait that is left, with its interval; "" where there is none."""
    return "" if one.left is None else "{:.0%} [{:.0%}, {:.0%}]".format(one.left.mean, *one.left.ci)


def robustness_note(record: Robustness) -> str:
    """What the shares are of, or why there are none."""
    usual = record.held[0].over_base
    if record.sure:
        return f"Contrast, nats per token, on {record.probes} probes; the shares are of {usual.mean:+.3f}, as trained."
    low, high = usual.ci
    return (
        f"No share is given: as trained, the student's trait over base is {usual.mean:+.3f} [{low:+.3f}, {high:+.3f}] "
        "nats per token, and the interval includes zero."
    )


def recipe_table(found: list[Choice]) -> str:
    """What a run measured for itself, a paragraph for each setting."""
    lines = ["Measured for this model and trait:"]
    for one in found:
        lines.append(f"  {one.setting:<22}{one.chosen}: {one.why}")
        lines.append(textwrap.fill(one.measured, 118, initial_indent=" " * 24, subsequent_indent=" " * 24))
    return "\n".join(lines)


def _over(arm: ArmReading, base: ArmReading) -> str:
    if arm is base:
        return ""
    change = trait_over(arm, base)
    low, high = change.ci
    return f"{change.mean:+.3f} ±{(high - low) / 2:.3f}"


def verdict_line(said: Verdict, rounds_left: int) -> str:
    """The verdict in one line. If rounds are left after a broken one, the line adds that they may heal it."""
    goes_on = "; the next round starts from it, and may heal it" if said.word == "broken" and rounds_left else ""
    return f"{said.word} ({said.why}){goes_on}"
