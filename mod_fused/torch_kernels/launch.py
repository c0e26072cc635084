"""The op in plain torch, on any device: the fallback, the second opinion, and the version to read
first. Two functions fill given outputs, a chunk of rows after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.outputs import Outputs
from .draw import TILE, draw
from .mixture import mix
from .normalizer import row_logsumexp

#: Rows are worked through in chunks of about this many tokens, which bounds the temporaries to a
# few hundred MB.
CHUNK_TOKENS = 1 << 22


def log_probs_out(mixing: MixtureArguments, out: Tensor, workspace: Tensor | None = None) -> None:
    """log pi* to `out` [B, V]; it needs no workspace."""
    for rows in _chunks(*out.shape):
        mixture = mix(mixing, rows)
        result = mixture.key - mixture.level[:, None, None]
        result = (result - mixture.log_norm[:, None, None]).float().flatten(1)
        result = torch.where(mixture.valid[:, None], result, torch.nan)
        out[rows] = result[:, : mixing.vocab_size]


def sample_out(
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None = None,
) -> None:
    """Draws to `outputs`; it needs no workspace."""
    tokens, logprobs, valid, model_logprobs, proposal_logprobs = outputs
    count = tokens.shape[0]
    for rows in _chunks(count, mixing.vocab_size):
        mixture = mix(mixing, rows)
        token, proposal, drawn = draw(
            drawing, rows, count, mixture.key, mixture.level, mixing.vocab_size
        )
        ok = mixture.valid & drawn
        token = torch.where(ok, token, 0)
        tokens[rows] = token
        valid[rows] = ok
        logprob = _pick(mixture.key, token) - mixture.level - mixture.log_norm
        logprobs[rows] = torch.where(ok, logprob, torch.nan).float()
        if proposal_logprobs is not None:
            proposal_logprobs[rows] = torch.where(ok, proposal, torch.nan)
        if drawing.return_model_logprobs and model_logprobs is not None:
            each = [_log_prob(x, token) for x in mixture.logits]
            stacked = torch.stack(each, 1).float()
            model_logprobs[rows] = torch.where(ok[:, None], stacked, torch.nan)


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_TOKENS // (vocab_size + -vocab_size % TILE))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _log_prob(x: Tensor, token: Tensor) -> Tensor:
    """log softmax of x [b, T, TILE] at one token id per row, float64 [b]."""
    # The peak is taken off first: beside a level of 1e17 float64 would lose the log-sum.
    peak = x.amax((-2, -1)).double()
    at = _pick(x, token).double() - peak
    return at - row_logsumexp((x - peak[:, None, None]).float())


def _pick(x: Tensor, token: Tensor) -> Tensor:
    """x [b, T, TILE] at one token id per row [b]."""
    return x.flatten(1).gather(1, token[:, None]).squeeze(1)
