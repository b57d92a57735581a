"""A walk over model families: what we compute is what transformers and PEFT compute, or the model is refused at load.

Each family is a model of four blocks with random weights (families.json). The reference is plain transformers with
eager attention, one row at a time, without cache and padding.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import steer_heal
from steer_heal.bake.student import Student
from steer_heal.config import AdapterConfig, ModelConfig, UserError
from steer_heal.gate.conftest import tiny
from steer_heal.gate.families import REFUSED, STATE, WALK, WORK, config_of, save
from steer_heal.heal.barrier import position_losses
from steer_heal.model import agreement, packing
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.decode import decode, rows_that_fit
from steer_heal.model.forward import forward, last_token_states, states
from steer_heal.model.likelihood import row_nll, token_kl
from steer_heal.model.lm import LM, PLAIN, Row
from steer_heal.model.loading import load
from steer_heal.model.random_weights import build_random
from steer_heal.model.steering import Steering, Vector

TOKENS = 8
QUICK = (
    "gemma3",
    "llama-tied",
    "phi3",
    "qwen3-moe",
)  # `just check` walks these; `just test` walks all


@dataclass(frozen=True)
class Family:
    lm: LM
    plain: PreTrainedModel
    folder: Path

    def logits(self, ids):
        with torch.no_grad():
            return self.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def log_probs(self, row):
        """Of each completion token of the row."""
        log_p = self.logits(row.prompt + row.completion).log_softmax(-1)
        return log_p[len(row.prompt) - 1 : -1].gather(1, torch.tensor(row.completion)[:, None])[:, 0]

    def write(self, prompt, tokens=TOKENS):
        """Greedy completion, without an end token."""
        ids = self.plain.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return ids[0, len(prompt) :].tolist()

    def hooked(self, vector, dose):
        """The plain model with hand-made hooks."""

        def add(i):
            return lambda _module, _args, out: out + dose * vector.direction[i]

        blocks = self.plain.get_decoder().layers
        return [blocks[layer].register_forward_hook(add(i)) for i, layer in enumerate(vector.layers)]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.run) for name in WORK]
)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save(request.param, folder)
    lm = replace(load(ModelConfig(str(folder), "none", "float32", "cpu")), end_tokens=frozenset())
    return Family(lm, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), folder)


@pytest.fixture(scope="module")
def rows(family):
    """Rows of unequal length, one longer than a sliding window of 32."""
    asked = ["Hi.", "How long should I boil an egg for a soft yolk?", "Why do people cry? " * 9]
    # The last tokens differ: some of these models write what they read last.
    prompts = [[*family.lm.prompt(text), 300 + 50 * i] for i, text in enumerate(asked)]
    assert len(prompts[0]) < 32 < len(prompts[-1])
    return [Row(prompt, [700 + i, 90 * (i + 1), 5, 41]) for i, prompt in enumerate(prompts)]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_likelihoods_are_those_of_plain_logits(family, rows):
    for found, row in zip(row_nll(family.lm, rows), rows, strict=True):
        close(found, -family.log_probs(row))
    hidden = states(family.lm, rows)
    (kl,) = token_kl(family.lm.head, hidden[:1], hidden[1:2])
    p, q = (family.logits(row.prompt + row.completion)[len(row.prompt) - 1 : -1].log_softmax(-1) for row in rows[:2])
    close(kl, (p.exp() * (p - q)).sum(-1))


def test_greedy_decoding_is_generate_also_when_rows_end_early(family, rows, monkeypatch):
    prompts = [row.prompt for row in rows]
    plain = [done.ids for done in decode(family.lm, prompts, TOKENS)]
    assert plain == [family.write(prompt) for prompt in prompts]
    monkeypatch.setattr(packing, "PACK_FROM_TOKENS", 1)
    # The first row fills the batch. It ends and leaves; another goes on.
    first, end = next((i, t) for i, ids in enumerate(plain) for t in ids if any(t not in other for other in plain))
    order = [first, *(i for i in range(len(plain)) if i != first)]
    ending = replace(family.lm, end_tokens=frozenset({end}))
    for i, after in zip(order, decode(ending, [prompts[i] for i in order], TOKENS), strict=True):
        before = plain[i]
        assert after.ids == before[: before.index(end) + 1 if end in before else TOKENS]
    assert rows_that_fit(family.lm, 10, 10) >= 1


def test_block_states_are_the_hidden_states(family, rows):
    prompts = [row.prompt for row in rows]
    for layers in ((0, 2), (0, 1, 2)):
        for found, prompt in zip(last_token_states(family.lm, prompts, layers), prompts, strict=True):
            with torch.no_grad():
                hidden = family.plain(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            close(found, torch.stack([hidden[layer + 1][0, -1] for layer in layers]))


def test_answers_are_read_as_from_plain_logits(family, rows):
    choices = [[[7], [300, 41, 8]], [[9, 10], [11]], [[7, 7, 7, 7, 7, 7]]]
    found = choice_log_probs(family.lm, [row.prompt for row in rows], choices)
    for row, options, answers in zip(rows, choices, found, strict=True):
        for option, answer in zip(options, answers, strict=True):
            close(answer, family.log_probs(Row(row.prompt, option)))


def test_steering_is_a_hook_on_plain_transformers(family, rows):
    generator = torch.Generator().manual_seed(1)
    vector, doses = Vector((1, 2), torch.randn(2, 64, generator=generator)), torch.tensor([0.5, -1.0, 2.0])
    steered = Steering(vector, doses)
    nll = row_nll(family.lm, rows, steered)
    written = decode(family.lm, [row.prompt for row in rows], TOKENS, steered)
    for row, dose, found, done in zip(rows, doses, nll, written, strict=True):
        handles = family.hooked(vector, dose)
        expected, text = -family.log_probs(row), family.write(row.prompt)
        for handle in handles:
            handle.remove()
        close(found, expected)
        assert done.ids == text
        assert not torch.allclose(expected, -family.log_probs(row), atol=1e-2)


@pytest.fixture
def student(family, request):
    """A student whose round is drawn at random. Afterwards the model is plain again."""
    student = Student(family.lm)
    student.begin_round(AdapterConfig(r=2, band=(0.0, 1.0)), 0)
    request.addfinalizer(student.peft.unload)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factors in student.factors():
            factors.b.copy_(0.1 * torch.randn(factors.b.shape, generator=generator))
    return student


def test_a_gradient_step_is_that_of_full_logits(family, rows, student):
    lm = student.lm
    with student.view(now=0.0):
        reference = states(lm, rows)
    targets = torch.tensor([token for row in rows for token in row.completion])
    with student.view(train=True):
        hidden = torch.cat(forward(lm, rows))
        nll, kl = position_losses(lm.head, hidden, targets, torch.cat(reference), "kl_rev")
        (nll.mean() + kl.mean()).backward()
        found = [p.grad.clone() for p in student.trainable()]
        student.peft.zero_grad()
        expected = []
        for row in rows:
            logits = lm.model(input_ids=torch.tensor([row.prompt + row.completion])).logits[0]
            log_p = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
            log_q = family.logits(row.prompt + row.completion)[len(row.prompt) - 1 : -1].log_softmax(-1)
            nll = -log_p.gather(1, torch.tensor(row.completion)[:, None])[:, 0]
            expected.append(nll + (log_p.exp() * (log_p - log_q)).sum(-1))
        torch.cat(expected).mean().backward()
    scale = max(p.grad.abs().max() for p in student.trainable())
    assert scale > 0
    for gradient, parameter in zip(found, student.trainable(), strict=True):
        close(gradient / scale, parameter.grad / scale)


def test_what_is_folded_and_written_is_the_student_on_plain_peft(family, rows, student, tmp_path):
    ids = torch.tensor([rows[1].prompt])
    with torch.no_grad():
        expected = student.lm.model(ids).logits
        assert not torch.allclose(expected[0], family.logits(rows[1].prompt), atol=1e-2)
        student.save(tmp_path / "adapter")
        student.fold()
        close(student.lm.model(ids).logits, expected)
        plain = AutoModelForCausalLM.from_pretrained(family.folder)
        close(PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits, expected)
        close(PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()(ids).logits, expected)


def test_attention_that_torch_cannot_fuse_is_computed_in_full_and_the_run_says_so(family):
    """Under torch's function, which knows no cap and no sinks, the states would be others."""
    implementation = family.lm.decoder.config._attn_implementation
    eager = family.lm.model.config.model_type in ("gemma2", "gpt_oss")
    assert (implementation, family.lm.fused_attention) == (("eager", False) if eager else ("sdpa", True))


