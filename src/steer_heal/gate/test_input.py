"""A user's mistake ends with one line that names the value and the remedy, with code 2, and leaves no files.

Trait files have their own table in `test_traits`, plans of sweeps in `test_sweep`, damaged run folders in
`test_resume`.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from steer_heal import data
from steer_heal.cli import main
from steer_heal.commands import run as runner
from steer_heal.config import COMMON, RunConfig, UserError, flag, knobs
from steer_heal.demands import check
from steer_heal.gate.conftest import LONG, turned
from steer_heal.model import loading
from steer_heal.model.random_weights import build_random
from steer_heal.presets import PRESETS
from steer_heal.sweep.plan import parsed

pytestmark = pytest.mark.run

RUN = ["run", "tiny-random"]
FLAGS = [  # out of range, contradictory or misspelt
    ("--rounds 0", "rounds is 0: it must lie in [1, inf)"),
    ("--rounds x", "Error parsing --rounds: invalid literal for int() with base 10: 'x'"),
    ("--seed 1.5", "Error parsing --seed"),
    ("--heal.barrier.tua 3", "--heal.barrier.tua, 3 (did you mean --heal.barrier.tau?)"),
    ("--hael.barrier.tau 3", "(did you mean --heal.barrier.tau"),
    ("--heal.barrier.agg mena", "invalid choice 'mena' for argument '--heal.barrier.agg'. Expected one of ('mean'"),
    ("--heal.barrier.reg", "--heal.barrier.reg"),
    ("--steer.band 0.3", "Error parsing --steer.band"),
    ("--steer.band 0.9 0.1", "steer.band is 0.9 0.1: give two numbers in [0, 1], the smaller one first"),
    ("--heal.lora.band 0.5 1.5", "heal.lora.band is 0.5 1.5: give two numbers in [0, 1]"),
    ("--steer.method pac", "steer.method 'pac' is not known (did you mean 'pca'?): choose mean_diff, pca"),
    ("--steer.without luv", "trait 'luv' is not built in and no such .toml file exists"),
    ("--trait love --steer.without calm love", "steer.without 'love' is the trait that is steered"),
    ("--steer.without calm --steer.method random", "steer.without has no meaning with steer.method random: choose"),
    ("--steer.read answer --steer.method file:v", "steer.read answer has no meaning with steer.method file:v: choose"),
    ("--steer.read end", "invalid choice 'end'"),
    ("--steer.n-contexts 257", "steer.n_contexts is 257: it must lie in [2, 256]"),
    ("--dose.range 2 1", "dose.range is 2.0 1.0: give two numbers in (0, inf), the smaller one first"),
    ("--dose.range 1 1", "dose.range is 1.0 1.0: the first number must be below the second"),
    ("--dose.range nan 1", "dose.range is nan 1.0: give two numbers in (0, inf)"),
    ("--dose.range 1 inf", "dose.range is 1.0 inf"),
    ("--dose.steps 1", "dose.steps is 1: it must lie in [2, inf)"),
    ("--dose.survival 0", "dose.survival is 0.0: it must lie in (0, 1]"),
    ("--heal.text mine", "invalid choice 'mine'"),
    ("--dose.kl-target 0", "dose.kl_target is 0.0"),
    ("--distil.n-keep 0", "distil.n_keep is 0: it must lie in [1, inf)"),
    ("--model.decode-rows 0", "model.decode_rows is 0"),
    ("--model.decode-rows many", "Error parsing --model.decode-rows"),
    ("--model.read-rows 0", "model.read_rows is 0"),
    ("--filter.incoherence inf", "filter.incoherence is inf"),
    ("--filter.loops maybe", "maybe"),
    ("--heal.training.lr nan", "heal.training.lr is nan: it must lie in (0, inf)"),
    ("--heal.training.lr -1", "heal.training.lr is -1.0"),
    ("--heal.barrier.tau auot", "Error parsing --heal.barrier.tau"),
    ("--heal.anchor.tau 0", "heal.anchor.tau is 0.0: it must lie in (0, inf)"),
    ("--heal.anchor.prompts 97", "heal.anchor.prompts is 97: it must lie in [0, 96]"),
    ("--heal.barrier.kind dual --heal.barrier.tau 0", "heal.barrier.kind dual needs a divergence to hold at tau"),
    ("--heal.barrier.reg nll --heal.anchor.prompts 9", "heal.barrier.reg nll has no divergence for heal.anchor"),
    ("--heal.training.optimiser paged_adamw_8bit", "heal.training.optimiser paged_adamw_8bit needs a CUDA GPU"),
    ("--eval.size huge", "invalid choice 'huge'"),
    ("--eval.plain-range 3 3", "eval.plain_range is 3.0 3.0: the first number must be below the second"),
    ("--eval.leave-out profil", "profil"),
    ("--model.device cuda", "model.device is 'cuda' but this machine has no CUDA GPU"),
    ("--model.quant int4", "invalid choice 'int4'"),
    ("--model.path random:huge", "no random architecture 'huge': choose tiny"),
    ("--model.path no/such/folder", "model path 'no/such/folder' does not exist"),
    ("--model.path ./gone.gguf", "model path './gone.gguf' does not exist"),
    ("--trait lov", "trait 'lov' is not built in and no such .toml file exists (did you mean 'love'?)"),
    ("--trait nowhere.toml", "trait 'nowhere.toml' is not built in and no such .toml file"),
    ("--resume nothing-here", "'nothing-here' is no run folder"),
    ("--recompute base.json", "--recompute and --allow-change need a run to resume"),
    ("--track mlflow", "invalid choice 'mlflow'"),
    ("extra", "extra"),
]
COMMANDS = [
    ("run tiny-randm", "preset 'tiny-randm' is not known (did you mean 'tiny-random'?): choose gemma-3-1b"),
    ("run tiny-randm", "tiny-random; or give a model: a hub id (owner/name), a folder or a .gguf file"),
    ("run some/model --model.path other", "run 'some/model' names a model, and so does --model.path 'other'"),
    ("run --seed 1 tiny-random", "the preset comes first: steer-heal run tiny-random"),
    ("run gemma-3-1b", "has no CUDA GPU: choose the preset smollm2-135m"),
    ("rnu", "rnu (did you mean run?), choose run, sweep"),
    ("report", "Missing from steer-heal report"),
    ("report nothing-here", "'nothing-here' is no run folder"),
    ("chat nothing-here", "'nothing-here' is no run folder"),
    ("chat nothing-here --gate nan", "--gate is nan"),
    ("chat nothing-here --max-new-tokens 0", "--max-new-tokens is 0"),
    ("export nothing-here --to there", "'nothing-here' is no run folder"),
    ("export nothing-here", "--to"),
    ("eval no/such/folder", "model path 'no/such/folder' does not exist"),
    ("eval random:tiny --round 1", "--round 1: 'random:tiny' is no run folder"),
    ("eval random:tiny --json gone/record.json", "--json 'gone/record.json': there is no folder 'gone'"),
    ("eval random:tiny --eval.plain-range 2 1", "eval.plain_range is 2.0 1.0"),
    (f"run {'x' * 300}.gguf", "is longer than the file system allows: give a shorter path"),
    (f"eval {'x' * 300}", "is longer than the file system allows: give a shorter path"),
    ("results --out nothing-here", "no folder 'nothing-here'"),
    ("results --csv .", "--csv '.': is a folder"),
    ("bench genrate", "invalid choice 'genrate'"),
    ("bench generate --preset smol", "preset 'smol' is not known (did you mean 'smollm2-135m'?)"),
    ("bench generate --rows 0", "--rows is 0"),
    ("sweep x --grid heal.barrier.agg=mean -- tiny", "after -- give a preset and flags"),
    ("sweep x --seeds a -- tiny-random", "--seeds 'a': write whole numbers"),
    ("sweep x --grid heal.barrier.agg=mena -- tiny-random", "invalid choice 'mena' for argument '--heal.barrier.agg'"),
    ("sweep x -- tiny-random --heal.barrier.tua 3", "(did you mean --heal.barrier.tau?)"),
    ("sweep x --workers 0 -- tiny-random", "--workers 0"),
]


def refused(argv: list[str], capsys) -> str:
    """The one line on stderr of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    said = capsys.readouterr()
    assert end.value.code == 2, said.err
    assert said.out == "" and said.err.startswith("steer-heal: ") and said.err.count("\n") == 1, said
    assert "Traceback" not in said.err and len(said.err) < 600
    return said.err


