"""Relevance: is an answer likelier after its own prompt than after other prompts?

It sees lost threads that other scores do not: a fluent answer to another question, or one that would fit any. No judge
is needed, and no text is written: the pristine base scores answers after their own and after other prompts.
"""

from __future__ import annotations

import numpy as np

from steer_heal.model.answers import choice_log_probs
from steer_heal.model.lm import LM


def relevance(
    lm: LM, prompts: list[str], answers: list[str], own: list[int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (own prompt is the likeliest, pointwise mutual information in nats per token), one of each per answer.

    Each answer is scored after its own prompt and after `count` - 1 others, which lie at equal distances in the list.
    By chance 1 / `count` of the answers have their own as the likeliest. The pointwise mutual information is the
    log-probability per token after the own prompt minus its mean over the others. An empty answer scores 0 in both.

    Args:
        lm: the model under the base view.
        prompts: user messages.
        answers: texts. They are tokenised anew, without an end token.
        own: for each answer the number of its prompt.
        count: how many prompts each answer is scored after, at most as many as there are prompts.
    """
    total = len(prompts)
    count = min(count, total)
    tokens = [lm.answer(text) for text in answers]
    after = [[(at + step * total // count) % total for step in range(count)] for at in own]  # own one first
    asked: list[list[int]] = [[] for _ in prompts]  # by prompt: the answers that are scored after it
    for answer, where in enumerate(after):
        for prompt in where if tokens[answer] else ():
            asked[prompt].append(answer)
    likeliest, information = np.zeros(len(answers)), np.zeros(len(answers))
    scored = choice_log_probs(lm, [lm.prompt(text) for text in prompts], [[tokens[i] for i in of] for of in asked])
    per_token = {
        (prompt, answer): log_probs.double().mean().item()
        for prompt, of in enumerate(asked)
        for answer, log_probs in zip(of, scored[prompt], strict=True)
    }
    for i, where in enumerate(after):
        if tokens[i]:
            first, *others = (per_token[prompt, i] for prompt in where)
            likeliest[i] = first > max(others, default=-np.inf)
            information[i] = first - np.mean(others or [first])
    return likeliest, information
