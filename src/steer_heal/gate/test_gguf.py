"""Exports to .gguf files, and vectors of others as the teacher: what the files hold, and what is refused in a line.

Whether llama.cpp computes the same with them is in test_llama_cpp.
"""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_heal.bake.student import Student
from steer_heal.cli import main
from steer_heal.commands import export_gguf as exporting
from steer_heal.commands.export_gguf import export_gguf
from steer_heal.config import ModelConfig, SteerConfig, UserError
from steer_heal.gate.conftest import BRIEF, FEW
from steer_heal.gate.folders import seal
from steer_heal.gate.llama_cpp import tiny_gguf
from steer_heal.gate.test_input import refused
from steer_heal.model import gguf_layout
from steer_heal.model.gguf_file import About, write_control_vector, write_tensors
from steer_heal.model.loading import load
from steer_heal.runs.environment import environment
from steer_heal.runs.folder import RunDir
from steer_heal.runs.student import student_after
from steer_heal.steer import from_file
from steer_heal.steer.extract import extract
from steer_heal.steer.personas import Personas

pytestmark = pytest.mark.run

IDS = torch.tensor([[7, 300, 41, 900, 12]])
ABOUT = About("a vector", "for a check", "random:tiny")
PERSONAS = Personas("You are kind.", "You are cruel.", ["Hi.", "Why?", "Name a tree.", "Go on."])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where weights from .gguf files are kept, in place of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def on_gguf(whole, tmp_path_factory, cache) -> Path:
    """The finished run as if its base were a tiny llama from a .gguf file, whose matrices have the same shapes."""
    folder = tmp_path_factory.mktemp("on_gguf")
    base = tiny_gguf("llama", folder / "tiny-llama.Q4.gguf")
    run = shutil.copytree(whole, folder / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"path": str(base), "quant": "none", "dtype": "float32", "device": "cpu"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "env.json").write_text(json.dumps(environment(load(ModelConfig(**config["model"])))))
    return seal(run)


def student_of(run: Path) -> Student:
    return student_after(run, RunDir(run).read("config.json"), 2)


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


