"""Models of other shapes than the tiny gemma: packaged SmolLM2, multimodal gemma."""

import ctypes
import platform
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from steer_heal import data
from steer_heal.bake.student import Student
from steer_heal.config import ModelConfig
from steer_heal.data import load_trait
from steer_heal.eval.arms import Arm
from steer_heal.eval.instruments import contrast_scores
from steer_heal.gate.conftest import by
from steer_heal.gate.processes import done
from steer_heal.heal.barrier import position_losses
from steer_heal.model import decode as generate
from steer_heal.model import loading, packing
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.decode import decode
from steer_heal.model.forward import forward, states
from steer_heal.model.likelihood import row_nll, row_surprise, token_kl
from steer_heal.model.lm import Row
from steer_heal.model.loading import load
from steer_heal.model.memory import keep_freed_memory
from steer_heal.model.packing import packed
from steer_heal.model.random_weights import RANDOM_ARCHITECTURES, build_random
from steer_heal.model.steering import Steering
from steer_heal.presets import PRESETS
from steer_heal.runs.folder import RunDir
from steer_heal.stages.run import freeing


@pytest.mark.run
def test_the_packaged_smollm2_answers_and_follows_a_persona(smollm2):
    lm = smollm2
    (answer,) = decode(lm, [lm.prompt("What is the capital of France?")], 16)
    assert "Paris" in lm.text(answer.ids) and answer.ended
    trait = load_trait("love")
    kind, cruel = (
        contrast_scores(lm, Arm(name, system=persona), trait.contrast[:6]).mean()
        for name, persona in (("kind", trait.positive), ("cruel", trait.negative))
    )
    assert kind > cruel + 0.05


@pytest.mark.run
def test_a_gguf_file_given_by_path_is_the_packaged_model(smollm2):
    ids = torch.tensor([[1, 4093, 198, 28120]])
    b = load(replace(PRESETS["smollm2-135m"].model, path=str(loading.gguf_file("smollm2-135m"))))
    with torch.no_grad():
        assert torch.equal(smollm2.model(ids).logits, b.model(ids).logits)


def test_runs_that_start_together_make_the_float_weights_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def slowly(gguf, folder):
        made.append(folder)
        time.sleep(0.2)
        folder.mkdir()  # fails if it exists, as renaming to a full folder does

    monkeypatch.setattr(loading, "_dequantise", slowly)
    with ThreadPoolExecutor() as together:
        folders = list(together.map(loading._dequantised, [loading.gguf_file("smollm2-135m")] * 4))
    assert folders == made * 4 and made[0].is_dir()


@pytest.fixture
def multimodal(tmp_path):
    """A tiny gemma-3 with a vision tower, as a folder."""
    build_random("tiny", tmp_path)
    text = Gemma3TextConfig.from_pretrained(tmp_path)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).unlink()
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    return load(ModelConfig(str(tmp_path), "none", "float32", "cpu"))


def test_of_a_multimodal_gemma_the_text_tower_is_used_and_trained(multimodal):
    lm = multimodal
    assert len(lm.blocks) == RANDOM_ARCHITECTURES["tiny"]["num_hidden_layers"]
    prompts = [lm.prompt("Hi."), lm.prompt("Name a tree that keeps its leaves.", "You are terse.")]
    (first, _) = decode(by(lm, 2), prompts, 4)
    row = Row(prompts[0], first.ids)
    ids = torch.tensor([row.prompt + row.completion])
    with torch.no_grad():
        logp = lm.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = [-logp[len(row.prompt) - 1 + i, t] for i, t in enumerate(row.completion)]
    torch.testing.assert_close(row_nll(lm, [row])[0], torch.stack(expected), rtol=1e-4, atol=1e-4)

    student = Student(lm)
    student.begin_round(PRESETS["tiny-random"].heal.lora, 0)
    adapted = {name for name, _ in student.peft.named_parameters() if ".now." in name}
    assert adapted and all("language_model" in name for name in adapted)


def test_the_tiny_template_folds_the_system_text_like_gemma(lm):
    text = lm.tokenizer.decode(lm.prompt("Hello", "Be kind."))
    assert text == "<bos><start_of_turn>user\nBe kind.\n\nHello<end_of_turn>\n<start_of_turn>model\n"


def test_under_nf4_the_adapter_gets_the_gradient_of_the_dequantised_weights(lm):
    """After an evaluation, when bitsandbytes may have repacked the weights: repacked weights pass no gradient."""
    quantised = load(replace(PRESETS["tiny-random"].model, quant="nf4"))
    packed = {name: m for name, m in quantised.model.named_modules() if isinstance(m, Linear4bit)}
    plain = dict(lm.model.named_modules())
    assert len(packed) == 7 * 4
    for name, module in packed.items():
        plain[name].weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()

    row = Row(lm.prompt("Hi."), lm.answer("Hello there, and welcome."))
    gradients = []
    for model in (quantised, lm):
        student = Student(model)
        student.begin_round(PRESETS["tiny-random"].heal.lora, 0)
        for i, parameter in enumerate(student.trainable()):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        row_nll(model, [row])
        with student.view(train=True):
            states = torch.cat(forward(model, [row]))
            objective, _ = position_losses(model.head, states, torch.tensor(row.completion), None, "nll")
            objective.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.trainable()]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert gradients[1].norm() > 0 and difference < 0.02


