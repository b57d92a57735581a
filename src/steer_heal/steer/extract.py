"""The teacher's steering vector.

v_l = mean over contexts of h_l(positive persona + context) - h_l(negative persona + context). h_l is the residual
stream after block l at the last prompt token (the assistant tag), or its mean over the tokens of an answer. v_l is raw,
not normalised. The two prompts differ only in the system persona. Other ways to get a direction from the same states
are in METHODS. What the vectors of other traits span may be projected out first: see `projection`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_heal.config import FILE, Exhausted, SteerConfig
from steer_heal.model.decode import decode
from steer_heal.model.forward import last_token_states, mean_states
from steer_heal.model.lm import LM, Row
from steer_heal.model.steering import AnyVector, Vector
from steer_heal.records import structured, unstructured
from steer_heal.steer import from_file, lite
from steer_heal.steer.layers import LayerReport
from steer_heal.steer.lite import LiteVector
from steer_heal.steer.personas import Personas
from steer_heal.steer.projection import outside, require_left, spans

States = Float[Tensor, "n l d"]
ANSWER_TOKENS = 32  # longest answer that `steer.read answer` reads


def mean_diff(positive: States, negative: States, plain: States) -> Float[Tensor, "l d"]:
    """Mean over contexts of positive minus negative. Rimsky et al., "Steering Llama 2 via Contrastive Activation
    Addition", arXiv:2312.06681; the persona form and the assistant tag as reading point follow vgel/repeng."""
    return (positive - negative).mean(0)


def pca(positive: States, negative: States, plain: States) -> Float[Tensor, "l d"]:
    """First principal component of the pair differences (not centred), scaled to the mean difference's projection onto
    it, so that a dose means the same as for `mean_diff`.

    Zou et al., "Representation Engineering", arXiv:2310.01405.
    """
    difference = (positive - negative).transpose(0, 1)
    component = torch.linalg.svd(difference, full_matrices=False).Vh[:, 0]
    return component * torch.linalg.vecdot(component, difference.mean(1))[:, None]


def ablation(positive: States, negative: States, plain: States) -> Float[Tensor, "l d"]:
    """Unit direction of the mean difference between the negative persona and no persona. It is projected out of the
    residual stream (dose 1: completely).

    Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", arXiv:2406.11717.
    """
    return torch.nn.functional.normalize((negative - plain).mean(0), dim=-1)


def random(positive: States, negative: States, plain: States) -> Float[Tensor, "l d"]:
    """A control: a random direction in each block, with the norm of the mean difference. The same in every round."""
    difference = mean_diff(positive, negative, plain)
    drawn = torch.randn(difference.shape, generator=torch.Generator().manual_seed(0)).to(difference)
    return torch.nn.functional.normalize(drawn, dim=-1) * difference.norm(dim=-1, keepdim=True)


class Method(NamedTuple):
    direction: Callable[[States, States, States], Float[Tensor, "l d"]]
    operation: str
    """how the hook applies the direction, see `model.steering.Vector`"""


METHODS = {
    "mean_diff": Method(mean_diff, "add"),
    "pca": Method(pca, "add"),
    "ablation": Method(ablation, "project_out"),
    "random": Method(random, "add"),
}


class Extraction(NamedTuple):
    vector: AnyVector
    report: list[LayerReport]
    """one for every block of the vector"""

    def described(self, blocks: int) -> str:
        """The vector in one line, for a model with `blocks` blocks."""
        norm, auc = (sum(getattr(r, key) for r in self.report) / len(self.report) for key in ("relative_norm", "auc"))
        halves, left = (
            [value for r in self.report if (value := getattr(r, key)) is not None] for key in ("split_half", "left")
        )
        alike = halves and f"alike from two halves of the contexts (cosine {sum(halves) / len(halves):.2f}), "
        kept = left and f"{sum(left) / len(left):.0%} of its norm left without the other traits, "
        return (
            f"in blocks {self.report[0].layer} to {self.report[-1].layer} of {blocks}: {norm:.1%} as long as the "
            f"residual stream, {kept or ''}{alike or ''}tells the personas apart (AUC {auc:.2f})"
        )


def extract(
    lm: LM,
    personas: Personas,
    config: SteerConfig,
    layers: tuple[int, ...] | None = None,
    on_prompts: Callable[[int], None] = lambda prompts: None,
) -> Extraction:
    """Extract the vector from the model, its active adapters included.

    Args:
        layers: blocks to steer; None takes them from `config.band`.

    A vector from a file is not extracted: the personas' states tell how well it fits them.

    Raises Exhausted for a vector without a direction: zero, not finite, or with hardly anything left without the other
    traits. Raises UserError for a file that does not fit the model.
    """
    from_others = config.method.startswith((lite.PREFIX, FILE))
    method = METHODS["mean_diff" if from_others else config.method]
    chosen = lm.band(config.band) if layers is None else layers
    given = from_file.directions(lm, config.method, chosen) if config.method.startswith(FILE) else None
    systems = [personas.positive, personas.negative] + [None] * (method.operation == "project_out")

    def read(system: str | None) -> States:
        prompts = [lm.prompt(text, system) for text in personas.contexts]
        return (last_token_states if config.read == "assistant_tag" else answer_states)(lm, prompts, chosen, on_prompts)

    states = [read(system) for system in systems]
    if given is not None:
        report = [_fit(lm, layer, given[i], states[0][:, i], states[1][:, i]) for i, layer in enumerate(chosen)]
        return Extraction(Vector(chosen, given), report)
    report = [_report(lm, layer, states[0][:, i], states[1][:, i]) for i, layer in enumerate(chosen)]
    _require_direction(chosen, [r.relative_norm for r in report])
    if config.method.startswith(lite.PREFIX):
        trained = lite.train(lm, config.method, personas, chosen)
        return Extraction(trained, report)
    if personas.without:
        others = [(read(one.positive) - read(one.negative)).mean(0) for one in personas.without]
        whole, bases = (states[0] - states[1]).mean(0), spans(torch.stack(others))
        states = [outside(one, bases) for one in states]
        left = ((states[0] - states[1]).mean(0).norm(dim=-1) / whole.norm(dim=-1)).tolist()
        require_left(chosen, left, " ".join(one.name for one in personas.without))
        report = [_cleaned(r, states[0][:, i], states[1][:, i], left[i]) for i, r in enumerate(report)]
    direction = method.direction(states[0], states[1], states[-1])
    _require_direction(chosen, direction.norm(dim=-1).tolist())
    return Extraction(Vector(chosen, direction, method.operation), report)


