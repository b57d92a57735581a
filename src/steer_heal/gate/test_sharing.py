"""What leaves the machine: pushed to a stand-in of the hub whole or not at all; a run is made again from it."""

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from peft import AutoPeftModelForCausalLM

from steer_heal import cli
from steer_heal.cli import main
from steer_heal.commands.export import export
from steer_heal.commands.reproduce import Again
from steer_heal.commands.reproduce import record_of as record_of_target
from steer_heal.commands.share import Push, Wanted, share
from steer_heal.config import hub_id, without_folders
from steer_heal.data import Trait
from steer_heal.eval.harness.record import BenchmarkArm, Benchmarks, BenchmarkTask, Scores
from steer_heal.files import json_text
from steer_heal.gate.conftest import BRIEF, tiny, turned
from steer_heal.gate.folders import seal
from steer_heal.gate.hub import Hub, Repository, hub_at
from steer_heal.gate.test_export import student_logits
from steer_heal.gate.test_input import refused
from steer_heal.presets import PRESETS
from steer_heal.records import unstructured
from steer_heal.report.card import Fold, Form, Licence, Made, model_card
from steer_heal.runs.folder import RunDir
from steer_heal.runs.reading import load as read_run
from steer_heal.runs.reproduction import read_reproducible, reproducible
from steer_heal.runs.resume import measured_trait, preset_and_config, record_of
from steer_heal.verbs import Run

pytestmark = pytest.mark.run

IDS = torch.tensor([[7, 300, 41, 900, 12]])


@pytest.fixture
def hub(tmp_path, monkeypatch, request):
    stack = ExitStack()
    request.addfinalizer(stack.close)
    return stack.enter_context(hub_at(Hub(), tmp_path / "cache", monkeypatch))


# ---- the hub


def test_a_push_is_private_whole_and_the_same_as_the_folder(whole, tmp_path, hub, capsys):
    told = share(Wanted(whole), tmp_path / "love", Push("me/love"))
    there = hub.models["me/love"]
    kept = {path.name: path.read_bytes() for path in (tmp_path / "love").iterdir()}
    assert there.private and "private: http://127.0.0.1" in told
    assert {name: held for name, held in there.files.items() if name != ".gitattributes"} == kept
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "reproduce.json"} == kept.keys()
    assert sum("/commit/" in asked for asked in hub.asked) == 1  # all files or none
    for name, held in kept.items():
        if not name.endswith(".safetensors"):
            assert str(whole) not in held.decode() and str(Path.home()) not in held.decode(), name
    assert share(Wanted(whole, round=0), None, Push("me/open", public=True)).startswith("pushed, public")
    assert not hub.models["me/open"].private and "in 1 round:" in hub.models["me/open"].files["README.md"].decode()


def test_a_dry_run_lists_the_files_and_asks_nobody(whole, tmp_path, hub, capsys):
    main(["export", str(whole), "--to", str(tmp_path / "gone"), "--push", "me/love", "--dry-run", "--merge"])
    said = capsys.readouterr().out
    assert said.startswith("me/love, private, would hold:") and hub.asked == [] and not (tmp_path / "gone").exists()
    listed = {line.split()[-1] for line in said.splitlines()[1:]}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "reproduce.json"} <= listed
    told = share(Wanted(whole), Path("love.gguf"), Push("me/love", public=True, dry_run=True))
    assert told.startswith("me/love, public, would hold:") and not Path("love.gguf").exists()
    listed = {line.split()[-1] for line in told.splitlines()[1:]}
    assert listed == {"README.md", "love.gguf", "love.Modelfile", "reproduce.json"} and hub.asked == []


