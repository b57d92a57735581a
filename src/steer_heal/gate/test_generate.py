"""Batched decoding against one row at a time through plain full forward passes."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from steer_heal.gate.conftest import DEVICE, by
from steer_heal.model import batching, forward, packing
from steer_heal.model import decode as generate
from steer_heal.model.decode import Sampling, choose, decode, uniforms
from steer_heal.model.likelihood import row_nll
from steer_heal.model.lm import Row
from steer_heal.model.memory import free_main_memory
from steer_heal.model.steering import Steering, steering

pytestmark = pytest.mark.device
TOKENS = 12
DOSES = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0])


def after_a_persona(lm):
    """Prompts of very different lengths that all start with the same persona."""
    texts = ["Hi.", "How long should I boil an egg?", "Name a tree.", "Why do people cry? " * 9, "Go on"]
    return [
        lm.prompt(text, system="You are somebody who loves every living thing, and says so. " * 3) for text in texts
    ]


def watched(monkeypatch, module):
    """A list that collects the shared prefixes that `module` computes from now on."""
    seen, prefix = [], module.prefix
    monkeypatch.setattr(module, "prefix", lambda lm, ids, *rest: seen.append(ids) or prefix(lm, ids, *rest))
    return seen


def slow_greedy(lm, prompt, vector, dose, tokens):
    """Greedy decoding without cache, batch or padding: a full forward pass per token, the vector added by a hook."""

    def add(index):
        return lambda module, args, output: output + dose * vector.direction[index].to(output.device)

    handles = [lm.blocks[layer].register_forward_hook(add(i)) for i, layer in enumerate(vector.layers)]
    ids = list(prompt)
    try:
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(lm.model(torch.tensor([ids], device=lm.device)).logits[0, -1].argmax()))
            if ids[-1] in lm.end_tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("common", [True, False], ids=["shared prefix", "no sharing"])
@pytest.mark.parametrize("windowed", [True, False])
def test_batched_steered_decoding_equals_one_at_a_time(lm, prompts, vector, batch_size, common, windowed, monkeypatch):
    """The shared prefix is computed once per batch. With sliding windows there is none: padding comes after it."""
    if common:
        prompts = after_a_persona(lm)
    if not windowed:
        lm.model.config.layer_types = ["full_attention"] * 4
    assert max(map(len, prompts)) > 2 * lm.model.config.sliding_window
    prefixes = watched(monkeypatch, generate)
    batched = decode(by(lm, batch_size), prompts, TOKENS, Steering(vector, DOSES))
    assert len(prefixes) == (math.ceil(len(prompts) / batch_size) if common and not windowed else 0)
    assert all(len(ids) >= batching.ROUND for ids in prefixes)
    alone = [slow_greedy(lm, p, vector, float(c), TOKENS) for p, c in zip(prompts, DOSES, strict=True)]
    assert [c.ids for c in batched] == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_the_dose_changes_the_text_and_zero_leaves_it_alone(lm, prompts, vector):
    plain = decode(lm, prompts, TOKENS)
    assert decode(lm, prompts, TOKENS, Steering(vector, torch.zeros(5))) == plain
    assert decode(lm, prompts, TOKENS, Steering(vector, torch.full((5,), 2.0))) != plain


def test_rows_that_end_leave_and_the_rest_are_unmoved(lm, prompts):
    """Makes a token that some rows write early an end token. The other rows must write the same as before."""
    plain = decode(lm, prompts, TOKENS)
    early = plain[0].ids[2]
    ending = replace(lm, end_tokens=frozenset({early}))
    for before, after in zip(plain, decode(ending, prompts, TOKENS), strict=True):
        cut = before.ids.index(early) + 1 if early in before.ids else TOKENS
        assert after.ids == before.ids[:cut]
        assert after.ended == (early in before.ids)


def test_a_sampled_completion_does_not_depend_on_its_batch(lm, prompts, vector):
    sampling = Sampling(key=(0, 1, "distil"))
    dose = Steering(vector, 0.2 * DOSES)
    together = decode(lm, prompts, TOKENS, dose, sampling)
    assert together == decode(by(lm, 2), prompts, TOKENS, dose, sampling)
    assert together == decode(by(lm, 1), prompts, TOKENS, dose, sampling)
    assert together != decode(lm, prompts, TOKENS, dose, Sampling(key=(0, 2, "distil")))


def test_draws_follow_the_truncated_distribution():
    """100,000 rows of the same logits: frequencies equal the renormalised top-k, top-p probabilities."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -8.0])
    rows = torch.arange(100_000)
    drawn = choose(logits.expand(len(rows), -1), rows, 3, Sampling(("key",), temperature=1.3, top_k=5, top_p=0.9))
    p = torch.softmax(logits[:5].double() / 1.3, 0)
    p[p.cumsum(0) - p >= 0.9] = 0
    frequency = torch.bincount(drawn, minlength=6)[:5] / len(rows)
    assert torch.allclose(frequency.double(), p / p.sum(), atol=0.006)
    assert drawn.max() < 5


