"""The verb `export` to a .gguf file: an adapter, a whole model or a control vector for llama.cpp.

Beside an adapter or a model lie an Ollama Modelfile, a model card and what reproduces the run. The GGUF file appears
last: once it is there, all of them are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch

from steer_heal.bake.lowrank import Factors
from steer_heal.bake.student import Student
from steer_heal.commands.export import Source, folded
from steer_heal.commands.hub import licence_of
from steer_heal.config import PACKAGED_GGUF, UserError, model_name
from steer_heal.distil.record import DoseCurve
from steer_heal.files import sync, write_text, writing
from steer_heal.model.gguf_file import About, Directions, describe, opened, value, write_control_vector, write_tensors
from steer_heal.model.gguf_layout import Layout, layout_of
from steer_heal.model.loading import gguf_file
from steer_heal.model.steering import Vector
from steer_heal.report.card import Form, model_card
from steer_heal.runs.reading import Run
from steer_heal.runs.reproduction import REPRODUCE
from steer_heal.runs.resume import opened as opened_run
from steer_heal.runs.rounds import InRound
from steer_heal.runs.student import base_of, student_after, vector_of

Kind = Literal["adapter", "model", "vector"]
Weights = Literal["f16", "q8_0"]
TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
GGUF_VERSION_OF_BLOCKS = 2  # general.quantization_version
# Keys of the base's file that describe that file, and not the model in it.
OF_THE_FILE = ("GGUF.", "split.", "general.alignment", "general.architecture", "general.type", "general.name")
OF_THE_FILE += ("general.description", "general.file_type", "general.quantization_version", "general.base_model.")
TEMPLATE_NOTE = (
    "# Ollama finds the chat template in the GGUF file of the {where} and uses it where it knows it. If answers show\n"
    '# tags of the chat, or run on, write the template here: TEMPLATE """...""" (in Ollama\'s own language).\n'
)


def export_gguf(
    folder: Path, to: Path, round_: int | None, kind: Kind, weights: Weights = "f16", rank: int | None = None
) -> None:
    """Write a run's result into the file `to`.

    An adapter and a model hold the student after `round_` (the last one if None), a vector that of `round_` (the first
    one if None) times the round's dose. An adapter of a larger rank is folded to `rank`. A model needs a base that was
    loaded from a .gguf file: metadata, tokenizer and chat template are that file's, and the update is added to its
    weights.

    Raises UserError when the folder is no run, the round was not finished, a file is in the way, or the base is of a
    family or a format that this cannot be made for.
    """
    of = Source(folder, 0 if kind == "vector" and round_ is None else round_)
    run, rounds = of.run, of.rounds
    require_free(to, kind)
    base = _base_file(run.settings.model.path)
    if kind == "model" and base is None:
        raise UserError(
            f"--merge --to {str(to)!r}: the run's base is no .gguf file to take metadata and tokenizer from: give a "
            "folder, and make a .gguf of it with llama.cpp's convert_hf_to_gguf.py"
        )
    files: dict[str, Callable[[Path], None]] = {}
    if kind == "vector":
        layout, directions = layout_of(base_of(folder)), dosed_vector(folder, rounds - 1)
        about = _about(run, f"steering vector of round {rounds - 1} times its dose, for {_base_name(run)}: add it at 1")
        files[to.name] = lambda file: write_control_vector(file, directions, layout.architecture, about)
    else:
        student = student_after(folder, run.config, rounds)
        about = _about(run, f"{_base_name(run)} after {rounds} rounds of training")
        form = Form(
            kind=f"gguf {kind}",
            files=(to.name, _base_gguf_name(run, base)),
            fold=folded(student, rank) if kind == "adapter" else None,
            licence=licence_of(run.settings.model.path),
            reproduce=True,
        )
        card = model_card(of.made, form)
        result = Result(student, layout_of(student.lm), about)
        files[to.with_suffix(".md").name] = lambda file: write_text(file, card)
        files[to.with_suffix(f".{REPRODUCE}").name] = lambda file: write_text(file, of.reproduce)
        files[to.with_suffix(".Modelfile").name] = lambda file: write_text(file, modelfile(to, run, base, kind))
        if kind == "adapter":
            files[to.name] = result.write_adapter
        else:
            files[to.name] = lambda file: result.write_model(file, base, weights)
    publish(to.parent, files)


def require_free(to: Path, kind: Kind) -> None:
    """Raise UserError when a file that an export would write is there."""
    beside = [] if kind == "vector" else [to.with_suffix(end) for end in (".md", ".Modelfile", f".{REPRODUCE}")]
    for path in (to, *beside):
        if path.exists():
            what = "is a folder" if path.is_dir() else "exists"
            raise UserError(f"--to {str(to)!r}: {str(path)!r} {what}: choose a new name")


def publish(folder: Path, files: dict[str, Callable[[Path], None]]) -> None:
    """Write files into a folder: each appears whole, and all of them or none."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            for name, write in files.items():
                write(Path(scratch) / name)
                sync(Path(scratch) / name)
            moved: list[Path] = []
            try:
                for name in files:
                    os.rename(Path(scratch) / name, folder / name)
                    moved.append(folder / name)
            except BaseException:
                for path in moved:
                    path.unlink()
                raise


