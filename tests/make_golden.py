"""Writes golden_tokens.json from the float64 oracle alone: `python tests/make_golden.py`.

`tokens`: draws of small mixtures whose logits are integers times a power of two, so that no
platform rounds them differently. `tail`: the 4,194,304 draws of seed 18, position 0, 1, ..., from
one token and 2047 others 18 nats below it; listed are all draws that another token wins. The second
part takes ten minutes: it looks at 4 billion random numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mod_fused import reference

PATH = Path(__file__).with_name("golden_tokens.json")
MIXTURES = [
    {"divergence": d, "vocab": v, "dtype": dtype}
    for d in ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey")
    for v, dtype in ((3000, "float32"), (1025, "bfloat16"))
]
# The same with prefixes and the mixture's own mass of a response so far.
MIXTURES += [
    {"divergence": d, "vocab": 1025, "dtype": "float32", "prefix": True}
    for d in ("forward_kl", "jsd", "alpha:0.5", "jeffrey")
]
SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789, -987654321]
POSITIONS = [0, 1, 2, 1000, 2**31, 2**32, 2**40 + 1, 7]
FILTERS = [{}, {"temperature": 0.7, "top_k": 50}, {"temperature": 1.3, "top_p": 0.9}]

TAIL = {"seed": 18, "draws": 1 << 22, "vocab": 2048, "head": 5, "nats": 18.0}


def integer_logits(which: int, batch: int, vocab: int, dtype: str) -> torch.Tensor:
    """[batch, vocab] of multiples of 1/16 in [-8, 8), by integer arithmetic."""
    s, b = np.arange(vocab, dtype=np.uint64)[None], np.arange(batch, dtype=np.uint64)[:, None]
    mixed = (s * np.uint64(2654435761) + b * np.uint64(40503) + np.uint64(97 * which)) % 2**32
    mixed = (mixed * np.uint64(2246822519) >> np.uint64(15)) % np.uint64(256)
    return torch.from_numpy(mixed.astype(np.float32) / 16.0 - 8.0).to(getattr(torch, dtype))


def mixture_inputs(case: dict[str, Any]) -> tuple[Any, ...]:
    """Reference, policies and weights of one golden mixture."""
    batch = len(SEEDS)
    ref, *policies = (integer_logits(i, batch, case["vocab"], case["dtype"]) for i in range(3))
    return ref, policies, [0.5, 0.25]


def mixture_options(case: dict[str, Any]) -> dict[str, Any]:
    """The other arguments of one golden mixture."""
    options: dict[str, Any] = {"divergence": case["divergence"]}
    if "prefix" in case:
        b = torch.arange(len(SEEDS), dtype=torch.float64)
        options["prefix_logprobs"] = torch.stack([-3.0 * b, 2.0 - 3.5 * b, -2.0 * b], 1)
        options["mixture_prefix_logprobs"] = 1.0 - 3.25 * b
    return options


def mixture_tokens() -> list[dict[str, Any]]:
    table = []
    for case in MIXTURES:
        log_p = reference.log_probs(*mixture_inputs(case), **mixture_options(case))
        for filters in FILTERS:
            tokens = []
            for row, seed, position in zip(log_p, SEEDS, POSITIONS, strict=True):
                final = np.exp(reference.filtered_log_probs(row, **filters))
                # A golden token must not hang on rounding: leave out what it could decide.
                clear = reference.race_margin(final, seed, position) > 1e-3
                tokens.append(reference.race(final, seed, position) if clear else None)
            table.append({**case, "filters": filters, "tokens": tokens})
    return table


def tail_log_probs() -> np.ndarray:
    logits = np.full(TAIL["vocab"], -TAIL["nats"])
    logits[TAIL["head"]] = 0.0
    return reference.log_softmax(logits)


def tail_draws() -> list[tuple[int, int]]:
    """(position, token) of all draws not won by the head."""
    p, seed = np.exp(tail_log_probs()), TAIL["seed"]
    # Tile 1 holds no head. In tile 0 a token wins only if its E / p beats the head's E <= 45, so
    # its E is tiny, hence also the first word of its Philox output.
    limit = 45.0 * p.min() / p.max()
    mass = p.reshape(-1, reference.TILE).sum(axis=1)
    ids = np.delete(np.arange(reference.TILE), TAIL["head"])
    candidates: list[int] = []
    for positions in np.arange(TAIL["draws"]).reshape(-1, 64, 1):
        tile_times = reference.exponentials(seed, positions, np.arange(2), 0) / mass
        first_word, _ = reference.philox4x32_words(seed, positions, ids, 1)
        close = first_word.min(axis=1) * 2.0**-32 < limit
        candidates += positions[close | (tile_times[:, 1] < tile_times[:, 0]), 0].tolist()
    drawn = [(n, reference.race(p, seed, n)) for n in candidates]
    return [(n, token) for n, token in drawn if token != TAIL["head"]]


def main() -> None:
    table = {
        "scheme_version": reference.SCHEME_VERSION,
        "tokens": mixture_tokens(),
        "tail": {**TAIL, "draws_of_tail": tail_draws()},
    }
    PATH.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