@pytest.mark.parametrize(
    ("dies", "says", "message"),
    [
        ("whoami", 401, "the hub does not take the token (401): run `hf auth login`"),
        ("repos/create", 403, "the token may not write there (403)"),
        ("/commit/", 0, "the hub could not be reached, or broke off"),
        ("/commit/", 500, "the hub answered 500: try again later"),
        ("validate-yaml", 404, "there is no such place at the hub"),
    ],
)
def test_a_hub_that_refuses_or_dies_half_way_has_nothing(whole, tmp_path, hub, capsys, dies, says, message):
    hub.dies, hub.says = dies, says
    said = refused(["export", str(whole), "--to", str(tmp_path / "love"), "--push", "me/love"], capsys)
    assert "--push 'me/love'" in said and message in said
    assert {*getattr(hub.models.get("me/love"), "files", ())} <= {".gitattributes"}
    if dies == "whoami":  # before the work
        assert not (tmp_path / "love").exists()
    else:
        assert f"The export is whole in '{tmp_path / 'love'}'" in said
        assert (tmp_path / "love" / "reproduce.json").exists()
    if dies == "/commit/" and says == 500:  # what is empty can be pushed to once more
        hub.dies = "never"
        share(Wanted(whole), None, Push("me/love"))
        assert len(hub.models["me/love"].files) == 5


def test_what_cannot_be_pushed(whole, tmp_path, hub, monkeypatch, capsys):
    hub.models |= {"me/full": Repository(True, {"README.md": b""}), "me/open": Repository(False)}
    monkeypatch.chdir(tmp_path)
    run = [str(whole)]
    for words, message in (
        (["--push", "love"], "--push 'love': give USER/NAME"),
        (["--push", "me/lo ve"], "--push 'me/lo ve' is no name at the hub (Repo id must use"),
        (["--push", "me/full"], "it has files already: choose a new name"),
        (["--push", "me/open"], "it is public: choose a new name, or say so with --public"),
        (["--to", "v.gguf", "--vector", "--push", "me/v"], "a control vector has no card"),
        (["--to", "here", "--public"], "--public and --dry-run are of --push"),
        (["--to", "here", "--rank", "0"], "--rank 0 is of an adapter, 1 or more"),
        (["--to", "here", "--rank", "2", "--merge"], "--rank 2 is of an adapter"),
        ([], "give --to FOLDER, --to NAME.gguf or --push USER/NAME"),
    ):
        assert message in refused(["export", *run, *words], capsys)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub is on this machine" in refused(["export", *run, "--push", "me/new"], capsys)
    assert not any("create" in asked for asked in hub.asked) and not list(tmp_path.glob("[!c]*"))


