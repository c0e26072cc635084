"""Decodes held-out prompts with one method at one weight vector, and scores every answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mod_fused import Ensemble, generate, world
from mod_fused.philox import split_mix
from mod_fused.world import train

Array = np.ndarray
BATCH = 256


class Cell(NamedTuple):
    """One method at one weight vector.

    Attributes:
        method: "mod", "soup" (Rewarded Soups, arXiv 2306.04488: the policies' parameters averaged),
            "retrained" (one policy tuned for the mixed reward), or "reference".
        tuned: the divergence that the policies were tuned with.
        weights: [3]; corners are the single policies.
        mixed_by: the divergence to mix with; "mod" only, as are the next two.
        normalizer, history: see `mod_fused.generate`.
        greedy: the most likely token instead of a draw.
        seed: of the training.
        samples: answers to each prompt.
    """

    method: str
    tuned: str
    weights: tuple[float, ...]
    mixed_by: str = ""
    normalizer: str = "exact"
    history: bool = False
    greedy: bool = False
    seed: int = 0
    samples: int = 2

    @property
    def name(self) -> str:
        """A file name that no other cell has."""
        weights = "_".join(f"{w:.3g}" for w in self.weights)
        flags = ["history"] * self.history + ["greedy"] * self.greedy
        words = [self.method, self.tuned, self.mixed_by, self.normalizer, *flags, weights]
        return "-".join([*filter(None, words), f"s{self.seed}x{self.samples}"]).replace(":", "")


def soup(reference: Any, policies: Sequence[Any], weights: Sequence[float]) -> Any:
    """The model whose parameters are ref + sum_i w_i (policy_i - ref); at sum w = 1 their mean."""
    merged = copy.deepcopy(reference)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            base = parameter.clone()
            for weight, policy in zip(weights, policies, strict=True):
                parameter += weight * (policy.get_parameter(name) - base)
    return merged


#: (f(x) - f'(1) (x - 1)) / x by d = log x and y = 1/x: no power of x itself, which may overflow.
_TERMS: dict[str, Callable[[Array, Array], Array]] = {
    "reverse_kl": lambda d, y: d - 1.0 + y,
    "forward_kl": lambda d, y: 1.0 - y - d * y,
    "jsd": lambda d, y: d - (1.0 + y) * (np.logaddexp(0.0, d) - np.log(2.0)),
    "alpha:0.5": lambda d, y: 2.0 + 2.0 * y - 4.0 * np.sqrt(y),
    "jeffrey": lambda d, y: (1.0 - y) * d,
}


def divergence_terms(divergence: str, d: Array) -> Array:
    """Non-negative terms whose mean over answers drawn from pi estimates sum pi_ref f(pi / pi_ref).

    (f(x) - f'(1) (x - 1)) / x at the log-ratios d = log x: the subtracted part has mean 0.
    """
    d = d.astype(np.float64)
    return _TERMS[divergence](d, np.exp(-d))


def scores(prompts: Sequence[str], responses: Sequence[str]) -> Array:
    """[N, 3] float32 rewards in the order of `world.OBJECTIVES`."""
    columns = [train.score(name, list(prompts), list(responses)) for name in world.OBJECTIVES]
    return torch.stack(columns, dim=1).numpy()


def decode(
    ensemble: Ensemble,
    weights: Sequence[float],
    prompts: Sequence[str],
    *,
    samples: int,
    seed: int,
    **options: Any,
) -> dict[str, Array]:
    """Rewards [S, N, 3], kl [S, N] (log pi* - log pi_ref of whole answers), length, ended, valid.

    Sample by sample, answer r is drawn with row seed SplitMix64(seed + r), for every method alike.
    """
    rows = list(prompts) * samples
    noise = split_mix(seed, len(rows), torch.device("cpu")).tolist()
    parts: list[dict[str, Array]] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        out = generate(
            ensemble,
            part,
            weights=list(weights),
            seed=noise[start : start + BATCH],
            max_new_tokens=train.MAX_NEW_TOKENS,
            return_model_logprobs=True,
            **options,
        )
        assert out.model_logprobs is not None  # asked for above
        log_ratio = out.logprobs.double().sum(1) - out.model_logprobs[..., 0].double().sum(1)
        parts.append(
            {
                "rewards": scores(part, out.texts or ()),
                "kl": log_ratio.numpy(),
                "length": out.lengths.numpy(),
                "ended": np.array([reason == "eos" for reason in out.finish_reasons]),
                "valid": out.valid.numpy(),
            }
        )
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return {name: x.reshape(samples, len(prompts), *x.shape[1:]) for name, x in joined.items()}


def measure(
    cell: Cell,
    reference: Any,
    policies: Sequence[Any],
    tokenizer: Any,
    prompts: Sequence[str],
    seed: int,
) -> dict[str, Array]:
    """`decode` of a cell. `policies`: the three to mix or to merge, the retrained one, or none."""
    weights: Sequence[float] = [1.0]
    options: dict[str, Any] = {"do_sample": not cell.greedy}
    if cell.method == "mod":
        weights = cell.weights
        options |= {
            "divergence": cell.mixed_by,
            "normalizer": cell.normalizer,
            "sequence_history": cell.history,
        }
    elif cell.method == "soup":
        policies = [soup(reference, policies, cell.weights)]
    elif cell.method == "reference":
        policies = [reference]
    ensemble = Ensemble([reference, *policies], tokenizer)
    return decode(ensemble, weights, prompts, samples=cell.samples, seed=seed, **options)


def draw_pool(
    reference: Any, tokenizer: Any, prompts: Sequence[str], size: int, seed: int
) -> Array:
    """Rewards [N, size, 3] of answers that the reference gives to each prompt, to choose among."""
    texts = [prompt for prompt in prompts for _ in range(size)]
    batch = train.sample(reference, tokenizer, texts, seed)
    return scores(texts, train.response_texts(tokenizer, batch)).reshape(len(prompts), size, -1)
