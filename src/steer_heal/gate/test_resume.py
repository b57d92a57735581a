"""Killed runs end in the same bits, damage is named and mended, one process per folder, full disks lose nothing."""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loguru import logger

import steer_heal
from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.cli import main
from steer_heal.commands import run as runner
from steer_heal.config import UserError
from steer_heal.files import writing
from steer_heal.gate import soak
from steer_heal.gate.conftest import BRIEF, FEW, turned
from steer_heal.gate.folders import cut, seal
from steer_heal.gate.processes import done
from steer_heal.gate.soak import WORDS, result
from steer_heal.model import decode as generate
from steer_heal.model import dtype as dtype_module
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS
from steer_heal.processor import Processor
from steer_heal.report.page import build
from steer_heal.runs.environment import commit, environment
from steer_heal.runs.folder import EVENTS, RunDir
from steer_heal.runs.resume import OtherVersion, create, described, opened, recorded, settings
from steer_heal.runs.student import student_after
from steer_heal.stages import round as round_stages
from steer_heal.sweep.disk import identity, scan

pytestmark = pytest.mark.run

KILLS = 2


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the finished run, to damage."""
    return shutil.copytree(whole, tmp_path / "run")


def refused(words, capsys) -> str:
    """The last line of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and said.startswith("steer-heal: ")
    return said


def mend(said: str) -> list[str]:
    """The arguments of the command that an error message names."""
    words = shlex.split(re.split(r"Make it again: |go on with: ", said)[1])
    return words[words.index("run") :]


def test_killed_at_random_instants_a_run_ends_in_the_same_bits(whole, tmp_path):
    code, said = done(soak.cli, KILLS, tmp_path / "trials", None, whole, log=tmp_path / "log")
    assert code == 0, said + (tmp_path / "log").read_text()
    seen = json.loads(said[said.index("{") :])
    assert seen["kills"] == sum(seen["killed_at"].values()) == KILLS and len(seen["killed_at"]) > KILLS / 2


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def swap(path: Path) -> None:
    """Replace the file with that of the other round, which is undamaged."""
    other = str(path).replace("/r01/", "/r00/")
    assert other != str(path)
    shutil.copyfile(other, path)


