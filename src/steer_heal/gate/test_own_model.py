"""A model of the user's own: run by its path alone, found from any folder, and checked before it is read again."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bitsandbytes.nn import Linear4bit
from loguru import logger
from safetensors.torch import load_file, save_file

from steer_heal.cli import main
from steer_heal.commands.preset import with_preset
from steer_heal.config import ModelConfig, UserError
from steer_heal.gate.folders import seal
from steer_heal.gate.test_input import change, refused
from steer_heal.model.loading import load
from steer_heal.model.random_weights import build_random
from steer_heal.runs.environment import environment
from steer_heal.runs.folder import RunDir
from steer_heal.runs.resume import described, recorded
from steer_heal.runs.student import base_of
from steer_heal.sweep.plan import parsed
from steer_heal.terminal import MODULE

pytestmark = pytest.mark.run

NAME = "my model 403"
FEW = shlex.split(
    "--rounds 1 --steer.n-contexts 4 --dose.prompts 2 --filter.incoherence 1e9 --filter.loops off "
    "--distil.n-keep 8 --distil.max-new-tokens 8 --heal.anchor.prompts 0 --heal.training.epochs 1 --eval.size tiny "
    "--eval.leave-out off_target canary profile plain --anyway"
)


def make(folder: Path) -> None:
    """A model beside the run that `steer-heal run ./MODEL` makes of it on a terminal that knows ASCII alone."""
    build_random("tiny", folder / NAME)
    words = [sys.executable, "-m", MODULE, "run", f"./{NAME}", *FEW, "--out", "out put"]
    ascii_only = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "said").open("w") as said:
        subprocess.run(words, cwd=folder, env=os.environ | ascii_only, stdout=said, stderr=said, check=True)


@pytest.fixture(scope="module")
def made(shared) -> Path:
    return shared("own_model", make)


@pytest.fixture
def run(made) -> Path:
    (folder,) = (path for path in (made / "out put").iterdir() if path.name[0] != ".")
    return folder


def test_a_model_is_run_by_its_path(made, run):
    said = (made / "said").read_text("ascii")
    assert f"'./{NAME}' is no preset: band, dose, thresholds and steps are measured on the model" in said
    measured = said[said.index("Measured for this model and trait") : said.index("round 0")]
    assert all(name in measured for name in ("steer.band", "dose.range", "heal.barrier.tau"))
    assert "│" not in said and "? student" in said  # the table of the round, in the terminal's letters
    config = RunDir(run).read("config.json")
    assert config["preset"] == "auto" and config["model"]["path"] == str(made / NAME)
    assert config["heal"]["barrier"]["tau"] == config["steer"]["band"] == "auto"
    assert "_my-model-403_love_s0" in run.name and json.loads((run / "summary.json").read_text())["model"] == NAME


def test_a_sweep_knows_the_run_by_the_same_path(made, run, monkeypatch):
    monkeypatch.chdir(made)
    config = described(parsed(("auto", "--model.path", f"./{NAME}", *FEW)))
    assert json.loads(json.dumps(config)) == recorded(run)


def test_what_to_do_next_can_be_pasted(made, run):
    said = (made / "said").read_text("ascii")
    folder = run.relative_to(made)
    assert f"chat '{folder}'\n" in said and f"PeftModel.from_pretrained(base_model, '{folder}/adapter')" in said
    assert f"run auto --model.path './{NAME}' --trait mine.toml" in said


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_what_leaves_the_machine_holds_none_of_its_paths(made, run, tmp_path, monkeypatch, merge):
    monkeypatch.chdir(tmp_path)
    main(["export", str(run), "--to", "out", *merge])
    for file in [*(tmp_path / "out").rglob("*"), *(run / "adapter").iterdir(), run / "env.json"]:
        assert str(made).encode() not in file.read_bytes() and str(made.parent).encode() not in file.read_bytes(), file
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:" not in card  # it has no id at the hub
    assert NAME in card and f"steer-heal run auto --model.path '{NAME}' --rounds 1" in card
    if not merge:
        said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == NAME


def moved(made: Path, run: Path, to: Path) -> tuple[Path, Path]:
    """A copy of the model, and one of the run that was made with it."""
    model, copy = shutil.copytree(made / NAME, to / NAME), shutil.copytree(run, to / "run")
    config = json.loads((copy / "config.json").read_text())
    config["model"]["path"] = str(model)
    (copy / "config.json").write_text(json.dumps(config))
    return model, seal(copy)


def other_weight(model: Path, by: float = 1e-3) -> None:
    weights = load_file(model / "model.safetensors")
    next(value for name, value in weights.items() if "up_proj" in name)[0, 0] += by
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def other_template(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text() + "{# #}")


@pytest.mark.parametrize("spoil", [other_weight, other_template])
def test_another_model_under_the_runs_path_is_refused_by_every_reader(made, run, tmp_path, capsys, monkeypatch, spoil):
    model, copy = moved(made, run, tmp_path)
    spoil(model)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    to = ["--to", str(tmp_path / "out")]
    readers = (
        ["chat", str(copy)],
        ["eval", str(copy)],
        ["export", str(copy), *to],
        ["export", str(copy), *to, "--merge"],
    )
    for words in readers:
        said = refused(words, capsys)
        assert f"{str(model)!r} is no longer the model that the run was made with" in said, words
    assert not (tmp_path / "out").exists()
    assert before == {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}


def test_four_bit_weights_are_compared_where_their_bits_are_the_same(made, run, tmp_path):
    """A merge takes float weights, of which the run noted nothing: the 4-bit ones are compared before."""
    model, copy = moved(made, run, tmp_path)
    change(copy / "config.json", model=RunDir(copy).read("config.json")["model"] | {"quant": "nf4"})

    def noted(env: dict) -> Path:
        (copy / "env.json").write_text(json.dumps(env))
        return seal(copy)

    env = environment(load(ModelConfig(str(model), "nf4", "bfloat16", "cpu")))
    merged = base_of(noted(env), float_weights=True)
    assert not any(isinstance(module, Linear4bit) for module in merged.model.modules())
    other_weight(model, 1.0)
    with pytest.raises(UserError, match="is no longer the model that the run was made with"):
        base_of(noted(env), float_weights=True)
    lines = []
    sink = logger.add(lines.append, format="{message}")
    base_of(noted(env | {"gpu": "a GPU"}))
    logger.remove(sink)
    assert len(lines) == 1 and "4-bit weights were made on a GPU" in lines[0]


@pytest.mark.parametrize("line", [b"\xff\xfe what", b"/gate nan", b"/gate inf", b"/steer nan"])
def test_a_line_that_cannot_be_used_does_not_end_a_chat(run, tmp_path, capsys, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    said = io.TextIOWrapper(io.BytesIO(line + b"\nName a tree.\n/quit\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", said)
    main(["chat", str(run), "--max-new-tokens", "2"])
    shown = capsys.readouterr().out
    assert ("needs a number" in shown) == line.startswith(b"/") and ("type it again" in shown) != line.startswith(b"/")
    assert shown.count("[student after round 0 at gate 1]") == 1


# ---- code in a model's folder

BY_CODE = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
OWN_TOKENIZER = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "OwnTokenizer"}


@pytest.fixture
def with_code(tmp_path, monkeypatch) -> Path:
    """A model's folder with Python in it, at a terminal that answers yes to whatever is asked."""
    build_random("tiny", tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "model"


def test_a_model_that_needs_its_own_code_is_refused_and_nothing_asks(with_code, tmp_path, capsys):
    change(with_code / "config.json", auto_map=BY_CODE, model_type="own")
    for words in (["eval", str(with_code)], ["run", "tiny-random", "--model.path", str(with_code)]):
        assert "comes with code of its own, which steer-heal does not run" in refused(words, capsys)
    assert not (tmp_path / "ran").exists() and sys.stdin.tell() == 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_transformers_has_is_read_without_its_own_code(with_code, tmp_path, file):
    change(with_code / file, **({"auto_map": BY_CODE} if file == "config.json" else OWN_TOKENIZER))
    lm = load(ModelConfig(str(with_code), "none", "float32", "cpu"))
    assert type(lm.model).__module__.startswith("transformers.models.")
    assert not (tmp_path / "ran").exists() and sys.stdin.tell() == 0


# ---- what keeps a model from being read

HUB = """
import sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SAYS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "no-branch": (404, "RevisionNotFound"),
    "secret": (403, ""),
    "wrong-token": (401, ""),
}

class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code = next((said for owner, said in SAYS.items() if f"/{owner}/" in self.path), (404, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET
    log_message = lambda *_: None

hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
from steer_heal.config import ModelConfig, UserError
from steer_heal.model.loading import load
import huggingface_hub.constants

for name in [*(f"{owner}/model" for owner in SAYS), "offline/gated-403", sys.argv[1]]:
    huggingface_hub.constants.HF_HUB_OFFLINE = name.startswith("offline")
    try:
        load(ModelConfig(name, "none", "float32", "cpu"))
    except UserError as error:
        print(error)
"""


def test_why_a_model_was_not_loaded_is_the_hubs_answer(tmp_path):
    """A hub of our own answers as the hub does; the folder has the words of an answer in its path."""
    folder = tmp_path / "gated 401 restricted" / NAME
    build_random("tiny", folder)
    (folder / "config.json").write_text("{")
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, "-c", HUB, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    gated, absent, branch, secret, token, offline, damaged = done.stdout.splitlines()
    assert "'gated/model' is gated: accept its licence" in gated
    assert "has no model 'absent/model', or keeps it private: look at the spelling" in absent
    assert "has no branch main of model 'no-branch/model'" in branch
    assert "does not let you read model 'secret/model' (it answered 403)" in secret
    assert "does not let you read model 'wrong-token/model' (it answered 401)" in token
    assert "'offline/gated-403' is not on this machine and the hub cannot be reached" in offline
    assert f"model {str(folder)!r} could not be loaded as a causal language model" in damaged


def test_a_gguf_is_given_as_a_file(tmp_path, capsys, monkeypatch):
    """In a folder it is named, a single one or several, whatever case its ending has."""
    run = ["run", "tiny-random", "--model.path"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "b q4.GGUF").write_bytes(b"PK no model")
    said = refused([*run, str(tmp_path / "model")], capsys)
    assert f"is a folder that holds .gguf files: give the file: {tmp_path}/model/b q4.GGUF" in said
    assert "b q4.GGUF' is no GGUF file" in refused([*run, f"{tmp_path}/model/b q4.GGUF"], capsys)
    (tmp_path / "model" / "a.gguf").touch()
    said = refused([*run, str(tmp_path / "model")], capsys)
    assert f"give the file: {tmp_path}/model/a.gguf (or one of 1 more)" in said
    monkeypatch.chdir(tmp_path.parent)  # a folder with one slash in its path is no hub id
    assert "give the file: " in refused(["eval", f"{tmp_path.name}/model"], capsys)
    (tmp_path / "notes.txt").touch()
    assert "notes.txt' is no .gguf file: give" in refused([*run, str(tmp_path / "notes.txt")], capsys)


# ---- the word after `run`


def test_a_run_folder_is_no_model(run, capsys):
    assert f"is a run folder: go on with it by --resume '{run}'" in refused(["run", str(run)], capsys)


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        ("run some-owner/some-model --seed 3", "auto"),
        ("run some-owner/some-model --model.device cpu", "auto"),
        ("run model.GGUF", "auto"),
        ("run ./gone", "auto"),
        ("run tiny-random --model.path a/b", None),
        ("run --seed 3", None),
        ("eval a/b", None),
    ],
)
def test_a_model_takes_the_settings_of_a_preset(words, preset):
    given = words.split()
    said, argv = with_preset(given)
    assert argv == (given if preset is None else ["run", preset, "--model.path", given[1], *given[2:]])
    assert bool(said) == (preset is not None)
