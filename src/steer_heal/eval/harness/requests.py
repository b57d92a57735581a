"""Answers to the requests of lm-evaluation-harness, by one arm of our model.

The harness builds prompts and computes metrics. It asks a model for three things: log-probabilities of continuations,
log-likelihoods of whole texts, and free answers. They are read here in our batches. Each prompt is read once for all of
its continuations.

What is scored is what the harness itself scores: space at the end of a prompt counts as the continuation's. The tokens
of the prompt stay as they are. Where a continuation would change them, the harness splits the joined tokens by number;
here the continuation is tokenised as it follows the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loguru import logger

from steer_heal.config import UserError
from steer_heal.eval.arms import Arm
from steer_heal.model.answers import choice_log_probs, of_tokens_and_best
from steer_heal.model.decode import decode
from steer_heal.model.likelihood import row_nll
from steer_heal.model.lm import LM, Row
from steer_heal.terminal import progress

GENERATED = 256  # tokens of a free answer where the task names no number, as in the harness
FIRST_STEP = 32  # tokens that all free answers get before those that have reached a stop text leave


class Answering:
    """The methods that the harness calls. `harness_model` makes this a model of the harness.

    Args:
        lm: the model, in the view of the arm.
        arm: gives the steering and the name in progress bars. The system prompt comes from the harness.
        room: the longest sequence in tokens.
    """

    def __init__(self, lm: LM, arm: Arm, room: int) -> None:
        super().__init__()
        self.lm, self.arm, self.room = lm, arm, room
        tokenizer = lm.tokenizer
        self.begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.shortened = 0  # prompts whose beginning was left out

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A rendered chat, up to where the answer begins. Without a generation prompt the last turn begins it."""
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        system = turns.pop(0)[1] if turns[0][0] == "system" else None
        begun = "" if add_generation_prompt else turns.pop()[1]
        template = self.lm.template
        return template.chat(turns, system) + (template.spaced(begun) if begun else "")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether greedy decoding would write it."""
        rows = [self._fitted(self._pair(*request.args)) for request in requests]
        places: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for row in rows:
            places.setdefault(tuple(row.prompt), {})[tuple(row.completion)] = None
        prompts = [list(prompt) for prompt in places]
        choices = [[list(answer) for answer in answers] for answers in places.values()]
        with self._bar(len(prompts), "prompt") as done:
            steering = self.arm.steering(len(prompts))
            scored = choice_log_probs(self.lm, prompts, choices, steering, done, of_tokens_and_best)
        found = {}
        for prompt, answers, tokens in zip(places, places.values(), scored, strict=True):
            for answer, log_p in zip(answers, tokens, strict=True):
                own, best = log_p.double().unbind(-1)
                found[prompt, answer] = own.sum().item(), bool((own == best).all())
        return [found[tuple(row.prompt), tuple(row.completion)] for row in rows]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihood in nats of each whole text, without a chat. Long texts are read in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rows, texts = [], []
        for text, (string,) in enumerate(request.args for request in requests):
            tokens = self.lm.tokenizer(string).input_ids
            for window in get_rolling_token_windows(tokens, self.begin, self.room, context_len=1):
                rows.append(Row(*map(list, make_disjoint_window(window))))
                texts.append(text)
        found = [0.0] * len(requests)
        with self._bar(len(rows), "window") as done:
            for text, nll in zip(texts, row_nll(self.lm, rows, self.arm.steering(len(rows))), strict=True):
                found[text] -= nll.double().sum().item()
            done(len(rows))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The greedy answer to each prompt, up to the first of its task's stop texts."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

        end = self.lm.tokenizer.decode([self.lm.tokenizer.eos_token_id])
        alike: dict[tuple[tuple[str, ...], int], dict[str, None]] = {}
        wanted = []
        for context, asked in (request.args for request in requests):
            settings = normalize_gen_kwargs(asked, GENERATED)
            if settings["do_sample"]:
                raise UserError(
                    f"--harness: a task asks for sampled answers ({asked}): only greedy answers are read, leave it out"
                )
            stops = tuple(handle_stop_sequences(settings["until"], end))
            wanted.append((context, stops, settings["max_gen_toks"]))
            alike.setdefault(wanted[-1][1:], {})[context] = None
        found = {}
        for (stops, most), contexts in alike.items():
            prompts = [self._room_for(self.lm.template.ids(context), most) for context in contexts]
            for context, text in zip(contexts, self._written(prompts, stops, most), strict=True):
                found[context, stops, most] = postprocess_generated_text(text, list(stops), None)
        return [found[one] for one in wanted]

    def _pair(self, context: str, continuation: str) -> Row:
        """The tokens of a prompt and of the continuation that is scored."""
        if not context:
            answer = self.lm.template.ids(continuation)
            return Row(answer[:1], answer[1:]) if answer[:1] == [self.begin] else Row([self.begin], answer)
        bare = context.rstrip()
        return Row(self.lm.template.ids(bare), self.lm.template.following(bare, context[len(bare) :] + continuation))

    def _fitted(self, row: Row) -> Row:
        """The row with as much of its prompt as there is room for."""
        tokens = len(row.completion)
        if not 0 < tokens <= self.room:
            wrong = f"has {tokens} tokens, the model reads {self.room}" if tokens else "is empty"
            raise UserError(f"--harness: a task scores an answer that {wrong}: leave the task out, or mend it")
        return Row(self._cut(row.prompt, self.room + 1 - tokens), row.completion)

    def _room_for(self, prompt: list[int], tokens: int) -> list[int]:
        if tokens >= self.room:
            raise UserError(
                f"--harness: a task asks for answers of {tokens} tokens, the model reads {self.room}: leave it out"
            )
        return self._cut(prompt, self.room - tokens)

    def _cut(self, prompt: list[int], most: int) -> list[int]:
        """The last `most` tokens of a prompt, as the harness does."""
        self.shortened += len(prompt) > most
        return prompt[-most:]

    def _written(self, prompts: list[list[int]], stops: tuple[str, ...], most: int) -> Iterator[str]:
        """Greedy answers. They are decoded some tokens at a time, and one that holds a stop text is left as it is."""
        written: list[list[int]] = [[] for _ in prompts]
        going, step = list(range(len(prompts))), FIRST_STEP
        with self._bar(len(prompts), "answer") as done:
            while going:
                step = min(step, most - len(written[going[0]]))
                before = [prompts[i] + written[i] for i in going]
                decoded = decode(self.lm, before, step, self.arm.steering(len(going)))
                left = []
                for i, part in zip(going, decoded, strict=True):
                    written[i] += part.ids
                    text = self._text(written[i])
                    if not part.ended and len(written[i]) < most and not any(stop in text for stop in stops):
                        left.append(i)
                done(len(going) - len(left))
                going, step = left, 2 * step
        return map(self._text, written)

    def _text(self, ids: list[int]) -> str:
        return self.lm.tokenizer.decode(ids, skip_special_tokens=True)

    def _bar(self, total: int, unit: str) -> Any:
        return progress(f"eval {self.arm.name}", total, unit)


def harness_model(lm: LM, arm: Arm) -> Answering:
    """The arm as a model of the harness."""
    from lm_eval.api.model import LM as HarnessLM
    from lm_eval.models.utils import resolve_max_length

    class Model(Answering, HarnessLM):
        """Ours, where the harness checks for its own class."""

    return Model(lm, arm, resolve_max_length(lm.model.config, lm.tokenizer))


def warn_of_shortened(model: Answering) -> None:
    if model.shortened:
        logger.warning(
            f"{model.arm.name}: {model.shortened} prompts are longer than the {model.room} tokens that the model "
            "reads: their beginning is left out, the system prompt with it"
        )