CASES = [([*RUN, *flags.split()], said) for flags, said in FLAGS] + [(words.split(), said) for words, said in COMMANDS]


@pytest.mark.parametrize(("argv", "message"), CASES, ids=[" ".join(argv) for argv, _ in CASES])
def test_a_mistake_ends_in_one_line_and_leaves_nothing(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(argv, capsys)
    assert message in said, said
    assert not list(tmp_path.iterdir())


# ---- models


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    build_random("tiny", folder)
    return folder


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def as_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def bert(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**small, vocab_size=1024)).save_pretrained(folder)


def fewer_rows(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if weights[name].shape[0] == 1024]:
        weights[name] = weights[name][:900].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", vocab_size=900)


def template(folder: Path, text: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    if text is not None:
        (folder / "chat_template.jinja").write_text(text)


MODELS = [
    (lambda f: template(f, None), "has no chat template"),
    (lambda f: template(f, "{% for m in messages %}{{ m.content }}\n{% endfor %}"), "has no generation prompt"),
    (lambda f: template(f, "{{ raise_exception('only for judges') }}"), "cannot render a user turn: only for judges"),
    (lambda f: template(f, "{% for m in %}"), "cannot render a user turn"),
    (lambda f: (f / "config.json").unlink(), "could not be loaded as a causal language model"),
    (lambda f: (f / "config.json").write_text("{"), "could not be loaded as a causal language model"),
    (lambda f: change(f / "config.json", model_type="gemma99"), "gemma99"),
    (as_pickle, "has no weights as safetensors; pickles (.bin, .pt) are not loaded"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 40), "its weights are damaged"),
    (lambda f: (f / "tokenizer.json").write_text("[]"), "could not be loaded as a causal language model"),
    (bert, "bert"),
    (fewer_rows, "does not match its model: it has token ids up to 1023, the embedding has 900 rows"),
]


