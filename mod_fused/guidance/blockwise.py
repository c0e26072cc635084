"""Blockwise control (Controlled Decoding, arXiv 2310.17022): after every block of tokens keep the
best of K continuations. Best-of-N is the case of one block.

The continuations are rows of one `mod_fused.generate`. The prompts are read once; at the end of a
block the KV cache of the chosen continuation is copied over those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.fields import number, shape_of
from ..decoding.architectures import embedded_ids
from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.memory import check_decoding
from ..decoding.prompts import Prompts, encode_text
from ..decoding.responses import FINISH_REASONS
from ..decoding.sequences import Sequences
from ..decoding.streaming import BlockStream, Stream, streaming
from ..decoding.text import Decoder
from .scorers import Scorer, prefix_values

ScoreFunction = Callable[[Tensor, Tensor], Tensor]
Reward = Callable[[str, str], float]
_INVALID = FINISH_REASONS.index("invalid")
_VALUES = 2**28  # the most values at a time, 1 GiB: a dense scorer gives V per prefix


class BlockwiseOutput(NamedTuple):
    """What `blockwise_best_of_k` returns. T is the length of the longest response.

    Attributes:
        sequences: int64 [B, n + T], the prompts of the first model, left-padded, then the
            responses.
        tokens: int64 [B, T], the responses alone, with pad_token_id behind their ends.
        lengths: int64 [B], tokens in each response, its end-of-sequence token included.
        finish_reasons: B strings: "eos", "stop", "length" or "invalid"; see `GenerateOutput`.
        texts: B decoded responses; None without a tokenizer.
        logprobs: float32 [B, T], log-probability of each token under the policy that the
            continuations are drawn from, before temperature and filters; 0 behind the end.
        model_logprobs: float32 [B, T, M+1], the same under each model, reference first. Its sum
            over T at 0 is log pi_ref of the response. None unless asked for.
        valid: bool [B]; False: no continuation could be drawn at some step.
        scores: float32 [B], score of the response at the end of its last block; NaN where not
            valid.
        blocks: int64 [B], blocks drawn until the response ended.
        kl_bound: float32 [B], blocks (log K - (K - 1) / K) in nats: the bound of best-of-K (arXiv
            2401.01879), once per block. Its mean over many responses to a prompt is an upper bound
            of KL(responses of this function || responses drawn without choosing, at the same
            temperature and filters).
    """

    sequences: Tensor
    tokens: Tensor
    lengths: Tensor
    finish_reasons: list[str]
    texts: list[str] | None
    logprobs: Tensor
    model_logprobs: Tensor | None
    valid: Tensor
    scores: Tensor
    blocks: Tensor
    kl_bound: Tensor


def blockwise_best_of_k(
    ensemble: Ensemble,
    prompts: Prompts | None = None,
    *,
    score_fn: ScoreFunction,
    k: int,
    block_length: int,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    input_ids: Tensor | Sequence[Tensor] | None = None,
    attention_mask: Tensor | Sequence[Tensor] | None = None,
    add_special_tokens: bool | None = None,
    max_new_tokens: int = 20,
    streamer: Any = None,
    **options: Any,
) -> BlockwiseOutput:
    """Draw K continuations of L tokens, keep the one of the best score, and go on from there.

    A continuation that ends inside its block is scored as it is; if it is chosen, the response has
    ended. Of equal scores the first continuation wins. Any policies, divergence and values work. K
    rows are drawn for every prompt until all responses have ended.

    Args:
        ensemble: the models; B prompts are decoded together.
        prompts: as in `mod_fused.generate`.
        score_fn: `score_fn(sequences, mask)` returns the scores of N = B K prefixes, [N], integers
            or floating point of any precision; sequences int64 [N, n + t] are the first model's
            prompts and the responses so far, mask int64 [N, n + t] is 0 for padding on both sides.
            Called once per block. Continuations with a NaN score lose against all others.
        k: K, continuations of each prompt.
        block_length: L, tokens of a block.
        weights: [M] or [B, M], as in `mod_fused.generate`. None draws from the reference alone, as
            the paper does, or from the reference tilted by a value_fn: no policy runs, and the
            prompts are the reference's.
        input_ids: as in `mod_fused.generate`; so are attention_mask and add_special_tokens.
        max_new_tokens: the most tokens of a response; the last block may be shorter than L.
        streamer: as in `mod_fused.generate`, for one row per prompt. It gets the tokens of a block
            when the block's continuation is chosen, which makes them final: step after step.
        **options: further arguments of `mod_fused.generate`. value_fn and mask_fn
            get all N rows; those of prompt b begin at row b K. Random numbers depend only on the
            prompt's seed, the continuation and the position in the response, as with
            num_return_sequences; K = 1 draws the tokens that `generate` draws.

    Returns:
        `BlockwiseOutput`. A prompt is invalid if none of its continuations is valid.

    Raises:
        TypeError, ValueError: before any model runs, for bad arguments, for a callable that keeps
            its own state (pass use_cache=False), or if weights is None and there is no reference.
        TypeError, ValueError: at the end of a block, if score_fn does not return a tensor [N] of
            numbers, or returns NaN for every valid continuation of a prompt.
    """
    with streaming(streamer) as stream:
        k, block_length = _at_least_one("k", k), _at_least_one("block_length", block_length)
        if not callable(score_fn):
            raise TypeError(f"score_fn must be a function, got {type(score_fn).__name__}")
        for name in ("resample_fn", "num_return_sequences", "num_candidates", "num_beams"):
            if name in options:
                raise TypeError(f"{name} is set here and cannot be passed on to generate")
        if not isinstance(ensemble, Ensemble):
            raise TypeError(f"ensemble must be a mod_fused.Ensemble, got {type(ensemble).__name__}")
        if weights is None:
            if ensemble.models[0] is None:
                raise ValueError("weights=None draws from the reference, but the ensemble has none")
            # The op needs a policy or values: without values the reference becomes the only policy.
            absent, weights = ([None], [1.0]) if options.get("value_fn") is None else ([], [])
            ensemble = Ensemble([*absent, ensemble.models[0]], [*absent, ensemble.tokenizers[0]])

        ids, masks = ensemble.encode(
            prompts,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pad_token_id=options.get("pad_token_id"),
            add_special_tokens=add_special_tokens,
        )
        max_new_tokens = _at_least_one("max_new_tokens", max_new_tokens)
        use_cache = bool(options.get("use_cache", True))
        check_decoding(ensemble.present, ids, k, max_new_tokens, use_cache)
        known = [torch.ones_like(i) if m is None else m for i, m in zip(ids, masks, strict=True)]
        choice = _Choice(score_fn, known[0], k, block_length, max_new_tokens, stream)
        out = generate(
            ensemble,
            input_ids=ids,
            attention_mask=known,
            weights=weights,
            max_new_tokens=max_new_tokens,
            num_return_sequences=k,
            resample_fn=choice,
            streamer=BlockStream(stream, k) if stream.active else None,
            **options,
        )
    each = slice(None, None, k)  # the K rows of a prompt are now copies of the chosen one
    return BlockwiseOutput(
        sequences=out.sequences[each],
        tokens=out.tokens[each],
        lengths=out.lengths[each],
        finish_reasons=out.finish_reasons[each],
        texts=None if out.texts is None else out.texts[each],
        logprobs=out.logprobs[each],
        model_logprobs=None if out.model_logprobs is None else out.model_logprobs[each],
        valid=out.valid[each],
        scores=choice.scores,
        blocks=choice.blocks,
        kl_bound=choice.blocks.float() * (math.log(k) - (k - 1) / k),
    )


def best_of_n(
    ensemble: Ensemble,
    prompts: Prompts | None = None,
    *,
    score_fn: ScoreFunction,
    n: int,
    max_new_tokens: int = 20,
    streamer: Any = None,
    **options: Any,
) -> BlockwiseOutput:
    """The response of the best score among n: `blockwise_best_of_k` with one block, which is shown
    to a streamer when all n have ended."""
    with streaming(streamer) as stream:
        return blockwise_best_of_k(
            ensemble,
            prompts,
            score_fn=score_fn,
            k=_at_least_one("n", n),
            block_length=2**63 - 1,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            **options,
        )


class _Choice:
    """The resample_fn: at a block's end it puts each prompt's best continuation into its K rows."""

    def __init__(
        self,
        score_fn: ScoreFunction,
        prompt_mask: Tensor,
        k: int,
        block_length: int,
        max_new_tokens: int,
        stream: Stream,
    ) -> None:
        batch, device = len(prompt_mask), prompt_mask.device
        self.score_fn = score_fn
        self.prompt_mask = prompt_mask.repeat_interleave(k, dim=0)  # (N, n)
        self.k, self.block_length, self.max_new_tokens = k, block_length, max_new_tokens
        self.first = (
            torch.arange(batch, dtype=torch.int64, device=device) * k
        )  # row of each prompt's continuation 0
        self.open = torch.ones(batch, dtype=torch.bool, device=device)  # at this block's start
        self.scores = torch.full((batch,), math.nan, dtype=torch.float32, device=device)
        self.blocks = torch.zeros(batch, dtype=torch.int64, device=device)
        self.stream, self.shown = stream, 0  # how many steps the stream has been shown

    def __call__(
        self, step: int, sequences: Tensor, lengths: Tensor, reasons: Tensor
    ) -> Tensor | None:
        drawn = step + 1
        inside = drawn % self.block_length != 0 and drawn != self.max_new_tokens
        if inside and bool((reasons == 0).any()):
            return None
        responses = torch.arange(drawn, device=lengths.device) < lengths[:, None]
        mask = torch.cat([self.prompt_mask, responses.to(torch.int64)], dim=1)
        scores = self._scores(sequences, mask)
        invalid = reasons == _INVALID
        best = self._best(scores.view(-1, self.k), invalid.view(-1, self.k))
        rows = self.first + best  # the rows of an ended response are all alike
        scores = torch.where(invalid, math.nan, scores).float()
        self.scores = torch.where(self.open, scores[rows], self.scores)
        self.blocks += self.open
        self.open = reasons[rows] == 0
        self._show(sequences[rows], lengths[rows], drawn)
        return rows.repeat_interleave(self.k)

    def _show(self, sequences: Tensor, lengths: Tensor, drawn: int) -> None:
        """Show the block that has been chosen, [B, n + drawn], to the stream."""
        if not self.stream.active:
            return
        tokens, ends = sequences[:, self.shown - drawn :].T.cpu(), lengths.cpu()
        for step, column in enumerate(tokens, start=self.shown):
            self.stream.put(step, column, step < ends)
        self.shown = drawn

    def _scores(self, sequences: Tensor, mask: Tensor) -> Tensor:
        """The scores of all N rows, float64."""
        scores = self.score_fn(sequences, mask)
        if not isinstance(scores, Tensor):
            raise TypeError(f"score_fn must return a tensor, got {type(scores).__name__}")
        if scores.dtype == torch.bool or scores.is_complex():
            raise TypeError(f"score_fn must return real numbers, got {scores.dtype}")
        if scores.shape != (len(sequences),):
            raise ValueError(
                f"score_fn must return scores of shape [N = {len(sequences)}], "
                f"got {shape_of(scores)}"
            )
        return scores.detach().to(sequences.device, torch.float64)

    def _best(self, scores: Tensor, invalid: Tensor) -> Tensor:
        """The best continuation [B] by scores [B, K]. A score of -inf still beats no score."""
        out = invalid | scores.isnan()
        unscored = self.open & out.all(dim=1) & ~invalid.all(dim=1)
        if bool(unscored.any()):
            prompt = int(unscored.nonzero()[0])
            raise ValueError(f"score_fn returned NaN for all continuations of prompt {prompt}")
        least = torch.finfo(torch.float64).min
        return scores.clamp(min=least).masked_fill(out, -math.inf).argmax(dim=1)


def _at_least_one(name: str, x: object) -> int:
    value = number(name, x, int)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def prefix_score(scorers: Sequence[Any], strengths: Sequence[float] | None = None) -> ScoreFunction:
    """sum_j v_j V_j(x, y^t) of the prefixes y^t themselves (Controlled Decoding, arXiv 2310.17022).

    Args:
        scorers: J models or `Scorer`s, dense or scalar. Callables are refused: they read one token
            at a time and cannot score a whole sequence.
        strengths: v, [J]; None means ones.

    Returns:
        A score_fn: sequences and mask int64 [N, L] to float32 [N]. Each call reads the whole
        sequences.

    Raises:
        TypeError: a scorer is a callable.
        ValueError: not one strength per scorer.
    """
    known = [s if isinstance(s, Scorer) else Scorer(s) for s in scorers]
    for scorer in known:
        if not hasattr(scorer.model, "config"):
            raise TypeError(f"a prefix score needs a model, got {type(scorer.model).__name__}")
    weights = [1.0] * len(known) if strengths is None else list(strengths)
    if len(weights) != len(known):
        raise ValueError(f"strengths must be {len(known)} numbers, got {len(weights)}")

    @torch.no_grad()
    def score(sequences: Tensor, mask: Tensor) -> Tensor:
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = (columns * mask).argmax(1, keepdim=True)  # the prefix's end; padding may follow
        total = torch.zeros(len(sequences), dtype=torch.float32, device=sequences.device)
        for weight, scorer in zip(weights, known, strict=True):
            width = embedded_ids(scorer.model) if scorer.dense else 1
            rows = max(1, _VALUES // (width * mask.shape[1]))
            for start in range(0, len(sequences), rows):
                part = slice(start, start + rows)
                batch = Sequences(sequences[part], mask[part], mask[part])
                values = scorer.finish(prefix_values(scorer.model, batch))
                total[part] += weight * values.gather(1, last[part] - 1)[:, 0]
        return total

    return score


def response_score(reward: Reward, tokenizer: Any, prompts: Sequence[str]) -> ScoreFunction:
    """The reward of the responses' text, for `best_of_n`: it needs complete responses.

    Args:
        reward: reward(prompt, response), any float; the response as in `GenerateOutput.texts`.
        tokenizer: of the first model.
        prompts: the B prompts that are decoded; rows b K to (b + 1) K - 1 answer prompt b.
    """
    starts = [len(encode_text(prompt, tokenizer)) for prompt in prompts]
    decoder = Decoder(tokenizer)

    def score(sequences: Tensor, mask: Tensor) -> Tensor:
        copies = len(sequences) // len(prompts)
        rewards = []
        for row, (ids, kept) in enumerate(zip(sequences, mask.bool(), strict=True)):
            prompt = row // copies
            text = decoder(ids[kept][starts[prompt] :].tolist())
            rewards.append(float(reward(prompts[prompt], text)))
        return torch.tensor(rewards, dtype=torch.float64, device="cpu")

    return score
