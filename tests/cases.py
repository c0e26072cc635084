"""Inputs and measures shared by the tests. Everything comes from numpy with a stated seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mod_fused import divergence, reference

#: Every built-in divergence, and two more of the alpha-divergences.
DIVERGENCES = (*divergence.DIVERGENCES, "alpha:0.25", "alpha:0.75")
BARRIERS = DIVERGENCES[1:]  # those that need a normaliser
MAX_TV = 2e-5  # of a backend to the float64 oracle on identical inputs
MAX_SUM_ERROR = 1e-5

_ONES = 0xFFFFFFFF
# Random123's published known answers for philox4x32, 10 rounds: zeros, ones, digits of pi.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_ONES,) * 4, (_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# Standard deviation of the reference's logits, and of each policy's difference from them.
KINDS = {"mild": (1.5, 0.3), "typical": (3.0, 1.0), "apart": (4.5, 3.0), "brutal": (6.0, 4.0)}


def logits(
    seed: int,
    batch: int,
    vocab: int,
    policies: int,
    *,
    kind: str = "apart",
    dtype: torch.dtype = torch.float32,
    excluded: float = 0.0,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Reference [B, V] and policies [B, V]; a fraction `excluded` of each policy is -inf."""
    rng = np.random.default_rng([seed, batch, vocab, policies])
    spread, apart = KINDS[kind]
    ref = rng.normal(size=(batch, vocab)) * spread
    rows = [ref + rng.normal(size=(batch, vocab)) * apart for _ in range(policies)]
    for row in rows:
        row[rng.random((batch, vocab)) < excluded] = -np.inf
        row[:, 0] = np.where(np.isinf(row[:, 0]), 0.0, row[:, 0])  # never an empty support
    ref_tensor, *tensors = (torch.from_numpy(x).to(dtype) for x in [ref, *rows])
    return ref_tensor, tensors


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32 tensor."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def total_variation(log_p: Any, log_q: Any) -> np.ndarray:
    """Total variation distance of the rows of two arrays of log-probabilities, in float64."""
    p, q = (np.exp(reference.to_float64(x)) for x in (log_p, log_q))
    return 0.5 * np.abs(p - q).sum(axis=-1)


def assert_matches_oracle(result: torch.Tensor, expected: np.ndarray) -> None:
    """`result` [B, V] float32 of a backend against the oracle [B, V]: same distribution,
    normalised, -inf at the same tokens, NaN in the same (invalid) rows."""
    assert result.dtype == torch.float32
    assert tuple(result.shape) == expected.shape
    got = reference.to_float64(result)
    invalid = np.isnan(expected).all(axis=1)
    assert (np.isnan(got).all(axis=1) == invalid).all(), "other rows are invalid"
    got, expected = got[~invalid], expected[~invalid]
    assert not np.isnan(got).any()
    assert ((got == -np.inf) == (expected == -np.inf)).all(), "other tokens are excluded"
    tv = total_variation(got, expected)
    assert tv.max(initial=0.0) <= MAX_TV, f"total variation {tv.max():.3g}"
    error = np.abs(np.exp(got).sum(axis=1) - 1.0)
    assert error.max(initial=0.0) <= MAX_SUM_ERROR, f"sums to one within {error.max():.3g} only"


def check(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run `op.log_probs` and the oracle on the same arguments, compare, return the former."""
    result = op.log_probs(*args, **kwargs)
    assert_matches_oracle(result, reference.log_probs(*args, **kwargs))
    return result


def filtered(log_p: np.ndarray, b: int, **filters: Any) -> np.ndarray:
    """The oracle's log-probabilities [V] of row b after filters, some of them [B]."""
    row = {
        name: x[b] if isinstance(x, (list, torch.Tensor)) and len(x) == len(log_p) else x
        for name, x in filters.items()
    }
    return reference.filtered_log_probs(log_p[b], **row)


def assert_tokens_are_the_oracle_s(
    tokens: Any, log_p: np.ndarray, seeds: Any, positions: Any, **filters: Any
) -> None:
    """`tokens` [B] against the float64 race on log pi* [B, V]. They may differ only where the race
    was decided by less than rounding can move it, which fewer than one in a hundred is."""
    close = 0
    for b, token in enumerate(tokens.tolist()):
        final = np.exp(filtered(log_p, b, **filters))
        if np.isnan(final).any():  # an invalid row
            assert token == 0
            continue
        draw = final, int(seeds[b]), int(positions[b])
        expected = reference.race(*draw)
        if token != expected:
            close += 1
            assert reference.race_margin(*draw) < 1e-4, f"row {b}: {token}, not {expected}"
    assert close <= len(tokens) / 100


def assert_proposal_logprobs_are_the_oracle_s(
    drawn: Any, log_p: np.ndarray, bound: float = 1e-4, **filters: Any
) -> None:
    """`proposal_logprobs` [B] at the drawn tokens against the float64 oracle; NaN where invalid."""
    at = zip(drawn.tokens.tolist(), drawn.proposal_logprobs.tolist(), strict=True)
    for b, (token, got) in enumerate(at):
        expected = filtered(log_p, b, **filters)[token]
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=f"row {b}")


def assert_only_these_rows_are_invalid(
    op: Any, bad: set[int], args: Any, clean_args: Any, clean_kwargs: Any = None, **kwargs: Any
) -> None:
    """Both functions flag the rows `bad`; the others equal those of the clean call."""
    count = len(args[1][0] if args[0] is None else args[0])
    seed = torch.arange(count) + 10
    asked = {"return_model_logprobs": True, "return_proposal_logprobs": True}
    drawn = op.sample(*args, seed=seed, **asked, **kwargs)
    assert drawn.valid.tolist() == [b not in bad for b in range(count)]
    rows = list(bad)
    assert (drawn.tokens[rows] == 0).all()
    assert drawn.logprobs[rows].isnan().all() and drawn.model_logprobs[rows].isnan().all()
    assert drawn.proposal_logprobs[rows].isnan().all()
    good = [b for b in range(count) if b not in bad]
    clean = op.sample(*clean_args, seed=seed, **(kwargs if clean_kwargs is None else clean_kwargs))
    assert torch.equal(drawn.tokens[good], clean.tokens[good])
    assert (drawn.logprobs[good] - clean.logprobs[good]).abs().max() <= 1e-5
