"""Report sections on how the result was made: vector, dose, training, the filter."""

from __future__ import annotations

from collections import Counter

from steer_heal.config import FIRED_FLOOR
from steer_heal.distil.record import Completion
from steer_heal.report.figures import dose_figure, heal_figure
from steer_heal.report.html import dropped, folded, panel, prose, safe, section, stacked, table_of
from steer_heal.runs.reading import Run
from steer_heal.runs.recipe import choices

SHOWN_COMPLETIONS = 160  # rows of a round's table


def recipe_section(run: Run) -> str:
    """What the run measured for itself."""
    found = choices(run.settings, run.survey, run.rounds[0])
    if not found:
        return ""
    rows = [(one.setting, one.chosen, one.why, one.measured) for one in found]
    why = "Settings that are auto: what was measured on this model with this trait in round 0, and what was chosen."
    return section("Recipe", why, stacked(table_of(("setting", "chosen", "because", "measured"), rows)), fold=True)


def vector_section(run: Run) -> str:
    columns = {"layer": "{:d}", "depth": "{:.2f}", "relative_norm": "{:.2%}", "split_half": "{:.3f}", "auc": "{:.3f}"}
    names = {"layer": "block", "relative_norm": "norm / residual stream"}
    names |= {"split_half": "cosine of two halves", "auc": "AUC on the other half"}
    if any(layer.left is not None for r in run.rounds for layer in r.layers):
        columns["left"], names["left"] = "{:.0%}", "norm left"
    if any(layer.split_half is None for r in run.rounds for layer in r.layers):  # a vector from a file
        del columns["split_half"]
        names["auc"] = "AUC"
    body = ""
    for r in run.rounds:
        rows = [tuple(form.format(getattr(layer, key)) for key, form in columns.items()) for layer in r.layers]
        body += folded(f"Round {r.number}", table_of(tuple(names.get(key, key) for key in columns), rows))
    why = "The vector at each block: how long it is, how reliable, and how well it tells the two personas apart."
    return section("Vector", why, body, fold=True) if body else ""


def dose_section(run: Run) -> str:
    panels = []
    for r in run.rounds:
        columns = {
            "dose": "{:.2f}",
            "survival": "{:.0%}",
            "relevance": "{:.2f}",
            "cost": "{:.0%}",
            "tail_ppl": "{:.1f}",
            "kl_p95": "{:.3g}",
        }
        columns = {key: form for key, form in columns.items() if getattr(r.dose.curve[0], key) is not None}
        rows = [
            (*(form.format(getattr(p, key)) for key, form in columns.items()), prose(p.example)) for p in r.dose.curve
        ]
        names = {"tail_ppl": "tail ppl", "kl_p95": "p95 KL, nats"}
        table = table_of((*(names.get(key, key) for key in columns), "example"), rows)
        panels.append(panel(f"Round {r.number}", dose_figure(r.dose), folded("Example text at each dose", table)))
    why = """The chosen dose is the largest at which completions pass the filter nearly as often as unsteered ones,
        tell nearly as much of their own prompts (relevance, nats per token), and steering costs little coherence (cost:
        the larger of answer mass lost and perplexity gained on unrelated text); or the dose that reaches a given
        divergence. Hover over a point to read its text."""
    return section("Dose", why, f'<div class="panels">{"".join(panels)}</div>', fold=True)


def heal_section(run: Run) -> str:
    barrier = run.config["heal"]["barrier"]
    head = ("round", "steps", "barrier fired", "anchor fired", "tau, nats", "median D, nats")
    rows, silent = [], []
    for r, sums in zip(run.rounds, run.summary.rounds, strict=True):
        own, anchor = sums.barrier_fired_share, sums.anchor_fired_share
        nats = f"{sums.tau_nats:.3g}", f"{sums.operating_kl_nats:.3g}"
        cells = f"{own:.0%}", f"{anchor:.0%}", *nats
        rows.append((r.number, len(r.steps), *cells))
        silent += [str(r.number)] * (max(own, anchor) < FIRED_FLOOR and barrier["reg"] != "nll")
    held = "within the loop's budget" if barrier["reference"] == "base" else "plain fine-tuning"
    why = (
        f"Training of each round, in nats. D is the {barrier['agg']} of {barrier['reg']} over tokens. The barrier acts "
    )
    why += "where D exceeds its tau (dotted); diamonds mark the steps on which it fired."
    if run.rounds[0].steps[0].text_loss is not None:
        why += " Loss of written text: the log-likelihood per token that the anchor's paragraph of that step has lost."
    if silent:
        why += f" In round {', '.join(silent)} neither barrier nor anchor fired on 5% of the steps: that was {held}."
    panels = "".join(panel(f"Round {r.number}", heal_figure(r.steps, run.config["heal"])) for r in run.rounds)
    return section("Heal", why, f'<div class="panels">{panels}</div>{table_of(head, rows)}', fold=True)


def filter_section(run: Run) -> str:
    counts = [Counter(c.dropped or "kept" for c in r.completions) for r in run.rounds]
    reasons = sorted(set().union(*counts) - {"kept"})
    rows = [
        (r.number, len(r.completions), *(count[reason] for reason in ["kept", *reasons]))
        for r, count in zip(run.rounds, counts, strict=True)
    ]
    body = table_of(("round", "texts", "pass the filter", *map(safe, reasons)), rows)
    for r in run.rounds:
        shown = r.completions[:SHOWN_COMPLETIONS]
        kinds = ["dropped" if c.dropped else "kept" for c in shown]
        marks = [
            dropped(c.dropped) or f'<span class="kept">{"kept" if c.epoch is None else "passes"}</span>' for c in shown
        ]
        rows = [
            (prose(c.prompt), prose(c.text), _writer(c), f"{c.incoherence:+.1f}", mark)
            for c, mark in zip(shown, marks, strict=True)
        ]
        table = table_of(("prompt", "text", "by", "log-odds broken", "filter"), rows, kinds)
        body += folded(f"{len(shown)} of {len(r.completions)} texts of round {r.number}", table)
    why = """The texts of a round, and why the filter would drop some. Of the steered teacher's completions only the
        kept ones are trained on. The student's own answers are all trained on; there the filter shows what training
        does to them."""
    search = '<p><input class="search" type="search" placeholder="search prompts, texts and reasons" hidden></p>'
    return section("Kept and dropped", why, search + body, fold=True)


def _writer(text: Completion) -> str:
    return f"teacher at dose {text.dose:.2f}" if text.epoch is None else f"student, epoch {text.epoch}"