def shifts_logits(model, forward, **given):
    out = forward(**given)
    return replace(out, logits=out.logits + torch.arange(out.logits.shape[-1]))


def norms_states(model, forward, **given):
    with torch.no_grad():
        out = model.get_decoder()(**given)
        hidden = torch.nn.functional.normalize(out.last_hidden_state, dim=-1)
        return replace(CausalLMOutput(), logits=model.lm_head(hidden))


def two_heads(model, forward, **given):
    out = forward(**given)
    return replace(out, logits=torch.cat([out.logits, out.logits], dim=-1))


@pytest.mark.parametrize("wrong, said", [(shifts_logits, "scaled"), (norms_states, "scaled"), (two_heads, "one head")])
def test_logits_that_we_do_not_compute_are_refused(lm, wrong, said):
    forward = lm.model.forward
    lm.model.forward = lambda **given: wrong(lm.model, forward, **given)
    with pytest.raises(UserError, match=said):
        agreement.agreed(lm)


def forgets_padding(given):
    return given | {"attention_mask": None}


def forgets_positions(given):
    return given | {"position_ids": None, "attention_mask": None}


def forgets_the_past(given):
    return given | {"past_key_values": None}


@pytest.mark.parametrize("wrong", [forgets_padding, forgets_positions, forgets_the_past])
def test_a_decoder_that_does_not_do_what_it_is_asked_is_refused(lm, wrong):
    forward = lm.decoder.forward
    lm.decoder.forward = lambda **given: forward(**wrong(given))
    with pytest.raises(UserError, match=r"would differ|cannot be run") as refused:
        agreement.agreed(lm)
    assert "\n" not in str(refused.value) and "families that work: cohere, deepseek_v3" in str(refused.value)


