"""The package that is built: every file that the program reads is in it, and its version and changes are told.

`just package` builds it, installs it into an empty environment and uses it there.
"""

import re
import tomllib
from pathlib import Path

import pytest

import steer_heal
from steer_heal import VERSION

ROOT = Path(steer_heal.__file__).parents[2]
PROJECT = ROOT / "pyproject.toml"
if not PROJECT.exists():
    pytest.skip("pyproject.toml is not installed with the package", allow_module_level=True)
setuptools = pytest.importorskip("setuptools")


def built(monkeypatch) -> tuple[setuptools.Distribution, set[str]]:
    """The project as setuptools reads it, and the files that it would put into a wheel."""
    monkeypatch.chdir(ROOT)
    project = setuptools.Distribution({"script_name": "setup.py"})
    project.parse_config_files([PROJECT])
    command = project.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(path) for *_, path in command.find_all_modules()}
    data = {Path(folder) / name for _, folder, _, names in command.data_files for name in names}
    return project, {path.as_posix() for path in modules | data}


def test_the_wheel_has_every_file_of_the_package(monkeypatch):
    project, files = built(monkeypatch)
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src" / "steer_heal").rglob("*") if path.is_file()}
    there = {path for path in there if "__pycache__" not in path}
    assert {"src/steer_heal/py.typed", "src/steer_heal/data/report.html", "src/steer_heal/gate/layers.toml"} <= there
    assert files == there
    assert project.metadata.version == VERSION and project.metadata.name == "steer-heal"


def test_an_index_takes_every_requirement():
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert {"demo", "cluster", "harness", "judge"} <= project["optional-dependencies"].keys()
    assert [one for one in wanted if "@" in one or "://" in one] == []


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert first[1] == VERSION
