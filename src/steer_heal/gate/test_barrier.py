"""The fused loss against a naive computation over full logits."""

import itertools

import pytest
import torch

from steer_heal.gate.conftest import DEVICE
from steer_heal.heal import barrier
from steer_heal.heal.barrier import aggregate, hinge, position_losses
from steer_heal.model import lm as lm_module
from steer_heal.model.lm import Head

pytestmark = pytest.mark.device
N, D, V = 23, 8, 50
BIAS = torch.randn(V, generator=torch.Generator().manual_seed(9)).to(DEVICE)
PLAIN = Head(torch.empty(V, D), None)
HEADS = {
    "plain": PLAIN,
    "capped": PLAIN._replace(softcap=5.0),
    "scaled": PLAIN._replace(scale=0.3),
    "all": PLAIN._replace(softcap=5.0, scale=1.7, bias=BIAS),
}
OBJECTIVES = ["nll", "kl_fwd", "kl_rev"]
CASES = list(itertools.product(["kl_fwd", "kl_rev", "nll"], ["mean", "rmse", "p95", "max"], HEADS, OBJECTIVES))


@pytest.fixture(autouse=True, params=["chunks", "whole"])
def small_chunks(monkeypatch, request):
    rows = {"chunks": 16, "whole": N}[request.param]  # two chunks, the second one shorter; or one chunk
    monkeypatch.setattr(barrier, "CHUNK_ROWS", 1)
    monkeypatch.setattr(barrier, "CHUNK_ELEMENTS", {DEVICE: 3 * rows * V})
    monkeypatch.setattr(barrier, "BLOCK_ELEMENTS", {DEVICE: 5 * V})
    monkeypatch.setattr(lm_module, "HEAD_BLOCK", 12)


def draw(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states, reference, teacher = (torch.randn(N, D, generator=generator, dtype=dtype) for _ in range(3))
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    targets = torch.randint(V, (N,), generator=generator)
    return tuple(drawn.to(DEVICE) for drawn in (states, reference, teacher, weight, targets))


def bent(head, z):
    """What the model does to its head's product."""
    z = head.scale * z + (0 if head.bias is None else head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def naive(states, head, targets, teacher, reference, reg, agg, kind, lam=0.7, tau=0.1):
    """The loss from full distributions, one position at a time. Autograd gives the gradient."""

    def log_probs(h):
        z = bent(head, head.weight @ h)
        return z - torch.log(torch.exp(z).sum())

    objective, kl = [], []
    for i in range(len(states)):
        p = log_probs(states[i])
        if kind == "nll":
            objective.append(-p[targets[i]])
        else:
            t = log_probs(teacher[i])
            a, b = (p, t) if kind == "kl_rev" else (t, p)
            objective.append(sum(torch.exp(a[v]) * (a[v] - b[v]) for v in range(V)))
        r = log_probs(reference[i])
        a, b = (p, r) if reg == "kl_rev" else (r, p)
        kl.append((torch.exp(a) * (a - b)).sum())
    objective, kl = torch.stack(objective), torch.stack(kl)
    if reg == "nll":
        return objective.mean()
    ordered = kl.sort().values
    place = 0.95 * (len(kl) - 1)
    low = int(place)
    divergence = {
        "mean": kl.sum() / len(kl),
        "rmse": torch.sqrt((kl**2).sum() / len(kl)),
        "p95": ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]),
        "max": ordered[-1],
    }[agg]
    return objective.mean() + lam * torch.clamp(divergence - tau, min=0)


@pytest.mark.parametrize("reg,agg,name,kind", CASES)
def test_loss_and_gradient_equal_full_logits(reg, agg, name, kind):
    states, reference, teacher, weight, targets = draw()
    states.requires_grad_()
    head = HEADS[name]._replace(weight=weight)
    expected = naive(states, head, targets, teacher, reference, reg, agg, kind)
    (expected_gradient,) = torch.autograd.grad(expected, states)

    aim, held = (targets if kind == "nll" else teacher), (None if reg == "nll" else reference)
    objective, kl = position_losses(head, states, aim, held, reg, kind)
    loss = objective.mean() if reg == "nll" else objective.mean() + 0.7 * hinge(aggregate(kl, agg), 0.1)
    (gradient,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_shapes_are_checked_in_one_dimension_too():
    with pytest.raises(Exception, match="Type-check error"):
        barrier.rmse(torch.zeros(2, 2))


@pytest.mark.parametrize("agg", ["mean", "rmse", "p95", "max"])
def test_at_the_reference_the_divergence_is_zero_and_its_gradient_finite(agg):
    states, _, _, weight, targets = draw()
    states.requires_grad_()
    _, kl = position_losses(Head(weight, None), states, targets, states.detach().clone(), "kl_rev")
    divergence = aggregate(kl, agg)
    (gradient,) = torch.autograd.grad(divergence, states)
    assert abs(divergence.item()) < 2e-6
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("reg", ["kl_fwd", "kl_rev"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradcheck_in_double_precision(reg, name, kind):
    states, reference, teacher, weight, targets = draw(torch.float64, seed=3)
    states, head = states[:5].requires_grad_(), HEADS[name]._replace(weight=weight)

    def both(h):
        return position_losses(head, h, (targets if kind == "nll" else teacher)[:5], reference[:5], reg, kind)

    assert torch.autograd.gradcheck(both, (states,))


def test_bf16_states_give_the_loss_of_their_exact_logits():
    """Rounding to bf16 would change a logit of 20 by up to 0.06, and the KL with it."""
    states, reference, _, weight, targets = draw()
    states, reference, weight = ((3 * x).bfloat16() for x in (states, reference, weight))
    objective, kl = position_losses(Head(weight, None), states, targets, reference, "kl_rev")
    assert objective.dtype == kl.dtype == torch.float32
    wide = [x.double() for x in (states, weight, targets, reference)]
    p, r = ((h @ wide[1].T).log_softmax(-1) for h in (wide[0], wide[3]))
    torch.testing.assert_close(kl.double(), (p.exp() * (p - r)).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(objective.double(), -p.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"softcap": 30.0}, {"softcap": 30.0, "scale": 1.7, "bias": BIAS}])
def test_the_head_does_not_round_its_logits(dtype, changes):
    """Compared with a float64 product of the same states and weights. bf16 rounding changes a logit of 20 by 0.06."""
    states, _, _, weight, _ = draw(torch.float64)
    states, weight = (3 * states).to(dtype), (3 * weight).to(dtype)
    head, exact = Head(weight, None)._replace(**changes), states.double() @ weight.double().T
    assert exact.abs().max() > 20
    exact = bent(head, exact)
    logits = head(states)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(head(states, torch.empty_like(logits)), logits)


def test_without_targets_there_is_a_divergence_and_no_objective():
    states, reference, _, weight, targets = draw()
    states.requires_grad_()
    objective, kl = position_losses(Head(weight, None), states, None, reference, "kl_rev")
    _, expected = position_losses(Head(weight, None), states, targets, reference, "kl_rev")
    assert torch.equal(kl, expected) and not objective.any()
    (gradient,) = torch.autograd.grad((objective + 2 * kl).sum(), states, retain_graph=True)
    (wanted,) = torch.autograd.grad(2 * expected.sum(), states)
    torch.testing.assert_close(gradient, wanted)
