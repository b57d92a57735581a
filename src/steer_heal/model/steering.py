"""A vector in the residual stream: what it is, at which dose each row gets it, and the hooks that add it."""

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
    """Steering vector: `direction[i]` acts, times the dose, on the residual stream after block `layers[i]`.

    `add`: h + dose * v. `project_out`, v of unit length: h - dose * (h . v) v.
    """

    layers: tuple[int, ...]
    direction: Float[Tensor, "l d"]
    operation: str = "add"


class ForeignVector(ABC):
    """A vector of another library, whose hooks know one dose for a whole call: no batch mixes doses then."""

    layers: tuple[int, ...]

    @abstractmethod
    def attached(self, lm: LM, dose: float) -> AbstractContextManager:
        """The other library's hooks, on while the block lasts."""


AnyVector = Vector | ForeignVector


@dataclass(frozen=True)
class Steering:
    """A vector with one dose per row of the call it is given to."""

    vector: AnyVector
    dose: Float[Tensor, "rows"]


class Dial:
    """What the steering hooks read: the doses and the padding mask of the batch that is in the model now."""

    dose: Float[Tensor, "b"]
    real: Bool[Tensor, "b t"] | None

    def turn(self, dose: Float[Tensor, "b"], real: Bool[Tensor, "b t"] | None = None) -> None:
        self.dose, self.real = dose, real


@dataclass(frozen=True)
class Doses:
    """The dose of each row of one batch, and the dial to set them at; without steering `dose` is None."""

    dial: Dial
    dose: Float[Tensor, "b"] | None

    @classmethod
    def of_batch(cls, lm: LM, dial: Dial, steering_: Steering | None, rows: list[int]) -> Doses:
        """Those of these rows of the call that `steering_` was given to."""
        return cls(dial, None if steering_ is None else steering_.dose[rows].to(lm.device))

    def of(self, rows: Int[Tensor, "n"]) -> Doses:
        """Those of these rows of the batch."""
        return self if self.dose is None else Doses(self.dial, self.dose[rows.to(self.dose.device)])

    def set(self, real: Bool[Tensor, "b t"] | None = None) -> None:
        """From now on the model steers with them; `real` says which positions are not padding."""
        if self.dose is not None:
            self.dial.turn(self.dose, real)


UNSTEERED = Doses(Dial(), None)


class OneDoseDial(Dial):
    """The dial of a foreign vector: attaches its hooks anew when the dose changes."""

    def __init__(self, lm: LM, vector: ForeignVector, hooks: ExitStack) -> None:
        self.lm, self.vector, self.hooks, self.now = lm, vector, hooks, None

    def turn(self, dose: Float[Tensor, "b"], real: Bool[Tensor, "b t"] | None = None) -> None:
        (value,) = set(dose.tolist())
        if value != self.now:
            self.hooks.close()
            self.hooks.enter_context(self.vector.attached(self.lm, value))
            self.now = value


@contextmanager
def steering(lm: LM, steering_: Steering | None) -> Iterator[Dial]:
    """The vector acts on the residual stream after every block of the vector's band; hooks go when the block ends.

    The dial says which dose each row of the current batch gets, and which positions are real (left padding is left
    alone). With `None` nothing is hooked and the dial turns freely.
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
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            v = direction[index].to(output.dtype)
            offset = dial.dose.to(output.dtype)[:, None, None] * (-(output @ v)[:, :, None] * v if projecting else v)
            return output + (offset if dial.real is None else offset * dial.real[:, :, None])

        return hook

    handles = [lm.blocks[layer].register_forward_hook(act_after(i)) for i, layer in enumerate(steering_.vector.layers)]
    try:
        yield dial
    finally:
        for handle in handles:
            handle.remove()
