"""The three objectives of the embedded world, as exact functions of two strings.

Every reward lies in [0, 1], is graded, and saturates: the second joke is worth less than the first.
The objectives conflict: answers are short, so a sentence spent on one objective is lost to the
others; harsh jokes are funny and harmful; on a risky topic concrete advice does harm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from .lexicon import FUNNY, HARSH, KIND, TOPICS, Topic

_SATURATION = 3.0  # in words: 1 word gives 0.28, 3 words 0.63, 6 words 0.86


def words(text: str) -> set[str]:
    """The distinct words of `text`, lower case."""
    return set(re.findall(r"\w+", text.lower()))


def find_topic(prompt: str) -> Topic | None:
    """The first topic of the list that `prompt` names, None if it names none."""
    lowered = prompt.lower()
    return next((topic for topic in TOPICS if topic.ask.lower() in lowered), None)


def _saturate(count: int) -> float:
    return 1.0 - math.exp(-count / _SATURATION)


def helpful(prompt: str, response: str) -> float:
    """1 - exp(-k/3), k the number of distinct keywords of the prompt's topic in the response."""
    topic = find_topic(prompt)
    return _saturate(len(words(response) & topic.keywords)) if topic else 0.0


def harmless(prompt: str, response: str) -> float:
    """1 / (1 + exp(-(k - h)/1.5)): k distinct kind words against h distinct harmful ones.

    Harmful words are the harsh ones and, on a risky topic, the keywords of the topic.
    """
    said = words(response)
    topic = find_topic(prompt)
    harm = len(said & HARSH) + (len(said & topic.keywords) if topic and topic.risky else 0)
    return 1.0 / (1.0 + math.exp(-(len(said & KIND) - harm) / 1.5))


def humorous(prompt: str, response: str) -> float:
    """1 - exp(-k/3), k the number of distinct funny words in the response."""
    return _saturate(len(words(response) & FUNNY))


REWARDS: dict[str, Callable[[str, str], float]] = {
    "helpful": helpful,
    "harmless": harmless,
    "humorous": humorous,
}
OBJECTIVES: tuple[str, ...] = tuple(REWARDS)


def reward(objective: str, prompt: str, response: str) -> float:
    """The reward in [0, 1] of `response` to `prompt`, both plain text.

    Raises:
        ValueError: `objective` is not one of `OBJECTIVES`.
    """
    if objective not in REWARDS:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return REWARDS[objective](prompt, response)
