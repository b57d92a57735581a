"""Reading and writing GGUF files: metadata, small files of whole tensors, and llama.cpp's control vectors.

A control vector has a tensor `direction.N` for each steered block, which llama.cpp adds to the residual stream after
block N, counted from 0: where `steering` adds ours. Its format has none for block 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer_heal.config import UserError

CONTROL_VECTOR = "controlvector"
Directions = dict[int, Float[Tensor, " d"]]
# What gguf and numpy raise for a file that is cut off or damaged.
DAMAGED = (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


@dataclass(frozen=True)
class About:
    """What a GGUF file says of itself."""

    name: str
    description: str
    base: str
    """name of the base model"""


def opened(file: Path, what: str) -> gguf.GGUFReader:
    """A GGUF file. Raises UserError, which begins with `what`, when it cannot be read."""
    try:
        return gguf.GGUFReader(file)
    except DAMAGED as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: {str(file)!r} cannot be read as a GGUF file ({said}): make it again") from error


def value(reader: gguf.GGUFReader, key: str) -> str | int | float | list | None:
    """The value of a key; None for one that the file has not."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def describe(writer: gguf.GGUFWriter, about: About) -> None:
    """Add what the file is and what it is made for."""
    writer.add_string(gguf.Keys.General.NAME, about.name)
    writer.add_string(gguf.Keys.General.DESCRIPTION, about.description)
    writer.add_uint32(gguf.Keys.General.BASE_MODEL_COUNT, 1)
    writer.add_string(gguf.Keys.General.BASE_MODEL_NAME.format(id=0), about.base)


def write_tensors(writer: gguf.GGUFWriter, tensors: dict[str, Tensor]) -> None:
    """Write the file, with these tensors in float32."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_control_vector(file: Path, directions: Directions, architecture: str, about: About) -> None:
    """Write a control vector for models of an architecture. Raises UserError for block 0, which the format lacks."""
    if 0 in directions:
        raise UserError(
            "--vector: the run steers block 0, for which llama.cpp's control vectors have no place: the vector is in "
            "the run's folder, as vector.safetensors"
        )
    writer = gguf.GGUFWriter(file, CONTROL_VECTOR)
    describe(writer, about)
    writer.add_string(f"{CONTROL_VECTOR}.model_hint", architecture)
    writer.add_uint32(f"{CONTROL_VECTOR}.layer_count", len(directions))
    write_tensors(writer, {f"direction.{block}": direction for block, direction in directions.items()})


def read_control_vector(file: Path, what: str) -> dict[int, Tensor]:
    """The tensors of a control vector, by block. Raises UserError, which begins with `what`, for another file."""
    reader = opened(file, what)
    architecture = value(reader, gguf.Keys.General.ARCHITECTURE)
    if architecture != CONTROL_VECTOR:
        raise UserError(
            f"{what}: {str(file)!r} is a GGUF file of architecture {architecture!r}: give one of {CONTROL_VECTOR!r}, "
            "as repeng and llama.cpp's cvector-generator write"
        )
    found = {}
    for tensor in reader.tensors:
        if number := re.fullmatch(r"direction\.(\d+)", tensor.name):
            floats = gguf.dequantize(tensor.data, tensor.tensor_type)
            found[int(number[1])] = torch.from_numpy(np.array(floats, np.float32))
    return found
