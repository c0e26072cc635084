"""Questions and answers of the embedded world, made from a small grammar.

    text     = "User: " question "\nAssistant:" " " answer
    answer   = one to three sentences
    sentence = [opener] core [tail] "." or "!"

Cores are steps of the topic, steps of another topic, puns, or stock sentences, each of one kind.
The answer's mood, random probabilities of the kinds, decides how often each kind is used, so that
answers vary widely in every reward. A question belongs to the training set or to the held-out set
by its position in the grid topic x frame x time; every topic, frame and time occurs in both.
"""

from __future__ import annotations

import random

from .lexicon import CORES, FRAMES, OPENERS, TAILS, TIMES, TOPICS, Topic

HELD_OUT_STRIDE = 4  # one question in four is never trained on
_CORE_KINDS = ("step", "vague", "kind", "harsh", "funny")
_SENTENCES = (1, 2, 2, 3, 3, 3)


def format_prompt(question: str) -> str:
    """The complete text to encode for `question`; the answer follows it and begins with a space."""
    return f"User: {question.strip()}\nAssistant:"


def questions(held_out: bool) -> list[str]:
    """All questions of the training set, or all of the held-out set, in a fixed order."""
    return [
        frame.format(ask=topic.ask, time=time)
        for i, topic in enumerate(TOPICS)
        for j, frame in enumerate(FRAMES)
        for k, time in enumerate(TIMES)
        if ((i + j + k) % HELD_OUT_STRIDE == 0) == held_out
    ]


def prompts(n: int, seed: int, held_out: bool = True) -> list[str]:
    """`n` prompts in random order, held out from training unless `held_out` is False.

    They are distinct up to n = 600 (the size of the held-out set) and repeat after that. Each is
    the whole text to encode; the tokenizer adds the BOS token. The text generated up to EOS is the
    response.

    Raises:
        ValueError: `n` is negative.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    rng = random.Random(seed)
    pool = [format_prompt(question) for question in questions(held_out)]
    chosen: list[str] = []
    while len(chosen) < n:
        chosen += rng.sample(pool, len(pool))
    return chosen[:n]


def _core(rng: random.Random, kind: str, topic: Topic, step: str) -> str:
    if kind == "step":
        # Sometimes a step of another topic: fluent, concrete and no help.
        return rng.choice(rng.choice(TOPICS).steps) if rng.random() < 0.2 else step
    if kind == "funny":
        u = rng.random()
        return topic.pun if u < 0.4 else rng.choice(CORES["mocking" if u < 0.55 else "funny"])
    if kind == "kind" and rng.random() < (0.6 if topic.risky else 0.1):
        return rng.choice(CORES["refusal"])
    return rng.choice(CORES[kind])


def answer(topic: Topic, rng: random.Random) -> str:
    """A random answer to a question on `topic`: one to three sentences."""
    # Uniform on the simplex once normalised, except that steps get twice the weight.
    mood = [(2.0 if kind == "step" else 1.0) * rng.expovariate(1.0) for kind in _CORE_KINDS]
    sentences: list[str] = []
    count = rng.choice(_SENTENCES)
    steps = sorted(
        rng.sample(range(len(topic.steps)), count)
    )  # in the order in which they are done
    for index in steps:
        kind = rng.choices(_CORE_KINDS, mood)[0]
        sentence = _core(rng, kind, topic, topic.steps[index])
        fun = kind == "funny"
        if rng.random() < 0.5:
            opener = rng.choices(_CORE_KINDS[1:], mood[1:])[0]
            sentence = f"{rng.choice(OPENERS[opener])} {sentence}"
            fun |= opener == "funny"
        if rng.random() < 0.5:
            tail = rng.choices(_CORE_KINDS[1:], mood[1:])[0]
            sentence += rng.choice(TAILS[tail])
            fun |= tail == "funny"
        sentences.append(sentence[0].upper() + sentence[1:] + ("!" if fun else "."))
    return " ".join(dict.fromkeys(sentences))  # without repeated sentences


def examples(n: int, seed: int) -> list[tuple[str, str]]:
    """`n` random (prompt, response) pairs to train on; a response begins with a space."""
    rng = random.Random(seed)
    grid = [
        (topic, format_prompt(frame.format(ask=topic.ask, time=time)))
        for i, topic in enumerate(TOPICS)
        for j, frame in enumerate(FRAMES)
        for k, time in enumerate(TIMES)
        if (i + j + k) % HELD_OUT_STRIDE
    ]
    return [
        (prompt, " " + answer(topic, rng)) for topic, prompt in (rng.choice(grid) for _ in range(n))
    ]
