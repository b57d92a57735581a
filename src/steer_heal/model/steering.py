"""Steering vectors, the dose of each row, and the hooks that apply a vector to the residual stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steer_heal.model.lm import LM


@dataclass(frozen=True)
class Vector:
    """Steering vector: v = `direction[i]` acts on the residual stream h after block `layers[i]`.

    `add`: h + dose * v. `project_out`, for v of unit length: h - dose * (h . v) v.
    """

    layers: tuple[int, ...]
    direction: Float[Tensor, "l d"]
    operation: str = "add"


class ForeignVector(ABC):
    """A vector of another library. Its hooks take one dose for a whole call, so no batch mixes doses."""

    layers: tuple[int, ...]

    @abstractmethod
    def attached(self, lm: LM, dose: float) -> AbstractContextManager:
        """Attach the other library's hooks until the `with` block ends."""


AnyVector = Vector | ForeignVector


@dataclass(frozen=True)
class Steering:
    """A vector, and one dose per row of the call."""

    vector: AnyVector
    dose: Float[Tensor, " rows"]


class Dial:
    """The state that the steering hooks read: doses and padding mask of the current batch."""

    dose: Float[Tensor, " b"]
    real: Bool[Tensor, "b t"] | None

    def turn(self, dose: Float[Tensor, " b"], real: Bool[Tensor, "b t"] | None = None) -> None:
        self.dose, self.real = dose, real


@dataclass(frozen=True)
class Doses:
    """The dose of each row of one batch, and the dial that passes it to the hooks. Without steering `dose` is None."""

    dial: Dial
    dose: Float[Tensor, " b"] | None

    @classmethod
    def of_batch(cls, lm: LM, dial: Dial, steering_: Steering | None, rows: list[int]) -> Doses:
        """The doses of a batch that consists of these rows of the call."""
        return cls(dial, None if steering_ is None else steering_.dose[rows].to(lm.device))

    def of(self, rows: Int[Tensor, " n"]) -> Doses:
        """The doses of these rows of the batch."""
        return self if self.dose is None else Doses(self.dial, self.dose[rows.to(self.dose.device)])

    def set(self, real: Bool[Tensor, "b t"] | None = None) -> None:
        """Steer with these doses from now on; `real` marks the positions that are not padding."""
        if self.dose is not None:
            self.dial.turn(self.dose, real)


UNSTEERED = Doses(Dial(), None)


class OneDoseDial(Dial):
    """The dial of a foreign vector: reattaches the hooks when the dose changes."""

    def __init__(self, lm: LM, vector: ForeignVector, hooks: ExitStack) -> None:
        self.lm, self.vector, self.hooks, self.now = lm, vector, hooks, None

    def turn(self, dose: Float[Tensor, " b"], real: Bool[Tensor, "b t"] | None = None) -> None:
        (value,) = set(dose.tolist())
        if value != self.now:
            self.hooks.close()
            self.hooks.enter_context(self.vector.attached(self.lm, value))
            self.now = value


def stream(output: Tensor | tuple) -> Float[Tensor, "b t d"]:
    """The residual stream in what a block returns: of some families a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def steering(lm: LM, steering_: Steering | None) -> Iterator[Dial]:
    """Apply the vector to the residual stream after each of its layers until the `with` block ends.

    Yields the dial: it sets the dose of each row of the current batch, and the positions that are real (left padding is
    not steered). With `None` there are no hooks, and the dial has no effect.
    """
    dial = Dial()
    if steering_ is None:
        yield dial
        return
    if isinstance(steering_.vector, ForeignVector):
        with ExitStack() as hooks:
            yield OneDoseDial(lm, steering_.vector, hooks)
        return
    direction = steering_.vector.direction.to(lm.device)

    projecting = steering_.vector.operation == "project_out"

    def act_after(index: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            h = stream(output)
            v = direction[index].to(h.dtype)
            offset = dial.dose.to(h.dtype)[:, None, None] * (-(h @ v)[:, :, None] * v if projecting else v)
            h = h + (offset if dial.real is None else offset * dial.real[:, :, None])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    handles = [lm.blocks[layer].register_forward_hook(act_after(i)) for i, layer in enumerate(steering_.vector.layers)]
    try:
        yield dial
    finally:
        for handle in handles:
            handle.remove()