def contents(file: Path) -> tuple[dict, dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(file)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


# ---- what is written


def test_an_adapter_has_llama_cpps_keys_names_and_rows(on_gguf, tmp_path):
    export_gguf(on_gguf, tmp_path / "love.gguf", None, "adapter")
    keys, tensors = contents(tmp_path / "love.gguf")
    student = student_of(on_gguf)
    rank = next(iter(student.updates()))[1].a.shape[0]
    assert keys["general.architecture"] == "llama" and keys["general.type"] == "adapter"
    assert keys["adapter.type"] == "lora" and keys["adapter.lora.alpha"] == rank
    assert keys["general.base_model.0.name"] == "tiny-llama.Q4.gguf" and "loves" in keys["general.name"]
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    seen = set()
    for path, (a, b, scale) in student.updates():
        *_, block, _, kind = path.split(".")
        name = f"blk.{block}.{names[kind]}.weight"
        seen |= {f"{name}.lora_a", f"{name}.lora_b"}
        stored_a, stored_b = (torch.from_numpy(tensors[f"{name}.lora_{part}"].data.copy()) for part in "ab")
        if kind in ("q_proj", "k_proj"):  # rows 0, 1, 2, 3, ... of a head are rows 0, half, 1, half + 1, ...
            heads = len(b) // 32
            order = [32 * head + 16 * (place % 2) + place // 2 for head in range(heads) for place in range(32)]
            assert not torch.equal(stored_b, b)
            b = b[order]
        torch.testing.assert_close(stored_b @ stored_a, scale * b @ a, rtol=1e-5, atol=1e-6)
    assert seen == tensors.keys() and len(seen) == 2 * 7 * 2  # in blocks 1 and 2


@pytest.mark.parametrize(("weights", "tolerance", "kind"), [("f16", 0.02, 1), ("q8_0", 0.3, 7)])
def test_a_merged_file_is_the_student_with_the_bases_tokenizer(on_gguf, tmp_path, cache, weights, tolerance, kind):
    export_gguf(on_gguf, tmp_path / "love.gguf", None, "model", weights)
    student = student_of(on_gguf)
    merged = load(ModelConfig(str(tmp_path / "love.gguf"), "none", "float32", "cpu"))
    found, wanted = logits(merged), logits(student.lm)
    assert (found - wanted).abs().max() < tolerance
    with student.view(history=0.0, now=0.0):
        assert (logits(student.lm) - wanted).abs().max() > 2 * tolerance
    assert merged.tokenizer.get_vocab() == student.lm.tokenizer.get_vocab()
    assert merged.tokenizer.chat_template == student.lm.tokenizer.chat_template
    keys, tensors = contents(tmp_path / "love.gguf")
    of_base, _ = contents(on_gguf.parent / "tiny-llama.Q4.gguf")
    for key in of_base:
        same = key.startswith(("llama.", "tokenizer.")) or key in ("general.architecture", "general.license")
        assert not same or keys[key] == of_base[key], key
    assert keys["general.type"] == "model" and keys["general.file_type"] == kind
    assert keys["general.name"] != of_base["general.name"]
    types = {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items()}
    assert {type_ for name, type_ in types.items() if "norm" not in name} == {weights}
    assert {type_ for name, type_ in types.items() if "norm" in name} == {"f32"}


def test_beside_it_lie_a_modelfile_and_a_card_without_paths(on_gguf, tmp_path):
    export_gguf(on_gguf, tmp_path / "a.gguf", None, "adapter")
    export_gguf(on_gguf, tmp_path / "m.gguf", None, "model")
    export_gguf(on_gguf, tmp_path / "v.gguf", None, "vector")
    beside = {f"{name}.{kind}" for name in "am" for kind in ("gguf", "md", "Modelfile", "reproduce.json")}
    assert {file.name for file in tmp_path.iterdir()} == beside | {"v.gguf"}
    of_adapter, of_model = ((tmp_path / f"{name}.Modelfile").read_text() for name in "am")
    assert "\nFROM ./tiny-llama.Q4.gguf\nADAPTER ./a.gguf\n" in of_adapter
    assert "\nFROM ./m.gguf\n" in of_model and "ADAPTER" not in of_model and "TEMPLATE" in of_model
    assert "llama-cli -m tiny-llama.Q4.gguf --lora a.gguf" in (tmp_path / "a.md").read_text()
    assert "llama-cli -m m.gguf\n" in (tmp_path / "m.md").read_text()
    for file in tmp_path.iterdir():
        assert str(on_gguf.parent).encode() not in file.read_bytes() and b"tmp" not in file.read_bytes(), file


@pytest.mark.parametrize("number", [None, 0, 1])
def test_a_vector_times_its_dose_is_read_back_as_it_was(whole, tmp_path, number):
    export_gguf(whole, tmp_path / "v.gguf", number, "vector")
    keys, tensors = contents(tmp_path / "v.gguf")
    round_ = whole / f"r0{number or 0}"
    direction = load_file(round_ / "vector" / "vector.safetensors")["direction"]
    dose = json.loads((round_ / "dose.json").read_text())["dose"]
    blocks = [layer["layer"] for layer in json.loads((round_ / "vector" / "layers.json").read_text())]
    assert keys["general.architecture"] == "controlvector" and keys["controlvector.model_hint"] == "gemma3"
    assert keys["controlvector.layer_count"] == len(blocks)
    assert tensors.keys() == {f"direction.{block}" for block in blocks}
    back = from_file.read(f"file:{tmp_path / 'v.gguf'}")
    assert list(back) == blocks
    for place, block in enumerate(blocks):
        assert torch.equal(back[block], dose * direction[place])


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "there.gguf"], "--to 'there.gguf': 'there.gguf' exists: choose a new name"),
        (["--to", "folder.gguf"], "'folder.gguf' is a folder: choose a new name"),
        (["--to", "taken.gguf"], "'taken.Modelfile' exists: choose a new name"),
        (["--to", "x.gguf", "--merge"], "the run's base is no .gguf file to take metadata and tokenizer from"),
        (["--to", "x.gguf", "--merge", "--vector"], "--merge and --vector: a file holds one of them"),
        (["--to", "x", "--vector"], "a control vector is a .gguf file: give --to NAME.gguf"),
        (["--to", "x.gguf", "--type", "q8_0"], "--type q8_0 is of a merged .gguf file"),
        (["--to", "x", "--merge", "--type", "q8_0"], "--type q8_0 is of a merged .gguf file"),
        (["--to", "x.gguf", "--round", "2"], "--round 2: rounds 0 to 1 are finished"),
        (["--to", "x.gguf", "--vector", "--round", "2"], "--round 2: rounds 0 to 1 are finished"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_line(whole, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_text("mine")
    Path("folder.gguf").mkdir()
    Path("taken.Modelfile").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert said in refused(["export", str(whole), *words], capsys)
    assert sorted(Path().rglob("*")) == before and Path("there.gguf").read_text() == "mine"


@pytest.mark.parametrize("also", [[], ["--vector"]])
def test_a_family_that_was_not_compared_with_llama_cpp_is_refused(whole, tmp_path, capsys, monkeypatch, also):
    monkeypatch.delitem(gguf_layout.FAMILIES, "gemma3_text")
    said = refused(["export", str(whole), "--to", str(tmp_path / "x.gguf"), *also], capsys)
    assert "'random:tiny' is a gemma3_text; llama.cpp's layout is known for gemma2, llama" in said
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_architecture_is_not_merged(on_gguf, tmp_path, monkeypatch):
    other = tiny_gguf("qwen2", tmp_path / "other.gguf")
    monkeypatch.setattr(exporting, "_base_file", lambda path: other)
    with pytest.raises(UserError, match=r"--merge: 'other.gguf' is a qwen2, the run's model a llama"):
        export_gguf(on_gguf, tmp_path / "x.gguf", None, "model")
    assert [file.name for file in tmp_path.iterdir()] == ["other.gguf"]


def test_numbers_beyond_float16_are_not_written_as_infinite(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    write_tensors(writer, {"blk.0.ffn_up.weight": torch.full((2, 32), 7e4)})
    (tensor,) = gguf.GGUFReader(tmp_path / "big.gguf").tensors
    for weights in exporting.TYPES.values():
        with pytest.raises(UserError, match=r"blk.0.ffn_up.weight has numbers beyond the range of float16"):
            exporting._data(tensor, None, weights)


@pytest.mark.parametrize("kind", ["adapter", "model", "vector"])
def test_what_is_written_is_whole_or_not_there(on_gguf, tmp_path, monkeypatch, kind):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    rename, renamed = exporting.os.rename, []

    def dies_at_the_last(source, target):
        renamed.append(target)
        if Path(target).suffix == ".gguf":
            full()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(exporting.os, "rename", dies_at_the_last)
        with pytest.raises(UserError, match=r"cannot write .*: No space left"):
            export_gguf(on_gguf, tmp_path / "x.gguf", None, kind)
    assert sum(Path(target).parent == tmp_path for target in renamed) == (1 if kind == "vector" else 4)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(exporting.gguf.GGUFWriter, "write_kv_data_to_file", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left"):
        export_gguf(on_gguf, tmp_path / "x.gguf", None, kind)
    assert not list(tmp_path.iterdir())


def test_a_vector_that_llama_cpp_cannot_add_is_not_exported(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the run steers block 0, for which llama.cpp's control vectors have no place"):
        write_control_vector(tmp_path / "v.gguf", {0: torch.ones(4), 1: torch.ones(4)}, "llama", ABOUT)
    read = exporting.vector_of
    monkeypatch.setattr(exporting, "vector_of", lambda *of: replace(read(*of), operation="project_out"))
    with pytest.raises(UserError, match="does more than add a direction"):
        export_gguf(whole, tmp_path / "v.gguf", None, "vector")
    assert not list(tmp_path.iterdir())


# ---- vectors of others


@pytest.fixture
def directions() -> dict[int, torch.Tensor]:
    drawn = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    return dict(zip((1, 2, 3), drawn, strict=True))


def steered(lm, file: Path, layers=(1, 2)):
    return extract(lm, PERSONAS, SteerConfig(method=f"file:{file}"), layers)


def test_each_kind_of_file_gives_its_vector(lm, whole, tmp_path, directions):
    write_control_vector(tmp_path / "a.gguf", directions, "gemma3", ABOUT)
    save_file({str(n): v for n, v in directions.items()}, tmp_path / "b.safetensors")
    save_file({f"model.layers.{n}": v.half() for n, v in directions.items()}, tmp_path / "c.safetensors")
    for name in ("a.gguf", "b.safetensors", "c.safetensors"):
        vector, report = steered(lm, tmp_path / name)
        assert vector.layers == (1, 2) and vector.operation == "add"
        wanted = torch.stack([directions[1], directions[2]])
        torch.testing.assert_close(vector.direction, wanted, rtol=0, atol=1e-2 if name[0] == "c" else 0)
        assert [r.layer for r in report] == [1, 2] and all(0 <= r.auc <= 1 and r.split_half is None for r in report)
    own = whole / "r00" / "vector" / "vector.safetensors"
    assert torch.equal(torch.stack(list(from_file.read(f"file:{own}").values())), load_file(own)["direction"])


def test_how_well_a_files_vector_fits_the_personas_is_read(lm, tmp_path):
    own = extract(lm, PERSONAS, SteerConfig(), (1, 2))
    against = {n: -2 * v for n, v in zip((1, 2), own.vector.direction, strict=True)}
    write_control_vector(tmp_path / "v.gguf", against, "gemma3", ABOUT)
    for found, usual in zip(steered(lm, tmp_path / "v.gguf").report, own.report, strict=True):
        assert found.relative_norm == pytest.approx(2 * usual.relative_norm, rel=1e-4) and found.auc < 0.5
    assert "cosine" not in steered(lm, tmp_path / "v.gguf").described(4) and "cosine" in own.described(4)


def other_architecture(folder: Path) -> None:
    tiny_gguf("llama", folder / "v")


def truncated(folder: Path) -> None:
    write_control_vector(folder / "v", {1: torch.ones(64), 2: torch.ones(64)}, "gemma3", ABOUT)
    (folder / "v").write_bytes((folder / "v").read_bytes()[:-200])


WRONG = {
    "missing": (lambda folder: None, "does not exist: give a control vector (.gguf) or a .safetensors file"),
    "a folder": (lambda folder: (folder / "v").mkdir(), "is a folder: give"),
    "a pickle": (lambda folder: torch.save({1: torch.ones(64)}, folder / "v"), "pickles (.pt) are not read"),
    "a text": (lambda folder: (folder / "v").write_text("hello"), "is neither a GGUF nor a safetensors file"),
    "a model": (other_architecture, "is a GGUF file of architecture 'llama': give one of 'controlvector'"),
    "cut off": (truncated, "cannot be read as a GGUF file"),
    "no direction": (
        lambda folder: save_file({"weight": torch.ones(64)}, folder / "v"),
        "does not hold one direction for each block",
    ),
    "matrices": (lambda folder: save_file({"1": torch.ones(2, 64)}, folder / "v"), "one direction for each block"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_without_a_vector_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, kind):
    spoil, said = WRONG[kind]
    spoil(tmp_path)
    monkeypatch.setattr("steer_heal.commands.run.load", None)
    words = ["run", "tiny-random", "--steer.method", f"file:{tmp_path / 'v'}", "--out", str(tmp_path / "out")]
    assert said in refused(words, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({1: torch.ones(32), 2: torch.ones(32)}, "its directions have 32 numbers, the states of 'random:tiny' 64"),
        ({1: torch.ones(64), 3: torch.ones(64)}, "it has no direction for block 2 of 'random:tiny' (it has blocks 1"),
        ({1: torch.ones(64), 2: torch.zeros(64)}, "its direction of block 2 has norm 0"),
        ({1: torch.ones(64), 2: torch.full((64,), torch.nan)}, "its direction of block 2 has norm nan"),
    ],
)
def test_a_vector_of_another_model_is_refused(lm, tmp_path, made, said):
    write_control_vector(tmp_path / "v.gguf", made, "gemma3", ABOUT)
    with pytest.raises(UserError) as error:
        steered(lm, tmp_path / "v.gguf")
    assert said in str(error.value)


def test_a_band_that_is_auto_takes_all_blocks_of_the_file(lm, tmp_path, directions):
    write_control_vector(tmp_path / "v.gguf", directions, "gemma3", ABOUT)
    assert from_file.blocks(lm, f"file:{tmp_path / 'v.gguf'}") == (1, 2, 3)
    write_control_vector(tmp_path / "w.gguf", {1: directions[1], 4: directions[2]}, "gemma3", ABOUT)
    with pytest.raises(UserError, match="a direction for block 4, 'random:tiny' has blocks 0 to 3"):
        from_file.blocks(lm, f"file:{tmp_path / 'w.gguf'}")


def test_a_run_keeps_the_vector_of_its_file_in_all_rounds(tmp_path, monkeypatch, directions, capsys):
    """The file is read in the first round only; a band that is auto is that of the file."""
    monkeypatch.chdir(tmp_path)
    write_control_vector(tmp_path / "v.gguf", {n: 20 * v for n, v in directions.items()}, "gemma3", ABOUT)
    few = [*FEW, *BRIEF, "--rounds", "2", "--steer.band", "auto", "--anyway"]
    directions_of, asked = from_file.directions, []
    recording = lambda lm, method, layers: asked.append(method) or directions_of(lm, method, layers)  # noqa: E731
    monkeypatch.setattr(from_file, "directions", recording)
    main(["run", "tiny-random", "--steer.method", "file:v.gguf", "--out", "out", *few])
    (run,) = (tmp_path / "out").iterdir()
    own = run.relative_to(tmp_path) / "r00" / "vector" / "vector.safetensors"
    assert asked == [f"file:{tmp_path / 'v.gguf'}"] * 2 + [f"file:{own}"]  # survey, round 0, round 1
    wanted = 20 * torch.stack(list(directions.values()))
    for number in (0, 1):
        stored = load_file(run / f"r0{number}" / "vector" / "vector.safetensors")["direction"]
        assert torch.equal(stored, wanted)
    config = json.loads((run / "config.json").read_text())
    assert config["steer"]["method"] == f"file:{tmp_path / 'v.gguf'}"
    assert "cosine of two halves" not in (run / "report.html").read_text()
    card = (run / "adapter" / "README.md").read_text()
    assert "--steer.method file:v.gguf" in card and str(tmp_path) not in card
    (tmp_path / "v.gguf").unlink()
    main(["run", "--resume", str(run)])
    export_gguf(run, tmp_path / "back.gguf", 1, "vector")
    dose = json.loads((run / "r01" / "dose.json").read_text())["dose"]
    back = from_file.read(f"file:{tmp_path / 'back.gguf'}")
    np.testing.assert_allclose(torch.stack(list(back.values())), dose * wanted, rtol=1e-6)
