"""The teacher's steering vector.

v_l = mean over contexts of h_l(positive persona + context) - h_l(negative persona + context). h_l is the residual
stream after block l at the last prompt token (the assistant tag). v_l is raw, not normalised. The two prompts differ
only in the system persona. Other ways to get a direction from the same states are in METHODS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steer_heal.config import FILE, SteerConfig, UserError
from steer_heal.model.forward import last_token_states
from steer_heal.model.lm import LM
from steer_heal.model.steering import AnyVector, Vector
from steer_heal.records import structured, unstructured
from steer_heal.steer import from_file, lite
from steer_heal.steer.layers import LayerReport
from steer_heal.steer.lite import LiteVector
from steer_heal.steer.personas import Personas

States = Float[Tensor, "n l d"]


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
        halves = [r.split_half for r in self.report if r.split_half is not None]
        alike = halves and f"alike from two halves of the contexts (cosine {sum(halves) / len(halves):.2f}), "
        return (
            f"in blocks {self.report[0].layer} to {self.report[-1].layer} of {blocks}: {norm:.1%} as long as the "
            f"residual stream, {alike or ''}tells the personas apart (AUC {auc:.2f})"
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

    Raises UserError for a vector without a direction: zero, or not finite; and for a file that does not fit the model.
    """
    from_others = config.method.startswith((lite.PREFIX, FILE))
    method = METHODS["mean_diff" if from_others else config.method]
    chosen = lm.band(config.band) if layers is None else layers
    given = from_file.directions(lm, config.method, chosen) if config.method.startswith(FILE) else None
    systems = [personas.positive, personas.negative] + [None] * (method.operation == "project_out")
    states = [
        last_token_states(lm, [lm.prompt(text, system) for text in personas.contexts], chosen, on_prompts)
        for system in systems
    ]
    if given is not None:
        report = [_fit(lm, layer, given[i], states[0][:, i], states[1][:, i]) for i, layer in enumerate(chosen)]
        return Extraction(Vector(chosen, given), report)
    report = [_report(lm, layer, states[0][:, i], states[1][:, i]) for i, layer in enumerate(chosen)]
    _require_direction(chosen, [r.relative_norm for r in report])
    if config.method.startswith(lite.PREFIX):
        trained = lite.train(lm, config.method, personas, chosen)
        return Extraction(trained, report)
    direction = method.direction(states[0], states[1], states[-1])
    _require_direction(chosen, direction.norm(dim=-1).tolist())
    return Extraction(Vector(chosen, direction, method.operation), report)


def _require_direction(layers: tuple[int, ...], norms: list[float]) -> None:
    """Raise UserError for a norm that is zero or not finite: steering along it and training on it would do nothing."""
    for layer, norm in zip(layers, norms, strict=True):
        if not 0 < norm < math.inf:
            same = "both personas leave the model in the same state, so write personas that differ"
            broken = "the model's states are not finite, so try --model.dtype float32 or other weights"
            raise UserError(f"the steering vector of block {layer} has norm {norm:g}: {broken if norm else same}")


def prompts_read(config: SteerConfig) -> int:
    """Number of prompts that `extract` reads for each context."""
    return 3 if config.method == "ablation" else 2


def _report(lm: LM, layer: int, positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"]) -> LayerReport:
    difference = positive - negative
    order = torch.randperm(len(difference), generator=torch.Generator().manual_seed(layer))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    a, b = (difference[half].mean(0) for half in halves)
    aucs = [auc(positive[held] @ v, negative[held] @ v) for v, held in ((a, halves[1]), (b, halves[0]))]
    return LayerReport(
        layer=layer,
        depth=_depth(lm, layer),
        relative_norm=(difference.mean(0).norm() / _stream(positive, negative)).item(),
        split_half=torch.cosine_similarity(a, b, dim=0).item(),
        auc=sum(aucs) / 2,
    )


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