@pytest.mark.parametrize(("spoil", "message"), MODELS)
def test_a_model_that_cannot_be_used(sound, tmp_path, capsys, monkeypatch, spoil, message):
    folder = shutil.copytree(sound, tmp_path / "model")
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refused([*RUN, "--model.path", str(folder)], capsys)
    assert message in said and str(folder) in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotImplementedError("no weights map for mistral"), "cannot be read as a GGUF chat model: no weights map"),
        (RuntimeError("size mismatch for q_proj"), "cannot be read as a GGUF chat model: size mismatch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"), "out of memory"),
    ],
)
def test_a_gguf_that_transformers_cannot_convert(tmp_path, capsys, monkeypatch, error, said):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", fails)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert said in refused([*RUN, "--model.path", str(file)], capsys)
    assert [path.name for path in (tmp_path / "cache" / "steer-heal").iterdir()] == ["lock"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no model", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\x07" * 60])
def test_a_gguf_that_is_none(tmp_path, capsys, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    said = refused([*RUN, "--model.path", str(file), "--out", str(tmp_path / "out")], capsys)
    assert str(file) in said and ("is no GGUF file" in said or "cannot be read as a GGUF chat model" in said)
    assert not list((tmp_path / "cache").rglob("*.*")) and not (tmp_path / "out").exists()
    (tmp_path / "folder.gguf").mkdir()
    assert "is a folder" in refused([*RUN, "--model.path", str(tmp_path / "folder.gguf")], capsys)


def test_a_cache_that_cannot_be_written_or_locked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").touch()
    said = refused(["run", "smollm2-135m", "--out", str(tmp_path / "out")], capsys)
    assert re.fullmatch(r"steer-heal: cannot write .*cache/steer-heal: .+\n", said)
    (tmp_path / "cache").unlink()

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on a network disk without a lock daemon
    said = refused(["run", "smollm2-135m", "--out", str(tmp_path / "out")], capsys)
    assert re.fullmatch(r"steer-heal: cannot write .*cache/steer-heal: No locks available\n", said)


def test_an_adapter_that_does_not_fit(sound, tmp_path, capsys):
    main([*RUN, "--rounds", "1", "--eval.leave-out", "profile", "plain", "--out", str(tmp_path / "out")])
    (run,) = (tmp_path / "out").iterdir()
    adapter, other = shutil.copytree(run / "adapter", tmp_path / "adapter"), shutil.copytree(sound, tmp_path / "other")
    change(other / "config.json", intermediate_size=96)
    weights = load_file(other / "model.safetensors")
    for name, value in weights.items():
        if "mlp" in name:
            weights[name] = (value[:96] if "down" not in name else value[:, :96]).clone()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    said = refused(["eval", str(adapter), "--base", str(other)], capsys)
    assert f"adapter {str(adapter)!r} does not fit 'other': name its base with --base" in said
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    assert "pickles are not loaded" in refused(["eval", str(adapter), "--base", "random:tiny"], capsys)
    (adapter / "adapter_config.json").write_text("{}")
    assert "is no config of an adapter" in refused(["eval", str(adapter)], capsys)
    assert "--round 7: rounds 0 to 0 are finished" in refused(["export", str(run), "--to", "x", "--round", "7"], capsys)
    assert "is not an empty folder" in refused(["export", str(run), "--to", str(other)], capsys)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        assert f"{str(tmp_path / 'file')!r} is no folder: give another" in refused([*RUN, "--out", str(out)], capsys)


# ---- any values

NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(-(10**20), 10**20), st.floats(allow_nan=True, allow_infinity=True)
)


