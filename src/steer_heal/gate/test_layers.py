"""Imports: no circle, none upwards, no torch in readers, no figures in trainers. Types are checked everywhere."""

import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import steer_heal

CONTRACTS = Path(__file__).with_name("layers.toml")


def test_the_package_keeps_its_contracts(capsys):
    from importlinter.cli import lint_imports  # absent on a GPU machine, which runs the `device` checks alone

    kept = lint_imports(config_filename=str(CONTRACTS), no_cache=True, no_logo=True) == 0
    assert kept, capsys.readouterr().out


VIOLATIONS = [
    ("model/lm.py", "import steer_heal.loop", "layers"),
    ("heal/step.py", "def late():\n    from steer_heal.eval import verdict", "layers"),
    ("misc.py", "", "layers"),
    ("model/lm.py", "from steer_heal.model import likelihood", "circles"),
    ("runs/folder.py", "import torch", "readers"),
    ("eval/record.py", "from steer_heal.eval import geometry", "readers"),
    ("model/batching.py", "import polars", "training"),
]


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS)
def test_a_contract_that_is_broken_is_seen(tmp_path, file, line, contract):
    package = Path(steer_heal.__file__).parent
    shutil.copytree(package, tmp_path / "steer_heal", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "steer_heal" / file).open("a", encoding="utf-8") as copy:
        copy.write(f"\n\n{line}\n")
    code = "import sys; from importlinter.cli import lint_imports; "
    code += "sys.exit(lint_imports(config_filename=sys.argv[1], limit_to_contracts=(sys.argv[2],), no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(CONTRACTS), contract],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def unchecked(module: ModuleType) -> list[str]:
    """Functions of a module whose calls are not type-checked: the import hook wraps the functions that it compiles."""
    own = {name: f for name, f in vars(module).items() if getattr(f, "__module__", None) == module.__name__}
    return [name for name, f in own.items() if hasattr(f, "__code__") and not hasattr(f, "__wrapped__")]


def test_types_are_checked_in_every_part_of_the_package():
    modules = [m.name for m in pkgutil.walk_packages(steer_heal.__path__, "steer_heal.") if ".gate" not in m.name]
    assert {name.split(".")[1] for name in modules} > {"model", "steer", "distil", "heal", "bake", "eval", "runs"}
    assert {name: found for name in modules if (found := unchecked(importlib.import_module(name)))} == {}
    plain = importlib.util.spec_from_file_location("plain", Path(steer_heal.__file__).with_name("terminal.py"))
    without = importlib.util.module_from_spec(plain)
    plain.loader.exec_module(without)
    assert "harmless" in unchecked(without)


def test_checked_types_compile_no_module_but_ours_anew(tmp_path):
    """A module is checked, and nothing that it imports is compiled under jaxtyping's name."""
    code = "import steer_heal; steer_heal.check_types(); import steer_heal.terminal as t; print(t.program.__wrapped__)"
    env = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "function program" in ran.stdout, ran.stderr
    anew = {path.parent.name for path in tmp_path.rglob("*.opt-jaxtyping*.pyc")}
    assert anew == {"steer_heal"} and len(list(tmp_path.rglob("*.pyc"))) > 50
