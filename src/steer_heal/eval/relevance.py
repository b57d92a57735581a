"""Relevance: is an answer likelier after its own prompt than after other prompts?

It sees lost threads that the coherent share does not: a fluent answer to another question. No judge is needed, and no
text is written: the pristine base scores the demo answers of an arm after their own and after other demo prompts.
"""

from __future__ import annotations

import numpy as np

from steer_heal.eval.reading import Demo
from steer_heal.model.answers import choice_log_probs
from steer_heal.model.lm import LM


def relevance(lm: LM, demos: list[Demo], prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (own prompt is the likeliest, pointwise mutual information in nats per token), one of each per answer.

    Each answer is scored after its own prompt and after `prompts` - 1 others, which lie at equal distances in the list.
    By chance 1 / `prompts` of the answers have their own as the likeliest. The pointwise mutual information is the
    log-probability per token after the own prompt minus its mean over the others. An empty answer scores 0 in both.

    Args:
        lm: the model under the base view.
        demos: the answers. They are tokenised anew, without an end token.
        prompts: how many prompts each answer is scored after, at most as many as there are answers.
    """
    count = len(demos)
    prompts = min(prompts, count)
    answers = [lm.answer(demo.text) for demo in demos]
    after = [[(i + step * count // prompts) % count for step in range(prompts)] for i in range(count)]  # own one first
    asked: list[list[int]] = [[] for _ in demos]  # by prompt: the answers that are scored after it
    for answer, where in enumerate(after):
        for prompt in where if answers[answer] else ():
            asked[prompt].append(answer)
    own, information = np.zeros(count), np.zeros(count)
    scored = choice_log_probs(
        lm, [lm.prompt(demo.prompt) for demo in demos], [[answers[i] for i in of] for of in asked]
    )
    per_token = {
        (prompt, answer): log_probs.double().mean().item()
        for prompt, of in enumerate(asked)
        for answer, log_probs in zip(of, scored[prompt], strict=True)
    }
    for i in range(count):
        if answers[i]:
            first, *others = (per_token[prompt, i] for prompt in after[i])
            own[i], information[i] = first > max(others, default=-np.inf), first - np.mean(others or [first])
    return own, information