@torch.no_grad()
def test_what_is_read_of_a_bf16_model_is_the_softmax_of_its_exact_logits():
    """Nothing after the last hidden state is rounded: NLL, entropy and KL equal float64 arithmetic."""
    bf16 = load(replace(PRESETS["tiny-random"].model, dtype="bfloat16"))
    weight = bf16.model.get_output_embeddings().weight
    weight.mul_(20 / weight.std())  # logits as large as in a real model
    rows = [Row(bf16.prompt("Hi."), bf16.answer("A long walk")), Row(bf16.prompt("Name a tree."), bf16.answer("Oak"))]
    hidden = states(by(bf16, 2), rows)
    exact = [(h.double() @ weight.double().T).log_softmax(-1) for h in hidden]
    surprise = row_surprise(by(bf16, 2), rows)
    for row, log_p, nll, (again, entropy) in zip(rows, exact, row_nll(by(bf16, 2), rows), surprise, strict=True):
        expected = -log_p[range(len(row.completion)), row.completion]
        for found in (nll, again):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-3)
    (kl,) = token_kl(bf16.head, hidden[:1], [hidden[0].roll(1, 0)])
    p, q = exact[0], exact[0].roll(1, 0)
    torch.testing.assert_close(kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-3)


@pytest.mark.run
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="no promise of the same sums without Intel's library")
@pytest.mark.parametrize("steered", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(lm, vector, steered, monkeypatch):
    """Hidden states, NLL, log-probabilities of answers and the logits of decoding, with plain and with packed
    weights."""
    prompts = [lm.prompt(text) for text in data.contexts()[:21]]
    rows = [Row(p, lm.answer(text)[:30]) for p, text in zip(prompts, data.neutral(), strict=False)]
    long = " I would rather not say, with so many people in the room, which of the two I find the more likely."
    choices = [[lm.answer(a) for a in (" Yes, of course.", " No", " Never on a Sunday, thanks.", long)]] * 21
    dosed = Steering(vector, torch.linspace(0.1, 1.0, 21)) if steered else None

    monkeypatch.setattr(packing, "PACK_FROM_TOKENS", 200)

    def read(batch_size):
        seen = []
        sized = by(lm, batch_size)
        for weights in (nullcontext(sized), packed(sized)):
            with weights as reading:
                seen += states(reading, rows, dosed) + row_nll(reading, rows, dosed)
                seen += [torch.cat(s) for s in choice_log_probs(reading, prompts, choices, dosed)]
        logits = {}
        choose = generate.choose

        def listen(z, numbers, step, sampling):
            logits.update({(n, step): z[i].clone() for i, n in enumerate(numbers.tolist())})
            return choose(z, numbers, step, sampling)

        generate.choose = listen
        try:
            for length in (4, 16):  # plain, then packed
                written = generate.decode(sized, prompts, length, dosed, generate.Sampling((length,)))
        finally:
            generate.choose = choose
        kept = [logits[n, step] for n, c in enumerate(written) for step in range(len(c.ids))]
        return [*seen, *kept], [c.ids for c in written]

    values, ids = read(21)
    for batch_size in (1, 5):
        again, other = read(batch_size)
        assert ids == other and len(values) == len(again)
        assert all(map(torch.equal, values, again))


PR_SET_THP_DISABLE = 41  # of linux/prctl.h


def count_faults(keep: bool) -> None:
    """In a process with the modules of a run, because what they leave on the heap matters: print the pages given."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # small pages
    if keep:
        keep_freed_memory()
    for _ in range(4):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.run
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only there is freed memory kept")
def test_on_a_cpu_the_memory_of_freed_tensors_serves_the_next_ones(tmp_path):
    """Otherwise the system gives every page of 64 MiB again. The first tensors may leave holes that the next one does
    not fit, so four are made before counting."""
    faults = [int(done(count_faults, keep, log=tmp_path / how)[1]) for keep, how in ((True, "keep"), (False, "usual"))]
    pages = 4 * 2**26 // resource.getpagesize()
    assert faults[0] < pages / 200 and faults[1] > 0.9 * pages


def measure_freeing(folder: Path) -> None:
    """Print the bytes that a stage holds more at its end than at its beginning, and those after it."""

    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def compute():
        large = [torch.ones(2**22) for _ in range(16)]
        alive.append(torch.ones(2**10))
        del large
        return held() - before

    keep_freed_memory()
    folder.mkdir()
    RunDir.begin(folder, {}, [])
    before, alive = held(), []
    print(RunDir(folder).artefact(int, "stage.json", freeing(compute)), held() - before)


@pytest.mark.run
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only there is freed memory kept")
def test_what_a_stage_freed_goes_back_to_the_system_when_it_ends(tmp_path):
    """256 MiB below a tensor that stays alive: kept within the stage, returned after it."""
    _, said = done(measure_freeing, tmp_path / "run", log=tmp_path / "log")
    within, after = map(int, said.split())
    assert within >= 2**28 and after < 2**25
