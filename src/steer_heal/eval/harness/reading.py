"""Read the tasks of lm-evaluation-harness on one arm, and turn its results into records."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from steer_heal.bake.student import Student
from steer_heal.eval.arms import Arm
from steer_heal.eval.harness.record import FORMS, BenchmarkArm, BenchmarkTask, Scores, over_base, with_interval
from steer_heal.eval.harness.requests import Answering, harness_model, warn_of_shortened
from steer_heal.eval.harness.tasks import SEED, Tasks
from steer_heal.eval.instruments import fingerprint
from steer_heal.model.packing import packed


def read_benchmarks(student: Student, arm: Arm, tasks: Tasks, items: int | None) -> dict[str, Any]:
    """The harness's results of one arm. `items` takes the first of each task."""
    with packed(student.lm) as lm, student.view(history=arm.history, now=arm.now):
        model = harness_model(lm, arm)
        results = harness_results(model, tasks, arm.system, items)
    warn_of_shortened(model)
    return results


def harness_results(model: Answering, tasks: Tasks, system: str | None, items: int | None) -> dict[str, Any]:
    """Read all tasks with the chat template and a system prompt. A task's random choices are the same for every arm."""
    from lm_eval.evaluator import evaluate

    random.seed(SEED)
    np.random.seed(SEED)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(SEED)
    return evaluate(
        lm=model,
        task_dict=tasks.loaded,
        limit=items,
        bootstrap_iters=0,
        system_instruction=system,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )


def benchmark_tasks(results: dict[str, Any]) -> list[BenchmarkTask]:
    """The tasks that were read, with a fingerprint of their items."""
    tasks = []
    for name, samples in results["samples"].items():
        items = {one["doc_id"]: f"{one['doc_hash']} {one['target_hash']}" for one in samples}
        tasks.append(
            BenchmarkTask(
                name=name,
                version=str(results["versions"].get(name)),
                shots=results["n-shot"].get(name, 0),
                items=len(items),
                fingerprint=fingerprint(items[number] for number in sorted(items)),
            )
        )
    return tasks


def benchmark_arm(arm: Arm, results: dict[str, Any], tasks: Tasks, base: BenchmarkArm | None) -> BenchmarkArm:
    """The scores of an arm with their intervals and, for another arm than base, their differences from base."""
    scores = [one for name, task in tasks.tasks.items() for one in _of_task(name, task, results)]
    scores += [one for name, inside in tasks.groups.items() for one in _of_group(name, inside, results, scores)]
    scores = [with_interval(one) for one in scores]
    if base is not None:
        other = {one.key: one for one in base.scores}
        scores = [over_base(one, other[one.key]) for one in scores]
    return BenchmarkArm(arm=arm.name, scores=scores, dose=None if arm.vector is None else arm.dose)


def _of_task(name: str, task: Any, results: dict[str, Any]) -> list[Scores]:
    found, samples = [], sorted(results["samples"][name], key=lambda one: one["doc_id"])
    aggregation, higher = task.aggregation(), results["higher_is_better"].get(name, {})
    for metric, filter_, value in _values(results["results"][name]):
        of_metric = [one[metric] for one in samples if one["filter"] == filter_ and metric in one]
        form = getattr(aggregation[metric], "__name__", "") if metric in aggregation else "mean"
        items, weights = _items(of_metric)
        found.append(
            Scores(
                task=name,
                metric=metric,
                filter=filter_,
                value=value,
                form=form if form in FORMS and items is not None else None,
                higher_is_better=higher.get(metric),
                items=items,
                weights=weights,
            )
        )
    return found


def _of_group(name: str, inside: list[str], results: dict[str, Any], scores: list[Scores]) -> list[Scores]:
    """The scores of a group. Its items are those of its tasks; `with_interval` sees whether the value is their mean."""
    found, higher = [], results["higher_is_better"].get(name, {})
    for metric, filter_, value in _values(results.get("groups", {}).get(name, {})):
        parts = [one for one in scores if (one.metric, one.filter) == (metric, filter_) and one.task in inside]
        whole = parts and all(one.form == "mean" for one in parts)
        found.append(
            Scores(
                task=name,
                metric=metric,
                filter=filter_,
                value=value,
                form="mean" if whole else None,
                higher_is_better=higher.get(metric),
                items=[item for one in parts for item in one.items] if whole else None,
            )
        )
    return found


def _values(row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(metric, filter, value) of a row of the harness's results, which also has names, counts and standard errors."""
    named = ((*key.rpartition(",")[::2], value) for key, value in row.items() if "," in key and "_stderr," not in key)
    return [(metric, filter_, float(value)) for metric, filter_, value in named if isinstance(value, int | float)]


def _items(values: list[Any]) -> tuple[list[float] | None, list[float] | None]:
    """The score and the weight of every item; None for scores that are no number, or no log-likelihood and length."""
    if all(_number(value) for value in values):
        return [float(value) for value in values], None
    if all(isinstance(value, tuple) and len(value) == 2 and all(map(_number, value)) for value in values):
        return [float(value) for value, _ in values], [float(weight) for _, weight in values]
    return None, None


def _number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and not math.isinf(float(value))
