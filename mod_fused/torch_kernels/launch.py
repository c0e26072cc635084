"""The op in plain torch, on any device: the fallback, the second opinion, and the version to read
first. Two functions fill given outputs, a chunk of rows after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.outputs import Outputs
from .draw import draw
from .mixture import mix
from .normalizer import levels_and_log_sums
from .philox import TILE
from .vocabulary import Vocabulary

#: Rows are worked through in chunks of about this many tokens, which bounds the temporaries to a
# few hundred MB.
CHUNK_TOKENS = 1 << 22


def log_probs_out(
    mixing: MixtureArguments,
    out: Tensor,
    workspace: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """log pi* to `out` [B, >= V], -inf beyond V; it needs no workspace."""
    vocabulary = vocabulary or Vocabulary(mixing.vocab_size)
    for rows in _chunks(len(out), vocabulary):
        mixture = mix(mixing, rows, vocabulary)
        result = mixture.key - mixture.level[:, None, None]
        result = (result - mixture.log_norm[:, None, None]).float()
        out[rows, : vocabulary.count] = vocabulary.untiled(result)
        out[rows, vocabulary.count :] = -torch.inf
        out[rows].masked_fill_(~mixture.valid[:, None], torch.nan)


def sample_out(
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Draws to `outputs`; it needs no workspace."""
    vocabulary = vocabulary or Vocabulary(mixing.vocab_size)
    tokens, logprobs, valid, model_logprobs, proposal_logprobs = outputs
    count = tokens.shape[0]
    for rows in _chunks(count, vocabulary):
        mixture = mix(mixing, rows, vocabulary)
        drawn = draw(drawing, rows, count, mixture, vocabulary)
        ok = mixture.valid & drawn.valid
        token = torch.where(ok, drawn.token, 0)
        models = mixture.logits if drawing.return_model_logprobs else []
        flat = [x.flatten(1) for x in (mixture.key, drawn.scaled, *models)]
        key, scaled, *logits = vocabulary.pick(flat, token)
        tokens[rows] = token
        valid[rows] = ok
        logprob = key - mixture.level - mixture.log_norm
        logprobs[rows] = torch.where(ok, logprob, torch.nan).float()
        if proposal_logprobs is not None:
            proposal = torch.where(drawn.greedy, 0.0, (scaled - drawn.log_total).clamp(max=0.0))
            proposal_logprobs[rows] = torch.where(ok, proposal, torch.nan).float()
        if drawing.return_model_logprobs and model_logprobs is not None:
            norms = mixture.norms or levels_and_log_sums(mixture.logits, vocabulary)
            # The level is taken off first: beside one of 1e17 float64 would lose the log-sum.
            each = [
                x.double() - level.double() - log_sum
                for x, level, log_sum in zip(logits, *norms, strict=True)
            ]
            stacked = torch.stack(each, 1).float()
            model_logprobs[rows] = torch.where(ok[:, None], stacked, torch.nan)


def _chunks(rows: int, vocabulary: Vocabulary) -> list[slice]:
    width = vocabulary.chunk_width
    size = max(1, CHUNK_TOKENS // (width + -width % TILE))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