@dataclass(frozen=True)
class Result:
    """A student, and how llama.cpp lays it out."""

    student: Student
    layout: Layout
    about: About

    def updates(self) -> Iterator[tuple[str, Factors]]:
        """llama.cpp's name of each matrix that the student changes, and its update in llama.cpp's order of rows."""
        for path, (a, b, scale) in self.student.updates():
            name = self.layout.name(path)
            yield name, Factors(a.detach().float().cpu(), self.layout.rows(name, b.detach().float().cpu()), scale)

    def write_adapter(self, file: Path) -> None:
        """Write the update as a LoRA of llama.cpp, which computes alpha / rank * B A."""
        writer = gguf.GGUFWriter(file, self.layout.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        describe(writer, self.about)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        tensors, rank = {}, 0
        for name, (a, b, scale) in self.updates():
            rank = len(a)
            tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": scale * b}
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # the scale is in B
        write_tensors(writer, tensors)

    def write_model(self, file: Path, base: Path, weights: Weights) -> None:
        """Write the base's file anew with the update added, its matrices in f16 or q8_0."""
        reader = opened(base, "--merge")
        if (found := value(reader, gguf.Keys.General.ARCHITECTURE)) != self.layout.architecture:
            raise UserError(
                f"--merge: {base.name!r} is a {found}, the run's model a {self.layout.architecture}: export without "
                ".gguf"
            )
        updates = dict(self.updates())
        if missing := updates.keys() - {tensor.name for tensor in reader.tensors}:
            raise UserError(f"--merge: {base.name!r} has no {min(missing)}: export the adapter, without --merge")
        writer = gguf.GGUFWriter(file, self.layout.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        describe(writer, self.about)
        writer.add_file_type(FILE_TYPES[weights])
        writer.add_quantization_version(GGUF_VERSION_OF_BLOCKS)
        for field in reader.fields.values():
            if not field.name.startswith(OF_THE_FILE) and (content := field.contents()) != []:
                writer.add_key_value(field.name, content, field.types[0], field.types[-1])
        types = [_type_of(tensor, weights) for tensor in reader.tensors]
        for tensor, type_ in zip(reader.tensors, types, strict=True):
            _announce(writer, tensor, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, type_ in zip(reader.tensors, types, strict=True):
            writer.write_tensor_data(_data(tensor, updates.get(tensor.name), type_))
        writer.close()


def _type_of(tensor: gguf.ReaderTensor, weights: Weights) -> gguf.GGMLQuantizationType:
    """Norms and biases stay in float32. q8_0 has blocks of 32 numbers: a matrix whose rows are no multiple is f16."""
    if len(tensor.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[TYPES[weights]]
    return TYPES[weights] if tensor.shape[0] % block == 0 else gguf.GGMLQuantizationType.F16


def _announce(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor, type_: gguf.GGMLQuantizationType) -> None:
    """Add a tensor's place to the file's table; gguf names the shape of a quantised one in bytes."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if type_ == gguf.GGMLQuantizationType.Q8_0:
        stored = gguf.quant_shape_to_byte_shape(shape, type_)
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), prod(stored), type_)
    else:
        floats = np.dtype(np.float32 if type_ == gguf.GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(tensor.name, shape, floats, prod(shape) * floats.itemsize)


def _data(tensor: gguf.ReaderTensor, update: Factors | None, type_: gguf.GGMLQuantizationType) -> np.ndarray:
    weight = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if update is not None:
        weight += (update.scale * update.b @ update.a).numpy()
    if not np.abs(weight).max() <= np.finfo(np.float16).max:
        raise UserError(f"--merge: {tensor.name} has numbers beyond the range of float16: export without .gguf")
    return gguf.quantize(weight, type_)


def dosed_vector(folder: Path, number: int) -> Directions:
    """A round's vector times its dose, by block. Raises UserError for one that is not simply added."""
    run = opened_run(folder)
    vector = vector_of(run, number)
    if not isinstance(vector, Vector) or vector.operation != "add":
        raise UserError(
            "--vector: the run's steer.method does more than add a direction, which is all that a control vector does: "
            "export the adapter"
        )
    dose = run.load(DoseCurve, InRound.DOSE.of(number)).dose
    return dict(zip(vector.layers, (dose * vector.direction.to(torch.float32)).unbind(), strict=True))


def modelfile(to: Path, run: Run, base: Path | None, kind: Kind) -> str:
    """Ollama's Modelfile of an adapter or a model that lies beside it."""
    use = f"# Use: ollama create NAME -f {to.with_suffix('.Modelfile').name}\n"
    if kind == "model":
        return f"{use}FROM ./{to.name}\n{TEMPLATE_NOTE.format(where='model')}"
    name = _base_gguf_name(run, base)
    made = "" if base else "; llama.cpp's convert_hf_to_gguf.py makes one"
    needs = f"# The adapter needs its base as a .gguf file: put {_base_name(run)} beside it as {name}{made}.\n"
    return f"{use}{needs}FROM ./{name}\nADAPTER ./{to.name}\n{TEMPLATE_NOTE.format(where='base')}"


def _base_file(path: str) -> Path | None:
    """The .gguf file that a model was loaded from; None for another kind of model."""
    return gguf_file(path) if path in PACKAGED_GGUF or path.lower().endswith(".gguf") else None


def _base_gguf_name(run: Run, base: Path | None) -> str:
    return base.name if base else f"{_base_name(run).split('/')[-1]}.gguf"


def _base_name(run: Run) -> str:
    return model_name(run.settings.model.path)


def _about(run: Run, what: str) -> About:
    return About(f"{_base_name(run).split('/')[-1]} that {run.title}", f"{what}. Made by steer-heal.", _base_name(run))
