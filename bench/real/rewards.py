"""Rewards that are exact functions of a response, from 0 to 1."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

LEAST_WORDS, MOST_WORDS = 4, 20  # a response with fewer words than the least has reward 0
_WORD = re.compile(r"[A-Za-z']+")


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positive(words: list[str], response: str) -> float:
    """VADER's compound sentiment, moved from [-1, 1] to [0, 1]."""
    return (1.0 + _vader().polarity_scores(response)["compound"]) / 2.0


def plain(words: list[str], response: str) -> float:
    """Readability: the mean number of letters of a word, 1 at 3 letters and 0 at 6."""
    letters = sum(len(word.replace("'", "")) for word in words) / len(words)
    return min(1.0, max(0.0, (6.0 - letters) / 3.0))


def brief(words: list[str], response: str) -> float:
    """Brevity: 1 at `LEAST_WORDS` words, 0 at `MOST_WORDS`."""
    return min(1.0, max(0.0, (MOST_WORDS - len(words)) / (MOST_WORDS - LEAST_WORDS)))


REWARDS: dict[str, Callable[[list[str], str], float]] = {
    "positive": positive,
    "plain": plain,
    "brief": brief,
}
OBJECTIVES = tuple(REWARDS)


def scores(questions: Sequence[Any], responses: Sequence[str]) -> np.ndarray:
    """[N, 3] float32, the rewards of the responses in the order of `OBJECTIVES`; the questions do
    not count."""
    found = np.zeros((len(responses), len(OBJECTIVES)), np.float32)
    for row, response in enumerate(responses):
        words = _WORD.findall(response)
        if len(words) >= LEAST_WORDS:
            found[row] = [reward(words, response) for reward in REWARDS.values()]
    return found
