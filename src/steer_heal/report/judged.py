"""What a judge found, for the terminal."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from steer_heal.eval.intervals import Change
from steer_heal.eval.judge.preferences import ASPECTS, Preferred
from steer_heal.eval.judge.record import Agreement, Cost, Judged, JudgedArm
from steer_heal.eval.reading import printed
from steer_heal.report.tables import validity_table


def judged_text(record: Judged, kept: Path) -> str:
    """Validity, agreement, arms and preferences. Of an invalid judge only the first, and that nothing is drawn."""
    parts = ["", validity_table([record.validity])]
    low, high = record.validity.ci
    apart = f"{record.validity.positive_over_negative:+.1f} [{low:+.1f}, {high:+.1f}] of 100 points"
    if not record.validity.valid:
        parts.append(
            f"The judge {record.judge!r} is invalid for this trait: it cannot tell answers under the positive persona "
            f"from those under the negative one ({apart}). Nothing is drawn from its ratings, and it was asked "
            "nothing more. Take a larger model as judge."
        )
        return "\n".join([*parts, cost_text(record.cost, kept)])
    parts.append(f"The judge {record.judge!r} tells the personas apart: {apart}.")
    parts += [agreement_table(record.agreement), *_arms(record)]
    if record.preferences:
        parts += ["The student's answer against another arm's, in both orders:", preference_table(record.preferences)]
    else:
        parts.append("No two answers were compared.")
    if not any(arm.arm == "equal_cost" for arm in record.arms):
        parts.append("Plain steering at equal cost is not among the arms: this run did not measure it.")
    return "\n".join([*parts, cost_text(record.cost, kept)])


def _arms(record: Judged) -> list[str]:
    named = {"Prompts of the trait:": False, "Everyday prompts:": True}
    groups = {title: [arm for arm in record.arms if arm.everyday == everyday] for title, everyday in named.items()}
    return [part for title, arms in groups.items() if arms for part in (title, judged_table(arms))]


def judged_table(arms: list[JudgedArm]) -> str:
    """One row per arm."""
    rows = {
        "arm": [printed(arm.arm) for arm in arms],
        "trait, of 100": [_points(arm.trait) for arm in arms],
        "over base": [_points(arm.over_base["trait"], "+") if arm.over_base else "" for arm in arms],
        "coherence, of 100": [_points(arm.coherence) for arm in arms],
        "answers the prompt": [_share(arm.answered) for arm in arms],
        "rated": [f"{arm.rated} of {arm.rated + arm.failed}" for arm in arms],
    }
    return _table(rows)


def preference_table(rows: list[Preferred]) -> str:
    """One row per opponent and aspect."""
    return _table(
        {
            "over": [printed(row.over) for row in rows],
            "which answer": [ASPECTS[row.aspect] for row in rows],
            "better": [str(row.better) for row in rows],
            "same": [str(row.same) for row in rows],
            "worse": [str(row.worse) for row in rows],
            "better minus worse": [_share(row.net, "+") for row in rows],
        }
    )


def agreement_table(rows: list[Agreement]) -> str:
    return _table(
        {
            "judge's": [row.reading for row in rows],
            "correlation": ["does not vary" if row.correlation is None else f"{row.correlation:+.2f}" for row in rows],
            "over": [f"{row.pairs} {row.of}" for row in rows],
        }
    )


def cost_text(cost: Cost, kept: Path) -> str:
    """What the judge cost, what failed, and where its answers are kept."""
    tokens = ""
    if cost.prompt_tokens is not None and cost.answer_tokens is not None:
        tokens = f", {cost.prompt_tokens:,} tokens read and {cost.answer_tokens:,} written"
    failed = "; ".join(f"{count} {why}" for why, count in cost.failures.items()) or "none"
    return (
        f"{cost.asked} questions: {cost.kept} answers were kept from before, {cost.calls} calls{tokens}; "
        f"failed: {failed}.\nThe answers are kept in {kept}: delete the file to ask anew."
    )


def _points(change: Change, sign: str = "") -> str:
    low, high = change.ci
    return f"{change.mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _share(change: Change, sign: str = "") -> str:
    low, high = change.ci
    return f"{change.mean:{sign}.0%} [{low:{sign}.0%}, {high:{sign}.0%}]"


def _table(columns: dict[str, list[str]]) -> str:
    with pl.Config(tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, tbl_width_chars=120, tbl_rows=-1):
        return str(pl.DataFrame(columns))
