"""Exported .gguf files in llama.cpp itself: it computes what we compute, for each family that is exported.

Needs the package xllamacpp (`pip install xllamacpp`), which `just test` installs (34 MB).
"""

import numpy as np
import pytest
import torch

from steer_heal.bake.student import Student
from steer_heal.commands.export_gguf import Result
from steer_heal.config import AdapterConfig, ModelConfig
from steer_heal.gate.llama_cpp import log_probabilities, tiny_gguf
from steer_heal.model.gguf_file import About, write_control_vector
from steer_heal.model.gguf_layout import FAMILIES, layout_of
from steer_heal.model.loading import load
from steer_heal.model.steering import Steering, Vector, steering

pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
pytestmark = pytest.mark.run

IDS = [7, 300, 41, 900, 12, 5, 6, 77, 123, 400]
ABOUT = About("a tiny student", "for a check", "tiny")
# Largest difference of a log-probability, in nats. Both sides compute in float32; llama.cpp reads gemma's GELU from a
# table in float16 (0.002 on the base alone). A weight in f16 is rounded by 2**-11, in q8_0 by up to 1/254 of the
# largest in its block of 32, and llama.cpp rounds the states that it is multiplied with in the same way.
TOLERANCE = {"exact": 4e-3, "f16": 0.03, "q8_0": 0.4}
MOVED = 2.0  # an adapter or a vector moves some log-probability by more, so that a wrong layout is seen


def ours(lm) -> np.ndarray:
    with torch.no_grad():
        return lm.model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request, tmp_path_factory):
    """A tiny model of a family: loaded, and as a .gguf file."""
    folder = tmp_path_factory.mktemp(request.param)
    file = tiny_gguf(request.param, folder / "base.gguf", folder / "transformers")
    return load(ModelConfig(str(folder / "transformers"), "none", "float32", "cpu")), file


def test_llama_cpp_computes_what_we_compute(made, tmp_path):
    lm, base = made
    alone = ours(lm)
    assert apart(log_probabilities(base, IDS), alone) < TOLERANCE["exact"]

    vector = Vector((1, 3), 3.0 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1)))
    directions = dict(zip(vector.layers, 0.5 * vector.direction, strict=True))
    write_control_vector(tmp_path / "vector.gguf", directions, layout_of(lm).architecture, ABOUT)
    with steering(lm, Steering(vector, torch.tensor([0.5]))) as dial:
        dial.turn(torch.tensor([0.5]))
        steered = ours(lm)
    assert apart(log_probabilities(base, IDS, vector=tmp_path / "vector.gguf"), steered) < TOLERANCE["exact"]
    assert apart(steered, alone) > MOVED

    student = Student(lm)
    student.begin_round(AdapterConfig(r=4, band=(0.0, 1.0)), 0)
    for parameter in student.trainable():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    student.fold(0)
    result, trained = Result(student, layout_of(lm), ABOUT), ours(lm)
    assert apart(trained, alone) > MOVED
    result.write_adapter(tmp_path / "adapter.gguf")
    assert apart(log_probabilities(base, IDS, lora=tmp_path / "adapter.gguf"), trained) < TOLERANCE["exact"]
    for weights in ("f16", "q8_0"):
        result.write_model(tmp_path / f"{weights}.gguf", base, weights)
        assert apart(log_probabilities(tmp_path / f"{weights}.gguf", IDS), trained) < TOLERANCE[weights], weights