def test_a_path_of_the_machine_is_not_told(whole, tmp_path, hub, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    trait = json.loads((run / "trait.json").read_text())
    (run / "trait.json").write_text(json.dumps(trait | {"positive": f"You love the files in {run}."}))
    seal(run)
    said = refused(["export", str(run), "--push", "me/love"], capsys)
    assert f"--push: README.md would tell the path '{run}' of this machine" in said and not hub.models


# ---- the base


@pytest.fixture
def on_hub(whole, tmp_path, hub):
    """The finished run, as if its base had been loaded from the hub, where it lies."""
    base = tmp_path / "base"
    lm = tiny()
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    hub.models["acme/tiny"] = Repository(False, {path.name: path.read_bytes() for path in base.iterdir()})
    front = b"---\nlicense: other\nlicense_name: acme-1\nlicense_link: LICENSE\n---\n"
    hub.models["acme/tiny"].files["README.md"] = front
    run = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["path"] = "acme/tiny"
    (run / "config.json").write_text(json.dumps(config))
    return seal(run)


def test_an_adapter_finds_a_base_that_the_hub_has(on_hub, whole, hub, capsys):
    share(Wanted(on_hub), None, Push("me/love"))
    model = AutoPeftModelForCausalLM.from_pretrained("me/love", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, student_logits(whole, 2), rtol=1e-4, atol=1e-4)
    card = hub.models["me/love"].files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "acme/tiny" and front["tags"] == ["steering", "steer-heal", "lora", "love"]
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", "acme-1", "LICENSE")
    assert 'AutoPeftModelForCausalLM.from_pretrained("this folder")' in card and "no id at the hub" not in card


@pytest.mark.parametrize(
    ("path", "id_", "named"),
    [
        ("google/gemma-3-1b-it", "google/gemma-3-1b-it", "google/gemma-3-1b-it"),
        ("/home/me/model", None, "model"),
        ("./model", None, "model"),
        ("random:tiny", None, "random:tiny"),
        ("smollm2-135m", None, "smollm2-135m"),
        ("/home/me/m.gguf", None, "m.gguf"),
        ("/home/me/my trait.toml", None, "my trait.toml"),
        ("file:/home/me/v.gguf", None, "file:v.gguf"),
    ],
)
def test_what_a_model_is_called_elsewhere(path, id_, named):
    assert hub_id(path) == id_ and without_folders(path) == named


# ---- the card


def test_the_card_has_the_benchmarks_as_the_hub_reads_them(whole):
    run, trait = read_run(whole), json.loads((whole / "trait.json").read_text())
    made = Made(summary=run.summary, config=run.config, trait=trait, argv=["run"], rounds=2)
    student = [
        Scores(
            task="quiz", metric="acc", filter="none", value=0.25, form="mean", higher_is_better=True, items=[0.0, 0.5]
        ),
        Scores(
            task="quiz", metric="ppl", filter="strict", value=math.inf, form=None, higher_is_better=False, items=None
        ),
    ]
    base = [replace(one, value=0.75) for one in student]
    found = Benchmarks(
        harness="9.9",
        model="tiny",
        trait="love",
        tasks=[BenchmarkTask(name="quiz", version="1", shots=3, items=2, fingerprint="f")],
        groups={},
        arms=[BenchmarkArm(arm=name, scores=base) for name in ("base", "prompted")]
        + [BenchmarkArm(arm="student", scores=student)],
        round=1,
    )
    card = model_card(made, Form(benchmarks=found, licence=Licence("apache-2.0")))
    front = yaml.safe_load(card.split("---")[1])
    (results,) = ModelCardData(**front).eval_results  # the hub's own reader
    assert (results.dataset_name, results.metric_type, results.metric_value) == ("quiz", "acc", 0.25)
    assert results.dataset_args == {"num_few_shot": 3} and results.source_name == "lm-evaluation-harness 9.9"
    assert front["license"] == "apache-2.0" and "base_model" not in front and "(apache-2.0)" in card
    folded = model_card(made, Form(benchmarks=found, fold=Fold(before=8, rank=4, lost=0.25)))
    assert "model-index" not in folded and "| quiz, acc |" in folded  # measured before it was folded
    assert "Folded from rank 8 to rank 4: the update differs by 25.0%" in folded and "--max-lora-rank 8`" in folded


# ---- the same run again


def test_a_run_is_made_again_from_what_the_hub_has(whole, tmp_path, hub, capsys):
    """One round of it: what a round trains does not depend on how many follow."""
    share(Wanted(whole, round=0), None, Push("me/love"))
    record = json.loads(hub.models["me/love"].files["reproduce.json"])
    record["config"] |= {"rounds": 1, "eval": record["config"]["eval"] | {"leave_out": [*BRIEF[1:]]}}
    hub.models["me/love"].files["reproduce.json"] = json.dumps(record).encode()
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "me/love", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.count("┆ yes ") == 6, said
    assert "Reproduced: 6 of 6 outcomes lie in their recorded intervals; the adapters are the same bit for bit." in said

    (folder,) = (tmp_path / "out").iterdir()
    run, table = RunDir(folder), tmp_path / "record.json"
    table.write_text(json.dumps(record))
    recorded, summary = read_reproducible(table), read_run(folder).summary
    moved = [replace(one, over_base=one.over_base + 1, ci=(one.ci[0] + 1, one.ci[1] + 1)) for one in recorded.outcomes]
    again = Again(
        replace(recorded, outcomes=[moved[0], *recorded.outcomes[1:]], sha256={}, verdict="moved"), run, summary
    )
    assert not again.agrees and again.table().count("┆ no ") == 1
    assert again.sentence() == (
        "Not reproduced: 5 of 6 outcomes lie in their recorded intervals. The verdict was moved, it is broken now."
    )
    late = Again(replace(recorded, round=1), run, summary)
    assert not late.agrees and "the new run ended after 1 rounds, the record is of round 1" in late.sentence()


def parsed(words: list[str], monkeypatch) -> tuple[Run, Trait | None]:
    """A command line, and the trait of its file, up to where it would be carried out."""
    asked = []
    monkeypatch.setattr(cli, "run", lambda run, argv, trait: asked.append((run, trait)))
    cli.carry_out(words)
    return asked[0]


CHANGES = {
    "steer.method": "pca",
    "steer.band": "auto",
    "dose.range": (0.5, 2.0),
    "dose.kl_target": 1.5,
    "heal.barrier.lam_round_pow": -1.5,
    "heal.training.checkpointing": True,
    "heal.training.epochs": "auto",
    "anyway": False,
    "eval.harness": ("plain_questions",),
    "eval.leave_out": ("plain", "frames"),
    "model.date": "2026-03-02",
    "filter.incoherence": 1e9,
}


def test_run_config_takes_every_setting_of_the_file_and_its_trait(whole, tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    for preset in ("gemma-3-1b", "smollm2-135m"):
        config = turned(PRESETS[preset], CHANGES)
        file.write_text(json.dumps(record_of(config, preset)))
        run, trait = parsed(["run", "--config", str(file)], monkeypatch)
        assert (run.preset, run.config, trait) == (preset, config, None)
    run, trait = parsed(["run", f"--config={file}", "--rounds", "5", "--heal.training.no-checkpointing"], monkeypatch)
    assert run.config == turned(config, {"rounds": 5, "heal.training.checkpointing": False})

    record, table = record_of_target(str(whole))
    on_disk = json.loads((whole / "config.json").read_text())
    assert table == on_disk == json.loads(json_text(unstructured(record)))["config"] and len(record.sha256) == 2
    of_run = parsed(["run", "--config", str(whole / "config.json")], monkeypatch)
    assert of_run == (
        Run(*preset_and_config(json.loads((whole / "config.json").read_text()))),
        measured_trait(RunDir(whole)),
    )
    export(whole, tmp_path / "adapter", None, merge=False)
    assert parsed(["run", "--config", str(tmp_path / "adapter" / "reproduce.json")], monkeypatch) == of_run
    other = parsed(["run", "--config", str(whole / "config.json"), "--trait", "calm"], monkeypatch)
    assert other == (replace(of_run[0], config=replace(of_run[0].config, trait="calm")), None)


def test_a_file_that_gives_no_config_ends_in_a_line(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = json.loads((whole / "config.json").read_text())
    wrong = {
        "text.json": "not json",
        "list.json": "[1]",
        "gone.json": json.dumps({**config, "preset": "gone"}),
        "newer.json": json.dumps({**config, "warp": 9}),
        "older.json": json.dumps({key: value for key, value in config.items() if key != "seed"}),
        "sly.json": json.dumps({**config, "trait": "--resume=/"}),
        "half.json": json.dumps({"config": config, "trait": {}}),
    }
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        assert f"'{name}' gives no config of this version" in refused(["run", "--config", name], capsys), name
    (tmp_path / "type.json").write_text(json.dumps({**config, "rounds": "many"}))
    assert "many" in refused(["run", "--config", "type.json"], capsys)
    (tmp_path / "whole.json").write_text(json.dumps(config))
    said = refused(["run", "tiny-random", "--config", "whole.json"], capsys)
    assert "--config 'whole.json' names its preset: leave 'tiny-random' out" in said
    assert "has its own config" in refused(["run", "--config", "whole.json", "--resume", str(whole)], capsys)
    for target in (".", "whole.json", "nothing"):
        assert "reproduce.json" in refused(["reproduce", target], capsys)
    export(whole, tmp_path / "adapter", None, merge=False)
    record = json.loads((tmp_path / "adapter" / "reproduce.json").read_text())
    record["config"]["model"]["path"] = "my-model"
    (tmp_path / "elsewhere.json").write_text(json.dumps(record))
    assert "the run's base 'my-model' was a folder or a file of another machine" in refused(
        ["reproduce", "elsewhere.json"], capsys
    )


def test_the_record_has_no_path_and_says_what_was_auto(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"path": "/home/me/models/mine", "dtype": "auto"}
    config |= {"trait": "/home/me/traits/kind.toml", "steer": config["steer"] | {"method": "file:/home/me/v.gguf"}}
    config["steer"]["without"] = ["calm", "/home/me/near.toml"]
    (run / "config.json").write_text(json.dumps(config))
    seal(run)
    text = json_text(unstructured(reproducible(read_run(run), RunDir(run), 2)))
    found = json.loads(text)["config"]
    assert "/home" not in text and (found["model"]["path"], found["model"]["dtype"]) == ("mine", "float32")
    assert (found["trait"], found["steer"]["method"]) == ("kind.toml", "file:v.gguf")
    assert found["steer"]["without"] == ["calm", "near.toml"]