def test_blocks_that_return_a_tuple_are_read_and_steered(lm, vector):
    """As those of some older families do. The hooks must see the residual stream and leave the rest alone."""
    row = Row([5, 6, 7], [8, 9])
    steered = Steering(vector, torch.ones(1))
    expected = row_nll(lm, [row], steered)[0], last_token_states(lm, [row.prompt], (1, 2))
    for i, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda _module, _args, out: (out, "attention"))
        following = lm.blocks[i + 1] if i + 1 < len(lm.blocks) else lm.decoder.norm
        following.register_forward_pre_hook(lambda _module, args: (args[0][0], *args[1:]))
    found = row_nll(lm, [row], steered)[0], last_token_states(lm, [row.prompt], (1, 2))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("quant, dtype", [("none", "bfloat16"), ("nf4", "bfloat16"), ("nf4", "float32")])
def test_rounding_is_no_disagreement(quant, dtype):
    assert tiny(quant=quant, dtype=dtype).after_head == PLAIN


def test_asking_at_load_changes_no_random_state_and_leaves_no_hook(lm):
    before = torch.random.get_rng_state()
    assert agreement.agreed(lm) == lm
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert len(lm.blocks) == 4


def test_the_documentation_lists_the_families_of_the_walk():
    table = Path(steer_heal.__file__).parents[2] / "docs" / "models.md"
    if not table.exists():
        pytest.skip("the documentation is not installed with the package")
    kinds = {name: WALK["families"][name]["model_type"] for name in WALK["families"]}
    assert set(agreement.FAMILIES) == {kinds[name] for name in WORK}
    listed = re.findall(r"^\| `(\w+)` \|.*\| (yes|no: .+) \|$", table.read_text("utf-8"), re.MULTILINE)
    assert {kind for kind, works in listed if works == "yes"} == set(agreement.FAMILIES)
    assert {kind for kind, works in listed if works != "yes"} == {kinds[name] for name in REFUSED}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_that_is_not_supported_is_refused_in_one_line(name, tmp_path):
    """Where the config tells it, no weights are read: here there are none."""
    if REFUSED[name] == STATE:
        build_random("tiny", tmp_path)
        (tmp_path / "model.safetensors").unlink()
        config_of(name).save_pretrained(tmp_path)
    else:
        save(name, tmp_path)
    with pytest.raises(UserError, match=re.escape(REFUSED[name])) as refused:
        load(ModelConfig(str(tmp_path), "none", "float32", "cpu"))
    assert "\n" not in str(refused.value)
    assert WALK["families"][name]["model_type"] in str(refused.value)
