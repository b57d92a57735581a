"""A sweep's plan on Ray: one task per run. Ray does the scheduling and the retries. All nodes share the folders.

A task whose worker dies is tried again and resumes from the run's folder. The sweep's folder must have the same path on
every node.
"""

from __future__ import annotations

import io
import math
import time
from contextlib import redirect_stderr
from pathlib import Path

from steer_heal.config import UserError
from steer_heal.report.page import build
from steer_heal.runs.resume import started
from steer_heal.sweep.plan import Planned, Sweep, command, found, key, parsed, progress, same_place
from steer_heal.terminal import harmless

RETRIES = 3
POLL_SECONDS = 2.0


def on_ray(
    asked: Sweep, todo: list[Planned], cpus: int, gpus: float, address: str | None, workers: int | None
) -> dict[Planned, str]:
    """Do every run as a task that reserves `cpus` and `gpus`, on the cluster at `address` or on one started here.

    Returns the last state of each run.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'steer_heal[cluster]'") from None
    started = {"num_cpus": cpus * workers} if address is None and workers else {}
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR", **started)

    work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(run_here)
    folder = asked.folder.resolve()
    tasks = {work.remote(same_place(run, folder), str(folder), cpus): run for run in todo}
    now: dict[Planned, str] = {}
    at_first = sum(left for _, left in progress(todo, folder).values())
    began, shown = time.perf_counter(), ""
    waiting = list(tasks)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for task in done:
                try:
                    wrong = ray.get(task)
                except ray.exceptions.RayError as error:
                    wrong = str(error).strip().splitlines()[-1]
                now[tasks[task]] = "failed" if wrong else "finished"
                if wrong:
                    print(f"failed: {tasks[task].label}: {wrong}")
            on_disk = progress(todo, folder)
            going = [tasks[task] for task in waiting]
            now |= {run: "waiting" if on_disk[run][0] == "waiting" else "started" for run in going}
            left = sum(on_disk[run][1] for run in going)
            over = at_first - sum(rounds for _, rounds in on_disk.values())
            said = standing(now, left)
            if said != shown:
                shown = said
                print(said + estimate(left, over, time.perf_counter() - began), flush=True)
    except KeyboardInterrupt:
        for task in waiting:
            ray.cancel(task, force=True)
        raise
    finally:
        ray.shutdown()
    return now


def standing(now: dict[Planned, str], left: int) -> str:
    """How many runs are in each state, and the rounds that the unfinished ones have left."""
    states = list(now.values())
    counts = {how: states.count(how) for how in ("finished", "started", "waiting", "failed")}
    return "  ".join(f"{how} {count}" for how, count in {**counts, "rounds left": left}.items())


def estimate(left: int, over: int, seconds: float) -> str:
    """The minutes for the rounds `left` at the speed of those that are `over`, or nothing before the first."""
    return f", about {math.ceil(left * seconds / 60 / over)} min" if left and over else ""


def run_here(planned: Planned, folder: str, cpus: int) -> str | None:
    """Do a run in this process with `cpus` threads. Returns the error that ended it, or None."""
    import torch

    from steer_heal.commands.run import run

    torch.set_num_threads(cpus)
    try:
        there = found(Path(folder)).get(key(planned))
        preset, *_ = planned.argv
        argv = command(planned, Path(folder))
        config = parsed(tuple(argv[1:]), started(there, preset)[1] if there else None)
        with redirect_stderr(io.StringIO()):  # hides its progress bars
            done, _ = run(config, preset, argv)
            build(done.path)
    except UserError as error:
        return f"steer-heal: {harmless(str(error))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