def _require_direction(layers: tuple[int, ...], norms: list[float]) -> None:
    """Raise Exhausted for a norm that is zero or not finite: steering along it and training on it would do nothing."""
    for layer, norm in zip(layers, norms, strict=True):
        if not 0 < norm < math.inf:
            same = "both personas leave the model in the same state, so write personas that differ"
            broken = "the model's states are not finite, so try --model.dtype float32 or other weights"
            raise Exhausted(f"the steering vector of block {layer} has norm {norm:g}: {broken if norm else same}")


def answer_states(
    lm: LM, prompts: list[list[int]], layers: tuple[int, ...], on_prompts: Callable[[int], None]
) -> States:
    """Residual stream after each of `layers`, mean over the tokens of a greedy answer to each prompt, its end left out.

    The answer stands under the persona that wrote it, as in persona vectors (Chen et al., arXiv:2507.21509).
    """
    written = decode(lm, prompts, ANSWER_TOKENS, on_batch=on_prompts)
    answers = [one.ids[:-1] if one.ended and len(one.ids) > 1 else one.ids for one in written]
    return mean_states(lm, [Row(*both) for both in zip(prompts, answers, strict=True)], layers, on_prompts)


def prompts_read(config: SteerConfig) -> int:
    """Number of prompts that `extract` reads for each context; one that is answered first counts twice."""
    systems = (3 if config.method == "ablation" else 2) + 2 * len(config.without)
    return systems * (1 if config.read == "assistant_tag" else 2)


def _report(lm: LM, layer: int, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> LayerReport:
    return LayerReport(
        layer=layer,
        depth=_depth(lm, layer),
        relative_norm=((positive - negative).mean(0).norm() / _stream(positive, negative)).item(),
        **_halves(layer, positive, negative),
    )


def _cleaned(
    raw: LayerReport, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], left: float
) -> LayerReport:
    """The report of what is left of a vector; its length is still measured against the whole residual stream."""
    return replace(raw, relative_norm=raw.relative_norm * left, left=left, **_halves(raw.layer, positive, negative))


def _halves(layer: int, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> dict[str, float]:
    """How alike the vectors of two random halves of the contexts are, and how each ranks the other half."""
    difference = positive - negative
    order = torch.randperm(len(difference), generator=torch.Generator().manual_seed(layer))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    a, b = (difference[half].mean(0) for half in halves)
    aucs = [auc(positive[held] @ v, negative[held] @ v) for v, held in ((a, halves[1]), (b, halves[0]))]
    return {"split_half": torch.cosine_similarity(a, b, dim=0).item(), "auc": sum(aucs) / 2}


def _fit(
    lm: LM, layer: int, v: Float[Tensor, " d"], positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]
) -> LayerReport:
    """The report of a direction that comes from a file."""
    return LayerReport(
        layer=layer,
        depth=_depth(lm, layer),
        relative_norm=(v.norm() / _stream(positive, negative)).item(),
        auc=auc(positive @ v, negative @ v),
    )


def _depth(lm: LM, layer: int) -> float:
    return layer / max(1, len(lm.blocks) - 1)


def _stream(positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean norm of the residual stream."""
    return (positive.norm(dim=-1).mean() + negative.norm(dim=-1).mean()) / 2


def auc(high: Float[Tensor, " n"], low: Float[Tensor, " m"]) -> float:
    """Probability that one of `high` exceeds one of `low`, ties counted half."""
    difference = high[:, None] - low[None, :]
    return ((difference > 0).double().mean() + (difference == 0).double().mean() / 2).item()


VECTOR_FILE = "vector.safetensors"  # in a vector's folder


def write_vector(path: Path, extraction: Extraction) -> None:
    """Write a folder with the vector and the layer reports."""
    path.mkdir()
    vector, report = extraction
    (path / "layers.json").write_text(json.dumps(unstructured(report), indent=1), "utf-8")
    if isinstance(vector, LiteVector):
        lite.save(path / "lite.safetensors", vector)
        return
    described = json.dumps({"layers": vector.layers, "operation": vector.operation})
    # One key: safetensors writes several in random order, and the file's checksum would change.
    save_file({"direction": vector.direction.contiguous()}, path / VECTOR_FILE, {"vector": described})


def read_vector(path: Path) -> Extraction:
    """A round's vector and its layer reports, from their folder."""
    report = structured(list[LayerReport], json.loads((path / "layers.json").read_text("utf-8")))
    if (path / "lite.safetensors").exists():
        return Extraction(lite.load(path / "lite.safetensors"), report)
    with safe_open(path / VECTOR_FILE, "pt") as stored:
        described = json.loads(stored.metadata()["vector"])
        vector = Vector(tuple(described["layers"]), stored.get_tensor("direction"), described["operation"])
        return Extraction(vector, report)
