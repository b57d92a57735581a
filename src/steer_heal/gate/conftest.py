"""Shared by all checks: types and shapes checked at run time, and one tiny random model.

Checks marked `device` test the maths on one device. `STEER_HEAL_GATE_DEVICE=cuda pytest -m device` runs them on a GPU;
`gate.gpu` does that.
"""

import os
import shutil
import warnings

import pytest
from filelock import FileLock

from steer_heal import check_types

check_types()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
# Flags of a run for checks that need one, but not its figures.
FEW = ("--rounds", "1", "--steer.n-contexts", "8", "--dose.steps", "2", "--dose.prompts", "2", "--distil.n-keep", "8")
BRIEF = ("--eval.leave-out", "plain", "off_target", "canary", "profile", "frames", "refusals", "relevance", "prompts")
DEVICE = os.environ.get("STEER_HEAL_GATE_DEVICE", "cpu")
LONG = os.environ.get("STEER_HEAL_GATE_LONG") == "1"  # more rounds and random examples; `just soak` sets it


def pytest_configure(config):
    config.addinivalue_line("markers", "device: also run on a GPU by gate.gpu")
    config.addinivalue_line(
        "markers", "run: makes runs, starts processes, loads SmolLM2 or takes long; `just check` leaves it out"
    )


def tiny(**changes):
    """The tiny random model with changed settings, on the device of the gate."""
    from dataclasses import replace

    from steer_heal.model.loading import load
    from steer_heal.presets import PRESETS

    return load(replace(PRESETS["tiny-random"].model, device=DEVICE, **changes))


def turned(config, knobs):
    """The config with these knobs set, named with dots."""
    from dataclasses import replace

    for name, value in knobs.items():
        section, _, rest = name.partition(".")
        config = replace(config, **{section: turned(getattr(config, section), {rest: value}) if rest else value})
    return config


def by(lm, rows):
    """The model, reading or decoding `rows` rows at a time."""
    from dataclasses import replace

    return replace(lm, read_rows=rows, decode_rows=rows)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """`shared(name, make)`: a folder that `make(folder)` fills once for all processes of the gate."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def folder(name, make):
        made = base / name
        with FileLock(base / f"{name}.lock"):
            if not (made / "done").exists():
                shutil.rmtree(made, ignore_errors=True)
                (made / "made").mkdir(parents=True)
                make(made / "made")
                (made / "done").touch()
        return made / "made"

    return folder


@pytest.fixture(scope="session")
def whole(shared):
    """A finished, undisturbed run of `soak.WORDS`, made by an interpreter of its own. Checks must not change it."""
    from steer_heal.gate.soak import run_alone, run_folder

    return run_folder(shared("whole", run_alone))


@pytest.fixture
def least(monkeypatch):
    """Make the size `tiny` read two items of most instruments, for checks that need a run but not its figures."""
    from steer_heal.config import SIZES, Counts

    monkeypatch.setitem(SIZES, "tiny", Counts(2, 2, 2, 2, 1, 2, 4, 1, 2, 2, 2, 2))


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2-135M as its preset loads it. Checks must leave it as it is."""
    from steer_heal.model.loading import load
    from steer_heal.presets import PRESETS

    return load(PRESETS["smollm2-135m"].model)


@pytest.fixture
def lm():
    """A fresh tiny random gemma-3 in float32."""
    return tiny()


@pytest.fixture
def prompts(lm):
    """Chat prompts of very different lengths."""
    texts = [
        "Hi.",
        "How long should I boil an egg for a soft yolk?",
        "Name a tree.",
        "Why do people cry? " * 9,
        "Go on",
    ]
    return [lm.prompt(text) for text in texts]


@pytest.fixture
def vector(lm):
    """A steering vector strong enough to change what the tiny model writes."""
    import torch

    from steer_heal.model.steering import Vector

    generator = torch.Generator().manual_seed(1)
    return Vector((1, 2), 8.0 * torch.randn(2, 64, generator=generator))
