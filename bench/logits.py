"""The logits of problems: sketches of distributions, or recorded from the embedded models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RECORDED = "recorded"
_HEAD = 5000


def _model(vocab: int, generator: torch.Generator) -> Tensor:
    z = 2.2 * torch.randn(vocab, generator=generator)
    head = min(_HEAD, vocab // 2)
    rank = torch.arange(1, head + 1).float()
    at = torch.randperm(vocab, generator=generator)[:head]
    noise = 0.7 * torch.randn(head, generator=generator)
    z[at] = torch.logaddexp(z[at], 17.0 - 1.6 * rank.log() + noise)
    return z


def _heavy(vocab: int, generator: torch.Generator) -> Tensor:
    rank = torch.randperm(vocab, generator=generator) + 1
    return 12.0 - rank.log()


def _peaked(vocab: int, generator: torch.Generator) -> Tensor:
    z = 2.2 * torch.randn(vocab, generator=generator)
    z[int(torch.randint(vocab, (), generator=generator))] = 28.0
    return z


def _flat(vocab: int, generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(vocab, generator=generator)


class Setting(NamedTuple):
    """A sketch: the reference's logits of one row [V], and the policies' distance from them."""

    what: str
    reference: Callable[[int, torch.Generator], Tensor]
    distance: float = 0.45  # scale of the Laplace deviate that a policy adds to each logit
    sharpening: float = 1.05


#: `model` is a sketch of a language model's next-token logits: 5000 tokens at random ids follow a
#: power law (slope 1.6, top logit about 17) over a normal tail of standard deviation 2.2. A policy
#: sharpens the reference by 5% and moves each logit by a Laplace deviate of scale 0.45, about as
#: far as preference tuning moves it.
SETTINGS = {
    "model": Setting("a power-law head of 5000 tokens over a normal tail", _model),
    "far": Setting("the same, policies 3 nats from the reference", _model, distance=3.0),
    "heavy": Setting("heavy tail: p proportional to 1 / rank over the whole vocabulary", _heavy),
    "peaked": Setting("one token has all but about 1e-6 of the mass", _peaked),
    "flat": Setting("logits of standard deviation 0.3", _flat),
}


def generated(setting: str, vocab: int, batch: int, policies: int) -> Tensor:
    """Logits of a sketch, float32 [policies + 1, batch, vocab], seeded by the vocabulary.

    Raises:
        ValueError: if there is no such setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {[*SETTINGS, RECORDED]}, got {setting!r}")
    chosen = SETTINGS[setting]
    generator = torch.Generator().manual_seed(vocab)
    out = torch.empty(policies + 1, batch, vocab)
    for b in range(batch):
        z = out[0, b] = chosen.reference(vocab, generator)
        for i in range(policies):
            sign = torch.randint(0, 2, (vocab,), generator=generator) * 2 - 1
            deviate = sign * torch.empty(vocab).exponential_(generator=generator)
            out[1 + i, b] = chosen.sharpening * z + chosen.distance * deviate
    return out


def recorded(vocab: int, batch: int, policies: int) -> Tensor:
    """Logits of the embedded models, float32 [policies + 1, batch, vocab]. The mixture of equal
    weights answers seeded prompts; each token of the answers gives one row.

    Raises:
        ValueError: if `vocab` is not their vocabulary, or there are fewer policies.
        ImportError: transformers is not installed.
    """
    import transformers  # noqa: F401 named in the error where it is missing

    from mod_fused import Ensemble, generate, world

    if not 1 <= policies <= len(world.OBJECTIVES):
        raise ValueError(f"expected 1 to {len(world.OBJECTIVES)} embedded policies, got {policies}")
    ensemble = Ensemble.embedded(world.OBJECTIVES[:policies])
    if vocab != ensemble.vocab_size:
        raise ValueError(f"the embedded models have V = {ensemble.vocab_size}, got {vocab}")
    rows: list[Tensor] = []
    for prompt in world.prompts(batch, seed=0):  # more than enough: a row for each token
        out = generate(ensemble, prompt, weights=[1.0 / policies] * policies, seed=1)
        begin = out.sequences.shape[1] - out.tokens.shape[1] - 1
        with torch.no_grad():
            answers = [m(out.sequences).logits[0, begin:-1].float() for m in ensemble.models]
        rows += torch.stack(answers, 1)
        if len(rows) >= batch:
            break
    return torch.stack(rows[:batch], 1)