def nest(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flatten(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("here was a folder")


def add(path: Path) -> None:
    (path / "adapter_model.bin").write_bytes(b"\x80\x04.")


DAMAGE = [
    (halve, "base.json", "base.json"),
    (halve, "r00/completions.jsonl", "r00/completions.jsonl"),
    (halve, "r00/vector/vector.safetensors", "r00/vector"),
    (halve, "r01/adapter/adapter_model.safetensors", "r01/adapter"),
    (halve, "trait.json", "trait.json"),
    (flip, "r00/dose.json", "r00/dose.json"),
    (flip, "r00/adapter/adapter_model.safetensors", "r00/adapter"),
    (flip, "negative.json", "negative.json"),
    (flip, "decode_rows.json", "decode_rows.json"),
    (flip, "anchor.jsonl", "anchor.jsonl"),
    (flip, "config.json", "config.json"),
    (flip, "adapter/adapter_model.safetensors", "adapter"),
    (empty, "prompted.json", "prompted.json"),
    (empty, "r00/heal.jsonl", "r00/adapter"),
    (empty, "env.json", "env.json"),
    (lose, "plain/d0.json", "plain/d0.json"),
    (flip, "first_look.json", "first_look.json"),
    (lose, "r00/vector/layers.json", "r00/vector"),
    (lose, "r00/healed.json", "r00/healed.json"),
    (lose, "r00/adapter", "r00/adapter"),
    (lose, "r01/adapter/adapter_config.json", "r01/adapter"),
    (lose, "config.json", "config.json"),
    (swap, "r01/steered.json", "r01/steered.json"),
    (swap, "r01/completions.jsonl", "r01/completions.jsonl"),
    (swap, "r01/adapter/adapter_model.safetensors", "r01/adapter"),
    (nest, "r01/geometry.json", "r01/geometry.json"),
    (flatten, "r00/vector", "r00/vector"),
    (add, "r00/adapter", "r00/adapter"),
]
MENDED = {
    "base.json",
    "first_look.json",
    "r00/vector",
    "r00/adapter",
    "r01/adapter",
    "config.json",
    "trait.json",
    "env.json",
}


@pytest.mark.parametrize(("damage", "name", "artefact"), DAMAGE, ids=[f"{d.__name__} {n}" for d, n, _ in DAMAGE])
def test_damage_is_named_with_the_command_that_mends_it(whole, folder, capsys, damage, name, artefact):
    damage(folder / name)
    said = refused(["run", "--resume", str(folder)], capsys)
    assert f"{folder / name}" in said and f"--resume {folder} --recompute {artefact}" in said
    if artefact in MENDED:
        main(mend(said))
        assert result(folder) == result(whole)


def test_an_artefact_that_comes_out_otherwise_is_said(folder, capsys):
    """As on a GPU, or after an update: later artefacts are kept, and a warning says so."""
    lines = []
    sink = logger.add(lines.append, format="{level} {message}")
    run = RunDir(folder)
    other = run.read("decode_rows.json") + 1
    run.again.add("decode_rows.json")
    assert run.artefact(int, "decode_rows.json", lambda: other) == other
    logger.remove(sink)
    assert [line for line in lines if "WARNING decode_rows.json was recomputed with another result" in line]
    assert RunDir(folder).read("decode_rows.json") == other


def test_what_cannot_be_trusted_or_made_again_is_refused(folder, capsys):
    log = folder / EVENTS
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    assert f"{log} is damaged in line 2" in refused(["run", "--resume", str(folder)], capsys)
    log.write_text("\n".join(line for line in lines if '"decode_rows.json"' not in line) + "\n")
    said = refused(["run", "--resume", str(folder)], capsys)
    assert "decode_rows.json was not made by this run" in said
    main(mend(said))
    log.unlink()
    assert f"{log} is missing" in refused(["run", "--resume", str(folder)], capsys)
    assert "is missing" in refused(["report", str(folder)], capsys)


def test_readers_refuse_what_is_damaged(folder, capsys):
    flip(folder / "r01" / "healed.json")
    for words in (["report", str(folder)], ["export", str(folder), "--to", str(folder.parent / "to")]):
        assert "--recompute r01/healed.json" in refused(words, capsys)
    main(["results", "--out", str(folder.parent)])
    assert f"left out: {folder}/r01/healed.json does not have" in capsys.readouterr().out
    shutil.copyfile(folder / "r00" / "healed.json", folder / "r01" / "healed.json")
    cut(folder, "r01/healed.json")
    flip(folder / "r00" / "adapter" / "adapter_model.safetensors")
    for words in (["export", str(folder), "--to", str(folder.parent / "to")], ["eval", str(folder)]):
        assert "--recompute r00/adapter" in refused(words, capsys)
    assert not (folder.parent / "to").exists()


def test_the_batch_size_that_memory_allowed_is_kept(whole, folder, monkeypatch):
    cut(folder, "r01/completions.jsonl")
    monkeypatch.setattr(generate, "free_memory", lambda device: 10_000_000)  # would choose fewer rows now
    main(["run", "--resume", str(folder)])
    assert result(folder) == result(whole)


# ---- allowed changes of a resumed run


def test_another_config_is_refused_and_rounding_may_differ(whole, folder, capsys):
    again = ["run", "--resume", str(folder)]
    said = refused([*again, "--heal.barrier.tau", "9", "--seed", "3"], capsys)
    assert "heal.barrier.tau: 0.001 then, 9.0 now; seed: 0 then, 3 now" in said and "start a new run" in said
    assert "with that changed is a different run" in refused([*again, "--allow-change", "heal.barrier.tau"], capsys)
    assert "its preset is tiny-random, not smollm2-135m" in refused(["run", "smollm2-135m", *again[1:]], capsys)
    less = [*again, "--heal.training.pass-rows", "2"]
    assert "Allow it with --allow-change heal.training.pass_rows" in refused(less, capsys)
    allowed = ["--allow-change", "heal.training.pass_rows"]
    before = (folder / EVENTS).read_text()
    cut(folder, "r01/adapter")
    main([*less, *allowed])
    main(again)  # the allowed change is now in the run's config
    changes = [e for e in RunDir(folder).events() if e["event"] == "change"]
    assert [(e["key"], e["then"], e["now"]) for e in changes] == [("heal.training.pass_rows", 4, 2)]
    assert before.splitlines()[0] == (folder / EVENTS).read_text().splitlines()[0]
    one, other = (json.loads((f / "summary.json").read_text())["rounds"][1]["healed"] for f in (whole, folder))
    assert one["trait_nats"] == pytest.approx(other["trait_nats"], abs=2e-3)


def test_another_model_is_refused_and_other_software_must_be_allowed(folder, capsys, monkeypatch):
    again = ["run", "--resume", str(folder)]
    loaded = runner.loaded

    def other(config):
        lm = loaded(config)
        with torch.no_grad():
            lm.blocks[0].mlp.up_proj.weight[0, 0] += 1e-3
        return lm

    monkeypatch.setattr(runner, "loaded", other)
    assert "model.sha256: " in refused(again, capsys)
    assert "a different run" in refused([*again, "--allow-change", "model.sha256"], capsys)
    monkeypatch.setattr(runner, "loaded", loaded)

    now = environment(loaded(PRESETS["tiny-random"].model))
    then = json.loads(json.dumps(now))
    then["packages"]["torch"] = "2.12.0"
    monkeypatch.setattr(runner, "environment", lambda lm: then)
    said = refused(again, capsys)
    assert f"packages.torch: {now['packages']['torch']!r} then, '2.12.0' now" in said
    main([*again, "--allow-change", "packages.torch"])
    main(again)
    assert json.loads((folder / "env.json").read_text())["packages"]["torch"] == "2.12.0"


def test_a_changed_trait_file_is_refused_and_a_lost_one_is_not_needed(tmp_path, capsys, least):
    file = tmp_path / "mine.toml"
    text = (data.HERE / "traits" / "love.toml").read_text("utf-8")
    file.write_text(text, "utf-8")
    main([*WORDS, "--rounds", "1", *BRIEF, "--trait", str(file), "--out", str(tmp_path / "out")])
    (folder,) = (tmp_path / "out").iterdir()
    cut(folder, "r00/healed.json")
    file.write_text(text.replace('title = "', 'title = "truly ', 1), "utf-8")
    assert "the trait file has changed" in refused(["run", "--resume", str(folder)], capsys)
    file.unlink()
    main(["run", "--resume", str(folder)])
    assert (folder / "summary.json").exists()


def test_a_resumed_run_makes_the_same_vector_without_the_files_of_other_traits(tmp_path, least, monkeypatch, capsys):
    file = tmp_path / "near.toml"
    file.write_text(
        'name = "near"\n[persona]\npositive = "You are warm to people."\nnegative = "You are cold to people."\n',
        "utf-8",
    )

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(round_stages.RoundStages, "find_dose", stop)
    words = [*WORDS, "--rounds", "1", *BRIEF, "--steer.without", str(file), "calm", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert re.search(r"steering vector .*, \d\d% of its norm left without the other traits", capsys.readouterr().err)
    (folder,) = (tmp_path / "out").iterdir()
    made = (folder / "r00" / "vector" / "vector.safetensors").read_bytes()
    assert [row["name"] for row in json.loads((folder / "without.json").read_text())] == ["near", "calm"]
    cut(folder, "r00/vector")
    file.unlink()
    with pytest.raises(SystemExit):
        main(["run", "--resume", str(folder)])
    assert (folder / "r00" / "vector" / "vector.safetensors").read_bytes() == made


def test_a_folder_of_before_a_knob_came_is_read_as_what_was_done(tmp_path):
    config = replace(PRESETS["tiny-random"], out=str(tmp_path))
    env = {"packages": {"steer_heal": steer_heal.VERSION}}
    folder = create(config, "tiny-random", data.load_trait("love"), env, []).path
    now, then = recorded(folder), json.loads((folder / "config.json").read_text())
    del then["steer"]["read"], then["steer"]["without"], then["eval"]["harness"]
    then["eval"]["ends_only"] = ["profile", "frames", "refusals", "relevance"]
    (folder / "config.json").write_text(json.dumps(then), "utf-8")
    seal(folder)
    assert recorded(folder) == now and settings(opened(folder)) == ("tiny-random", replace(config, out="outputs"))
    (found,) = scan(tmp_path)
    assert found.config == {"preset": "tiny-random"} | now
    turned_on = turned(config, {"steer.without": ("calm",)})
    old, own, other = (identity(c, found.trait) for c in (now, described(config), described(turned_on)))
    assert found.identity == old == own != other
    said = json.dumps([then | {"preset": None}, found.trait], sort_keys=True)
    assert old == hashlib.blake2b(said.encode(), digest_size=12).hexdigest()  # as in the record of its sweep
    del then["steer"]["band"]
    (folder / "config.json").write_text(json.dumps(then), "utf-8")
    with pytest.raises(OtherVersion, match="its config differs in band"):
        opened(seal(folder))


def test_the_type_of_the_weights_is_chosen_once(tmp_path, monkeypatch, least):
    """The machine that starts the run chooses. Other machines and `student_after` keep its choice."""
    words = ["run", "tiny-random", "--model.dtype", "auto", *FEW, *BRIEF]
    with monkeypatch.context() as native:
        native.setattr(dtype_module, "processor", lambda: Processor("fast", frozenset({"amx_bf16"})))
        native.setattr(dtype_module, "speed_up", lambda: 4.0)
        main([*words, "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    env, made = json.loads((folder / "env.json").read_text()), result(folder)
    assert env["dtype"] == {"weights": "bfloat16", "why": "this processor multiplies it with amx_bf16"}
    assert json.loads((folder / "config.json").read_text())["model"]["dtype"] == "auto"
    monkeypatch.setattr(dtype_module, "processor", lambda: Processor("slow", frozenset()))
    assert student_after(folder, RunDir(folder).read("config.json"), 1).lm.head.weight.dtype == torch.bfloat16
    cut(folder, "r00/adapter")
    main(["run", "--resume", str(folder)])
    assert result(folder) == made


def test_what_env_json_says(monkeypatch, whole):
    for name in ("HF_TOKEN", "USER", "LOGNAME", "HOME"):
        assert os.environ.get(name, "nobody-1234") not in (whole / "env.json").read_text() or name == "HOME"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    env = environment(load(PRESETS["tiny-random"].model))
    text = json.dumps(env)
    assert "hf_secret" not in text and str(Path.home()) not in text and os.uname().nodename not in text
    assert env["threads"] == torch.get_num_threads() and env["cpus"] == os.cpu_count()
    assert env["packages"]["torch"] == torch.__version__ and len(env["model"]["sha256"]) == 64
    assert env["git"] == commit() and (commit() is None or re.match(r"[0-9a-f]{40}( with changes .*)?$", commit()))


# ---- one process per folder


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_noted_tells_of_a_change_in_any_part_of_the_package(tmp_path):
    package = Path(steer_heal.__file__).parent
    shutil.copytree(package, tmp_path / "steer_heal", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=gate", "-c", "user.email=gate@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "copy"]):
        subprocess.run([*git, *words], check=True)
    code = f"""
import subprocess, sys
from pathlib import Path
from {commit.__module__} import commit
print(commit())
for part in sorted({{file.parent for file in Path("steer_heal").rglob("*.py")}}):
    with (part / "__init__.py").open("a") as file:
        file.write("# changed")
    print(commit())
    subprocess.run(["git", "checkout", "-q", "."], check=True)
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    clean, *changed = done.stdout.splitlines()
    assert re.fullmatch(r"[0-9a-f]{40}", clean), done.stderr
    assert len(changed) > 1 and all(said.startswith(f"{clean} with changes ") for said in changed)


def test_two_processes_on_one_folder(folder, capsys):
    again = ["run", "--resume", str(folder)]
    with RunDir(folder).held():
        said = refused(again, capsys)
        assert f"{folder} is in use by process {os.getpid()} on {os.uname().nodename} since 2" in said
    (folder / ".lock").write_text("process 4194305 on this since yesterday")  # a process that died
    lines = []
    sink = logger.add(lines.append, format="{message}")
    with RunDir(folder).held():
        pass
    logger.remove(sink)
    assert lines == ["taken over from process 4194305 on this since yesterday, which did not end as it should\n"]
    assert (folder / ".lock").read_text() == ""


# ---- full disk, no permission, no memory

TINY_DISK = """
import os, subprocess, sys
from pathlib import Path
from steer_heal.gate.soak import WORDS, fork
disk, log, words = Path(sys.argv[1]), Path(sys.argv[2]), [*WORDS, *sys.argv[3:]]

def mount(*given):
    subprocess.run(["mount", *given, "none", str(disk)], check=True)

def said(words):
    _, status = os.waitpid(fork(words, log), 0)
    return status, log.read_text().strip().splitlines()[-1]

mount("-t", "tmpfs", "-o", "size=160k")
os.chdir(disk)
full = said([*words, "--out", "."])
print(*full, len([*disk.rglob("*.part")]), sep="\\n")
mount("-o", "remount,size=20m")
(folder,) = disk.glob("2*")
print(said(["run", "--resume", folder.name])[0])
mount("-o", "remount,ro")
print(*said(["run", "--resume", folder.name]), sep="\\n")
print((folder / "summary.json").read_text())
"""


def can_mount() -> bool:
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return tried.returncode == 0


@pytest.mark.skipif(not shutil.which("unshare") or not can_mount(), reason="no file system can be mounted here")
def test_a_full_disk_and_a_read_only_one(tmp_path):
    (tmp_path / "disk").mkdir()
    words = [sys.executable, "-c", TINY_DISK, str(tmp_path / "disk"), str(tmp_path / "log"), "--rounds", "1", *BRIEF]
    done = subprocess.run(["unshare", "-rm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code, full, halves, resumed, again, read_only, *summary = done.stdout.splitlines()
    assert re.match(r"steer-heal: cannot write .*: No space left on device\. What is done is kept, go on with: ", full)
    assert code != "0" and halves == "0" and resumed == "0"
    assert again != "0" and re.match(r"steer-heal: cannot write .*: Read-only file system$", read_only)
    assert len(json.loads("\n".join(summary))["rounds"]) == 1


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    said = refused([*WORDS, "--out", str(tmp_path / "file" / "out")], capsys)
    assert f"{str(tmp_path / 'file')!r} is no folder: give another" in said
    assert os.listdir(tmp_path) == ["file"]


def test_half_an_event_is_taken_back_when_the_disk_is_full(folder):
    run, log = RunDir(folder), folder / EVENTS
    before = log.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(UserError, match=rf"cannot write {log}: File too large"):
            run.event("round", text="x" * 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.read_bytes() == before


def test_an_artefact_that_cannot_be_written_leaves_no_half(folder, tmp_path):
    from safetensors.torch import save_file

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = RunDir(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for write in (lambda path, value: path.write_text("x" * 30_000), lambda path, value: save_file(value, path)):
            with pytest.raises(UserError, match=r"cannot write .*/more: File too large"):
                run.stage("more", lambda: {"w": torch.zeros(9_999)}, write, lambda path: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.glob("*more*")) and run.find("more") is None


LESS_ROWS = "--model.read-rows 16 --allow-change model.read_rows"
DECODE_ROWS = "--model.decode-rows 48 --allow-change model.decode_rows"
PASS_ROWS = "--heal.training.pass-rows 2 --allow-change heal.training.pass_rows"
NO_ROWS = "no batch is left to make smaller"


@pytest.mark.parametrize(
    ("artefact", "function", "part", "flags"),
    [
        ("r00/vector", "model.forward.forward", "reading", LESS_ROWS),
        ("r00/dose.json", "model.likelihood.states", "reading", LESS_ROWS),
        ("r00/completions.jsonl", "model.decode.decode_batch", "decoding", DECODE_ROWS),
        ("r01/adapter", "heal.examples.states", "reading", LESS_ROWS),
        ("r01/adapter", "heal.train.accumulate", "training", PASS_ROWS),
        ("r01/healed.json", "model.answers.left_padded", "reading", LESS_ROWS),
        ("adapter", None, None, NO_ROWS),
    ],
)
def test_out_of_memory_names_the_part_and_its_knob(folder, capsys, monkeypatch, artefact, function, part, flags):
    cut(folder, artefact)

    def fail(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    with monkeypatch.context() as patched:
        if part is None:
            patched.setattr(Student, "save", fail)
        else:
            patched.setattr(f"steer_heal.{function}", fail)
        said = refused(["run", "--resume", str(folder)], capsys)
    where = f"{artefact}, {part}" if part else artefact
    assert f"out of memory while making {where} (2.00 GiB more were wanted)" in said
    assert NO_ROWS in said if flags == NO_ROWS else said.endswith(flags)
    if artefact == "r01/healed.json":  # the command in the message resumes the run
        main(mend(said))
        assert (folder / "summary.json").exists()


def test_out_of_memory_on_a_cpu_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert re.fullmatch(r"\d+ bytes", runner._wanted(caught.value))
    assert runner._wanted(RuntimeError("shapes differ")) is None


def test_a_training_step_that_is_not_finite_says_where(folder, capsys, monkeypatch):
    cut(folder, "r01/adapter")
    run, heal = RunDir(folder), round_stages.heal

    def overshoot(student, examples, anchors, settings, *rest):
        return heal(student, examples, anchors, turned(settings, {"training.lr": 1e30}), *rest)

    monkeypatch.setattr(round_stages, "heal", overshoot)
    said = refused(["run", "--resume", str(folder)], capsys)
    assert re.search(r"r01/adapter, step \d+: (objective|divergence|loss|.*grad.*) is (nan|inf)", said), said
    assert "completions number" in said and "--heal.training.lr" in said
    monkeypatch.setattr(round_stages, "heal", heal)
    assert run.find("r00/adapter") and not (folder / "r01" / "adapter").exists()
    main(["export", str(folder), "--to", str(folder.parent / "kept")])


def test_names_cannot_leave_the_outputs_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trait = replace(data.load_trait("love"), name="../../../etc/" + "x" * 300)
    env = {"threads": 1, "packages": {"steer_heal": steer_heal.VERSION}}
    for path in ("../../up", "a/../../..", "/etc/passwd", "..", "/", "x" * 300):
        config = replace(PRESETS["tiny-random"], out="out", model=replace(PRESETS["tiny-random"].model, path=path))
        folder = create(config, "tiny-random", trait, env, [])
        assert folder.path.resolve().parent == (tmp_path / "out").resolve() and len(folder.path.name) < 120
    assert os.listdir(tmp_path) == ["out"]
    for run in (tmp_path / "out").iterdir():
        said = refused(["run", "--resume", str(run), "--recompute", "../../x"], capsys)
        assert "--recompute '../../x': the run has made no such artefact" in said


def test_a_report_is_rebuilt_while_the_run_still_writes(folder):
    with (folder / EVENTS).open("a") as log:
        log.write('{"time": 1763.2, "event": "sta')
    page = build(folder).path
    assert page.stat().st_size > 1e6
    with RunDir(folder).held():
        assert (folder / EVENTS).read_text().endswith("}\n")


def test_writing_passes_on_what_is_no_matter_of_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


OPENING = (["run", "--resume"], ["report"], ["chat"], ["eval"], ["export", "--to", "there"])


def test_a_folder_of_an_older_version_is_refused_with_the_version_that_reads_it(folder, capsys):
    env = json.loads((folder / "env.json").read_text())
    assert env["packages"]["steer_heal"] == steer_heal.VERSION
    env["packages"]["steer_heal"] = "0.1.0"
    (folder / "env.json").write_text(json.dumps(env))
    seal(folder)
    for words in OPENING:
        said = refused([*words, str(folder)], capsys)
        assert "was made by steer-heal 0.1.0" in said and "read it with steer-heal 0.1.0" in said
    main(["results", "--out", str(folder.parent)])
    said = capsys.readouterr().out
    assert f"left out: '{folder}' was made by steer-heal 0.1.0" in said and "no finished run" in said


def test_no_run_is_begun_inside_another(folder, capsys):
    before = sorted(folder.iterdir())
    assert "is a run itself" in refused(["run", "tiny-random", "--out", str(folder)], capsys)
    assert sorted(folder.iterdir()) == before


def test_a_folder_with_other_settings_than_this_version_knows_is_refused(folder, capsys):
    """Two builds may have one version number: the settings tell them apart."""
    config = json.loads((folder / "config.json").read_text())
    config["dose"]["rule"] = "survival"
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)
    for words in OPENING:
        assert "another version of steer-heal (its config differs in rule)" in refused([*words, str(folder)], capsys)
    main(["results", "--out", str(folder.parent)])
    assert "(its config differs in rule)" in capsys.readouterr().out