def test_noise_is_uniform_and_differs_by_key_row_and_step():
    values = uniforms(("a",), np.arange(50_000), 0)
    assert values.min() >= 0 and values.max() < 1
    assert np.allclose(np.histogram(values, 10, (0, 1))[0] / 50_000, 0.1, atol=0.006)
    assert len(np.unique(values)) == len(values)
    for other in (uniforms(("b",), np.arange(50_000), 0), uniforms(("a",), np.arange(50_000), 1)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.02


@pytest.mark.parametrize("common", [True, False], ids=["shared prefix", "no sharing"])
def test_nll_of_a_batch_equals_one_row_at_a_time(lm, prompts, vector, common, monkeypatch):
    if common:
        prompts = after_a_persona(lm)
    prefixes = watched(monkeypatch, forward)
    rows = [
        Row(p, lm.answer(text)) for p, text in zip(prompts, ["Yes.", "A long walk", "no", "x", "ok ok"], strict=True)
    ]
    batched = row_nll(by(lm, 3), rows, Steering(vector, DOSES))
    assert bool(prefixes) == common
    for row, dose, nll in zip(rows, DOSES, batched, strict=True):
        ids = torch.tensor([row.prompt + row.completion], device=lm.device)
        with torch.no_grad(), steering(lm, Steering(vector, dose[None])) as dial:
            dial.turn(dose[None].to(lm.device))
            logp = lm.model(ids).logits[0].log_softmax(-1).cpu()
        expected = [-logp[len(row.prompt) - 1 + i, token] for i, token in enumerate(row.completion)]
        torch.testing.assert_close(nll, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="weights are packed on a CPU only")
def test_packed_weights_multiply_as_plain_ones_and_are_gone_afterwards(lm, prompts, vector, monkeypatch):
    dose = Steering(vector, DOSES)
    plain = decode(lm, prompts, TOKENS, dose)
    monkeypatch.setattr(packing, "PACK_FROM_TOKENS", 1)
    assert decode(lm, prompts, TOKENS, dose) == plain
    with pytest.raises(RuntimeError, match="stop"), packing.packed(lm, 5 * TOKENS) as laid_out:
        assert laid_out.head_product is not None
        with packing.packed(laid_out) as again:
            assert again is laid_out
        assert any("forward" in module.__dict__ for module in lm.model.modules())
        states = torch.randn(3, 64)
        torch.testing.assert_close(laid_out.head(states), states @ lm.head.weight.T)
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in lm.model.modules())


def test_the_batch_grows_with_free_memory_and_shrinks_with_length(lm, monkeypatch):
    def rows(gigabytes, prompt_tokens=100, new_tokens=100):
        monkeypatch.setattr(generate, "free_memory", lambda device: int(gigabytes * 1e9))
        return generate.rows_that_fit(lm, prompt_tokens, new_tokens)

    assert rows(0.0) == 1
    assert 1 < rows(0.01) < rows(0.02) < rows(50.0) == generate.MOST_ROWS[DEVICE]
    assert rows(0.02, new_tokens=1000) < rows(0.02)
    assert rows(0.02, prompt_tokens=1000) < rows(0.02)


GIB = 2**30


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/\n", {}, 8),  # no limit
        ("0::/\n", {"memory.max": "max", "memory.current": 5 * GIB}, 8),
        ("0::/\n", {"memory.max": 4 * GIB, "memory.current": GIB}, 3),  # v2, a namespace of its own
        ("0::/\n", {"memory.max": GIB, "memory.current": 2 * GIB}, 0),
        (
            "0::/\n",
            {"memory.max": 4 * GIB, "memory.current": 4 * GIB, "memory.stat": f"anon 1\ninactive_file {GIB}"},
            1,
        ),
        (
            "0::/jobs/mine\n",  # v2, nested: the outer group has less left
            {"jobs/mine/memory.max": 6 * GIB, "jobs/mine/memory.current": GIB}
            | {"jobs/memory.max": 9 * GIB, "jobs/memory.current": 7 * GIB},
            2,
        ),
        ("0::/../../other\n", {"memory.max": 4 * GIB, "memory.current": GIB}, 3),  # a path outside the visible tree
        (
            "5:cpu:/a\n4:memory:/a/b\n0::/\n",  # v1
            {"memory/a/b/memory.limit_in_bytes": 3 * GIB, "memory/a/b/memory.usage_in_bytes": GIB}
            | {"memory/a/b/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n"}
            | {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 9 * GIB},
            2.5,
        ),
        (
            "4:memory:/docker/0123\n",  # v1, the host's path is not visible here
            {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": GIB},
            1,
        ),
    ],
)
def test_free_memory_is_no_more_than_every_container_around_leaves(tmp_path, membership, files, left):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:    {8 * GIB // 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
    for name, value in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    assert free_main_memory(tmp_path / "proc", tmp_path / "cgroup") == left * GIB


def test_free_memory_is_what_the_machine_says(lm):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if lm.device.type == "cuda":
        whole = torch.cuda.get_device_properties(lm.device).total_memory
    assert 0 < generate.free_memory(lm.device) < whole