@settings(
    max_examples=150 if LONG else 75, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    st.sampled_from([flag(knob.name) for knob in knobs(RunConfig())]),
    st.lists(st.one_of(NUMBERS.map(str), st.text(max_size=6)), max_size=3),
)
def test_any_value_of_any_flag_is_taken_or_refused_in_a_line(name, values):
    try:
        config = parsed(("tiny-random", name, *values))
        check(config)
    except UserError as error:
        assert str(error) and len(str(error)) < 1000
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & {*values}  # help was asked for
    else:
        numbers = [
            v for knob in knobs(config) for v in (knob.value if isinstance(knob.value, tuple) else (knob.value,))
        ]
        assert all(math.isfinite(number) for number in numbers if isinstance(number, float))


SMALL = turned(
    PRESETS["tiny-random"],
    {
        "rounds": 1,
        "steer.n_contexts": 4,
        "dose.steps": 2,
        "dose.prompts": 2,
        "distil.n_keep": 6,
        "distil.max_new_tokens": 4,
        "heal.training.epochs": 1,
        "eval.leave_out": ("off_target", "canary", "profile", "plain", "frames", "refusals", "relevance"),
    },
)
PART = st.floats(0, 1)
SANE = {  # values that a user may choose, extremes included
    "steer.band": st.one_of(st.just("auto"), st.tuples(PART, PART)),
    "steer.n_contexts": st.integers(0, 5),
    "steer.read": st.sampled_from(["assistant_tag", "answer"]),
    "steer.without": st.sampled_from([(), ("calm",), ("calm", "calm"), ("love",)]),
    "dose.range": st.tuples(st.floats(0, 3), st.floats(0, 9)),
    "dose.survival": PART,
    "dose.kl_target": st.one_of(st.just("none"), st.floats(0, 9)),
    "filter.incoherence": st.sampled_from([-9.0, 0.0, 1e9]),
    "filter.loops": st.sampled_from(["strict", "lax", "off"]),
    "heal.text": st.sampled_from(["teacher", "own", "mixed"]),
    "heal.objective": st.sampled_from(["nll", "kl_fwd", "kl_rev"]),
    "heal.target.kind": st.sampled_from(["steered", "mirrored", "focused", "persona"]),
    "heal.barrier.kind": st.sampled_from(["fixed", "dual"]),
    "heal.barrier.reg": st.sampled_from(["nll", "kl_fwd", "kl_rev"]),
    "heal.barrier.agg": st.sampled_from(["mean", "rmse", "p95", "max"]),
    "heal.barrier.reference": st.sampled_from(["prev", "base"]),
    "heal.barrier.tau": st.one_of(st.just("auto"), st.floats(0, 4)),
    "heal.anchor.prompts": st.integers(0, 3),
    "heal.training.op_norm": st.sampled_from([0.0, 0.1]),
    "heal.training.lr": st.floats(0, 10),
    "heal.training.batch": st.integers(0, 9),
    "heal.training.pass_rows": st.integers(0, 4),
    "heal.training.checkpointing": st.booleans(),
    "heal.lora.band": st.tuples(PART, PART),
    "heal.lora.fold_rank": st.integers(0, 3),
}


@settings(max_examples=40 if LONG else 16, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_what_is_accepted_runs_or_is_refused(tmp_path_factory, least, drawn):
    out = tmp_path_factory.mktemp("any")
    names = drawn.draw(st.lists(st.sampled_from(sorted(SANE)), max_size=9, unique=True))
    config = turned(SMALL, {"out": str(out), **{name: drawn.draw(SANE[name]) for name in names}})
    try:
        _, summary = runner.run(config, "tiny-random", [])
        assert len(summary.rounds) == 1
    except UserError as error:
        assert "\n" not in str(error)


def test_help_lists_the_common_flags_and_help_all_every_flag(capsys):
    listed = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            main([*RUN, word])
        assert end.value.code == 0
        listed[word] = {*re.findall(r"--[a-z][\w.-]+", capsys.readouterr().out)} - {"--help", "--help-all"}
    every = [knob for knob in knobs(RunConfig()) if not isinstance(knob.value, bool)]
    assert {flag(knob.name) for knob in every} <= listed["--help-all"] and len(every) <= 60
    assert {flag(knob.name) for knob in every if COMMON in knob.marks} == listed["--help"] - {"--config"}
    assert 18 <= len(listed["--help"]) <= 25


def test_data_of_the_presets_is_there():
    trait = data.load_trait("love")
    for name, config in PRESETS.items():
        check(config)
        assert config.eval.counts.contrast <= len(trait.contrast), name
