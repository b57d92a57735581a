"""A causal language model and its tokenizer: loading, chat prompts, and the residual stream.

Loading is in `loading`. Everything above sees a model through five things: prompt tokens (`LM.prompt`), decoder blocks
(`LM.blocks`), the hidden states before the head (`LM.states`), the head itself (`LM.head`), and a context that
adds a vector to the residual stream (`steering`). No logits tensor of shape [tokens, vocab] is made here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from steer_heal.config import UserError

ROUND = 16  # see `rounded`


def rounded(size: int, to: int = ROUND) -> int:
    """`size` or the next multiple.

    On a CPU a row's sums must not depend on what else is in the batch, down to the bit. Attention adds up otherwise
    when padding shifts a row against the vector registers, and the matrix product for one to three rows alone. So the
    widths of batches, what their prompts share and the rows that decode are multiples of ROUND.
    """
    return -(-size // to) * to


def filled(rows: Sequence, to: int = ROUND) -> list:
    """The rows and as many copies of the first as make them a multiple, see `rounded`."""
    return [*rows, *[rows[0]] * (rounded(len(rows), to) - len(rows))]


class Row(NamedTuple):
    """One prompt and one completion, tokenised apart and joined, so that no merge crosses the boundary."""

    prompt: list[int]
    completion: list[int]


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


class Head(NamedTuple):
    """The output head: logits = cap(h @ weight.T), cap(z) = softcap * tanh(z / softcap) when softcap is set.

    `product` takes the place of the plain h @ weight.T where the weight is packed, see `packing`.
    """

    weight: Float[Tensor, "v d"]
    softcap: float | None
    product: Callable[[Tensor], Tensor] | None = None

    def __call__(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        plain = self.product is None
        logits = (states @ self.weight.T.to(states.dtype) if plain else self.product(states)).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class LM:
    """A loaded model. `model` is the causal LM itself; PEFT adapters are injected into it by `bake`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    end_tokens: frozenset[int]
    head_product: Callable[[Tensor], Tensor] | None = None
    """see `Head`"""

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def decoder(self) -> nn.Module:
        """The text tower: token ids in, hidden states after the final norm out."""
        return self.model.get_decoder()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def head(self) -> Head:
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(self.model.get_output_embeddings().weight, softcap, self.head_product)

    def band(self, share: tuple[float, float]) -> tuple[int, ...]:
        """Block indices whose relative depth lies in `share`, e.g. (0.45, 0.55) of 30 blocks -> 13, 14, 15, 16."""
        low, high = (round(edge * (len(self.blocks) - 1)) for edge in share)
        return tuple(range(low, high + 1))

    @property
    def windowed(self) -> bool:
        """Whether some block attends to a sliding window only."""
        config = self.model.config.get_text_config()
        if getattr(config, "layer_types", None) is not None:
            return "sliding_attention" in config.layer_types
        return getattr(config, "sliding_window", None) is not None

    def prompt(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of a one-turn chat up to and including the assistant tag.

        A template that knows no system role gets the system text at the head of the user turn.
        """
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._render(messages)
        except Exception as error:  # jinja templates refuse a role by raising whatever they like
            if system is None:
                raise UserError(f"the chat template of {self.name!r} cannot render a user turn: {error}") from error
            text = self._render([{"role": "user", "content": f"{system}\n\n{user}"}])
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def states(self, rows: list[Row], batch_size: int, steering_: Steering | None = None) -> list[Float[Tensor, "n d"]]:
        """Hidden states that predict each completion token, one tensor [len(completion), d] a row, without gradient.

        Rows are batched by width; right padding needs no mask under causal attention, so results do not depend
        on the batch they were computed in beyond float rounding.
        """
        out: list[Tensor | None] = [None] * len(rows)
        with torch.no_grad(), steering(self, steering_) as dial:
            shared = shared_prefix([row.prompt for row in rows])
            widths = [rounded(len(row.prompt) + len(row.completion) - 1 - shared) for row in rows]
            for chunk in batches(widths, batch_size, steering_):
                batch = [rows[i] for i in chunk]
                dose = None if steering_ is None else steering_.dose[chunk].to(self.device)
                for i, states in zip(chunk, self.forward(batch, dial, dose, shared), strict=True):
                    out[i] = states.clone()
        return out

    def forward(
        self,
        rows: list[Row],
        dial: Dial | None = None,
        dose: Float[Tensor, "b"] | None = None,
        shared: int = 0,
        multiple: int = ROUND,
    ) -> list[Float[Tensor, "n d"]]:
        """Hidden states before the head at each row's completion positions, with gradient when it is enabled.

        The keys and values of the first `shared` tokens, which all prompts have in common, are computed once. The
        rows are padded to a `multiple`, see `rounded`.
        """
        cache = None
        if shared:
            start = self.prefix(rows[0].prompt[:shared], dial, dose)
            cache = Cache(layers=[SharedPrefix(layer) for layer in start.layers])
        sequences = [(row.prompt + row.completion[:-1])[shared:] for row in rows]
        longest = rounded(max(map(len, sequences)), multiple)
        ids = torch.tensor([s + s[-1:] * (longest - len(s)) for s in sequences], device=self.device)
        if dose is not None:
            dial.turn(dose)
        hidden = self.decoder(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return [
            h[len(row.prompt) - 1 - shared : len(row.prompt) - 1 - shared + len(row.completion)]
            for h, row in zip(hidden, rows, strict=True)
        ]

    def prefix(self, ids: list[int], dial: Dial | None, dose: Float[Tensor, "b"] | None) -> Cache:
        """Keys and values of a text that begins every row: [1, ...], or [b, ...] when the rows' doses differ."""
        cache, where = DynamicCache(), None
        rows = 1
        if dose is not None:
            doses, where = dose.unique(return_inverse=True)
            rows = len(doses)
            dial.turn(doses)
        self.decoder(input_ids=torch.tensor([ids] * rows, device=self.device), past_key_values=cache, use_cache=True)
        if where is not None:
            cache.batch_select_indices(where)
        return cache


def batches(widths: list[int], batch_size: int, steering_: Steering | None = None) -> Iterator[list[int]]:
    """Row numbers batch by batch: rows of a batch are equally wide, and have one dose under a foreign vector."""
    groups: dict[tuple[int, float], list[int]] = {}
    alike = steering_ is None or not isinstance(steering_.vector, ForeignVector)
    for i, width in enumerate(widths):
        groups.setdefault((width, 0.0 if alike else steering_.dose[i].item()), []).append(i)
    for _, rows in sorted(groups.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def shared_left_padded(lm: LM, prompts: list[list[int]]) -> int:
    """`shared_prefix` where padding on the left comes between it and the rest."""
    # A window is counted in cache columns: the padding would push the prefix out.
    return 0 if lm.windowed else shared_prefix(prompts)


def shared_prefix(prompts: list[list[int]], multiple: int = ROUND) -> int:
    """Length of what all prompts begin with, leaving each at least one token of its own, down to a `multiple`."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)
    length = 0
    while length < min(map(len, prompts)) - 1 and first[length] == last[length]:
        length += 1
    return length // multiple * multiple


class Padded(NamedTuple):
    """Prompts of different lengths in one call, padded on the left, so that all end in the last column."""

    shared: int
    """tokens that all begin with; they are not in `ids`, their keys and values come from `LM.prefix`"""
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b s"]
    """1 for real tokens, the shared ones included"""
    position: Int[Tensor, "b t"]


def left_padded(lm: LM, prompts: list[list[int]], shared: int, width: int) -> Padded:
    """Prompts that have the first `shared` tokens in common, each with `width` tokens of its own and padding."""
    own = [p[shared:] for p in prompts]
    # Padding is a real token: a zero embedding would divide another library's hooks by zero.
    ids = torch.tensor([p[:1] * (width - len(p)) + p for p in own], device=lm.device)
    mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in own], device=lm.device)
    return Padded(shared, ids, mask, mask.cumsum(1).sub(1).clamp(min=0)[:, shared:])


class SharedPrefix(DynamicLayer):
    """Cache layer for one forward pass: keys and values of the shared prefix ahead of each row's own."""

    def __init__(self, prefix: DynamicLayer) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = prefix.keys, prefix.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        return tuple(
            torch.cat([before.expand(rows, -1, -1, -1), new], dim=2)
            for before, new in ((self.keys, key_states), (self.values, value_states))
        )


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


@contextmanager
def first_blocks(lm: LM, count: int) -> Iterator[None]:
    """The decoder runs its first `count` blocks only; what lies above costs nothing."""
    config = lm.decoder.config
    whole, config.num_hidden_layers = config.num_hidden_layers, count
    try:
        yield
    finally:
        config.num_hidden_layers = whole


def last_token_states(
    lm: LM,
    prompts: list[list[int]],
    layers: tuple[int, ...],
    batch_size: int,
    on_prompts: Callable[[int], None] = lambda prompts: None,
) -> Float[Tensor, "n l d"]:
    """Residual stream after each of `layers` at the last token of each prompt, float32, on the CPU.

    Batched by width; the pass stops after the last layer wanted, so the rest of the model costs nothing.
    """
    out = torch.empty(len(prompts), len(layers), lm.model.config.get_text_config().hidden_size)
    seen: dict[int, Tensor] = {}

    def read(index: int) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            seen[index] = output

        return hook

    handles = [lm.blocks[layer].register_forward_hook(read(index)) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad(), first_blocks(lm, layers[-1] + 1):
            shared = shared_prefix(prompts)
            for chunk in batches([rounded(len(prompt) - shared) for prompt in prompts], batch_size):
                lm.forward([Row(prompts[i], [0]) for i in chunk], shared=shared)
                last = torch.tensor([len(prompts[i]) for i in chunk]) - shared - 1
                for index, stream in seen.items():
                    out[chunk, index] = stream[range(len(chunk)), last].float().cpu()
                on_prompts(len(chunk))
    finally:
        for handle in handles:
            handle.remove()
    return out


HEAD_CHUNK = 256  # positions whose logits are held at once


def row_surprise(lm: LM, rows: list[Row], batch_size: int) -> list[tuple[Float[Tensor, "n"], Float[Tensor, "n"]]]:
    """NLL and predictive entropy in nats of every completion token of every row, on the CPU."""
    states = torch.cat(lm.states(rows, batch_size))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    nll, entropy = [], []
    with torch.no_grad():
        for h, t in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            log_p = lm.head(h).log_softmax(-1)
            nll.append(-log_p.gather(1, t[:, None])[:, 0])
            entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p))
    lengths = [len(row.completion) for row in rows]
    return list(zip(*(torch.cat(nats).cpu().split(lengths) for nats in (nll, entropy)), strict=True))


def row_nll(lm: LM, rows: list[Row], batch_size: int, steering_: Steering | None = None) -> list[Float[Tensor, "n"]]:
    """NLL in nats of every completion token of every row under the model as it stands (view, steering)."""
    states = torch.cat(lm.states(rows, batch_size, steering_))
    targets = torch.tensor([t for row in rows for t in row.completion], device=lm.device)
    return list(token_nll(lm, states, targets).cpu().split([len(row.completion) for row in rows]))


def token_nll(lm: LM, states: Float[Tensor, "n d"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """NLL in nats of each target at its state, HEAD_CHUNK rows of logits at a time."""
    with torch.no_grad():
        parts = [
            torch.nn.functional.cross_entropy(lm.head(h[filled(range(len(h)))])[: len(h)], t, reduction="none")
            for h, t in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        ]
    return torch.cat(parts)
