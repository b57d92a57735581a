"""No pickle, no foreign code, no network once the model is there, no growth over many rounds."""

import ast
import gc
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loguru import logger

import steer_heal
from steer_heal import data, loop
from steer_heal.cli import main
from steer_heal.gate.conftest import BRIEF, FEW, LONG, turned
from steer_heal.gate.processes import done
from steer_heal.model.loading import load
from steer_heal.presets import PRESETS
from steer_heal.runs.environment import environment
from steer_heal.runs.resume import create
from steer_heal.stages.round import RoundStages
from steer_heal.stages.run import Work

pytestmark = pytest.mark.run

PACKAGE = Path(steer_heal.__file__).parent
SOURCE = sorted(file for file in PACKAGE.rglob("*.py") if PACKAGE / "gate" not in file.parents)
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CODE = {"eval", "exec", "compile", "__import__"}


def test_the_source_unpickles_nothing_and_trusts_no_remote_code():
    seen = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in SOURCE}
    modules = {m.name for m in pkgutil.walk_packages(steer_heal.__path__, "steer_heal.") if ".gate" not in m.name}
    assert {name.removesuffix(".__init__") for name in seen} == {"steer_heal", *modules}
    for file in SOURCE:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
                assert not PICKLES & {name.partition(".")[0] for name in names}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "np.load", "numpy.load", *CODE}, (file, called)
                if called.endswith(".from_pretrained") and "Model" in called and "Peft" not in called:
                    assert "use_safetensors" in {k.arg for k in node.keywords} or file.name == "loading.py", file
                if called.startswith("Auto"):
                    trusted = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
                    assert trusted == ["False"], (file, called)  # None would ask on the terminal
            assert not (isinstance(node, ast.keyword) and node.arg == "shell"), file


def unpickling(out: Path) -> None:
    """Run, resume, export and evaluate, and end with what was unpickled on the way."""
    found = []
    sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
    main(["run", "tiny-random", *FEW, *BRIEF, "--out", str(out)])
    (run,) = out.iterdir()
    main(["run", "--resume", str(run)])
    main(["export", str(run), "--to", str(out / "model"), "--merge"])
    main(["eval", str(run / "adapter"), "--base", "random:tiny", "--eval.size", "tiny"])  # every instrument
    sys.exit(f"unpickled: {found}" if found else 0)


def test_nothing_unpickles_while_a_run_loads_what_it_wrote(tmp_path):
    """Checked by audit events: the interpreter raises one for every global that an unpickler looks up."""
    code, _ = done(unpickling, tmp_path / "out", log=tmp_path / "log")
    assert code == 0, (tmp_path / "log").read_text()[-500:]


def test_the_network_can_be_blocked():
    """The fast-dev run, which follows these checks, runs with the network blocked."""
    code = """
import socket
from steer_heal.runs.environment import block_network
block_network()
for call in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: socket.getaddrinfo("example.org", 80)):
    try:
        call()
    except Exception as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("the network is blocked") == 2, done.stdout + done.stderr


def test_control_characters_of_a_model_or_a_user_do_not_reach_the_terminal(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["run", "tiny-random", "--trait", "\x1b[2J\x1b]0;owned\x07.toml"])
    logger.info("model said \x1b[31mred\x07 and \x9b2J more")
    said = capsys.readouterr().err
    assert "\x1b[2J" not in said and "\x07" not in said and "\x9b" not in said and "owned" in said and "red" in said


def hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process holds")
def test_later_rounds_hold_no_more_than_the_fifth(tmp_path, monkeypatch, least):
    tiny = PRESETS["tiny-random"]
    left_out = {"eval.leave_out": ("profile", "plain", "off_target", "canary", "frames", "refusals", "relevance")}
    heal = {"anchor.prompts": 4, "text": "own", "objective": "kl_rev", "training.epochs": 1, "lora.fold_rank": 8}
    few = {"distil.n_keep": 8, "dose.steps": 2, "dose.prompts": 2, "steer.n_contexts": 8}
    heal = {f"heal.{name}": value for name, value in heal.items()}
    config = turned(tiny, {"rounds": 20 if LONG else 10, "out": str(tmp_path), **left_out, **heal, **few})
    lm, trait = load(config.model), data.load_trait("love")
    folder = create(config, "tiny-random", trait, environment(lm), [])
    seen = []
    bake = RoundStages.bake

    def watched(stage):
        bake(stage)
        gc.collect()
        files = os.listdir("/proc/self/fd")
        seen.append((resident(), hooks(lm.model), len(stage.work.student.peft.peft_config), len(files)))

    monkeypatch.setattr(RoundStages, "bake", watched)
    loop.run(Work.begun(config, "tiny-random", folder, trait, lm))
    memory, hooked, adapters, open_files = zip(*seen, strict=True)
    assert memory[-1] <= (1.05 if LONG else 1.02) * memory[4], memory
    assert {*hooked} == {0} and {*adapters} == {1} and open_files[-1] <= open_files[4]


def test_report_and_results_need_no_torch(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    code = """
import sys
class Missing:  # as if they were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from steer_heal.cli import main
main(["report", sys.argv[1]])
main(["results", "--out", sys.argv[2], "--json", sys.argv[2] + "/table.json"])
"""
    (run / "report.html").unlink()
    done = subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert (run / "report.html").exists() and json.loads((tmp_path / "table.json").read_text())[0]["run"] == run.name
