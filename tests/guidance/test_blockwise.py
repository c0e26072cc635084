"""Blockwise best-of-K: forked caches, seeds, ends, bad scores, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from cases import normal
from tiny_models import TASTE, by_hand, ids_of, seeds_of, taste

from mod_fused import Ensemble, generate
from mod_fused.guidance import BlockwiseOutput, best_of_n, blockwise_best_of_k

PROMPTS = tiny.PROMPTS
WEIGHTS = [0.6, 0.7]


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


@pytest.mark.parametrize("block_length", [1, 3])
def test_forked_caches_say_what_recomputing_says(ensemble: Ensemble, block_length: int) -> None:
    runs = [
        blockwise_best_of_k(
            ensemble,
            PROMPTS,
            weights=WEIGHTS,
            divergence="jsd",
            sequence_history=True,
            score_fn=taste,
            k=3,
            block_length=block_length,
            max_new_tokens=8,
            seed=[7, 8, 9],
            use_cache=use_cache,
            return_model_logprobs=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    torch.testing.assert_close(runs[0].model_logprobs, runs[1].model_logprobs, atol=1e-4, rtol=0)
    plain = generate(ensemble, PROMPTS, weights=WEIGHTS, seed=[7, 8, 9], max_new_tokens=8)
    for row, prompt in enumerate(PROMPTS):
        assert not torch.equal(runs[0].tokens[row], plain.tokens[row])
        # The log-probabilities, history included, are those of full passes and the oracle.
        drawn, each = by_hand(
            ensemble.models,
            [ids_of(prompt)] * 3,
            runs[0].tokens[row].tolist(),
            True,
            weights=WEIGHTS,
            divergence="jsd",
        )
        np.testing.assert_allclose(runs[0].model_logprobs[row].numpy(), each, atol=1e-4)
        np.testing.assert_allclose(runs[0].logprobs[row].numpy(), drawn, atol=1e-3)
        text = torch.tensor([*ids_of(prompt), *runs[0].tokens[row].tolist()])
        torch.testing.assert_close(runs[0].scores[row], TASTE[text].sum())
    assert runs[0].blocks.tolist() == [math.ceil(8 / block_length)] * 3
    assert runs[0].texts == [
        " " + ensemble.tokenizer.decode(row, skip_special_tokens=True)
        for row in runs[0].tokens.tolist()
    ]


def test_prompts_are_read_once_and_each_token_once() -> None:
    read: list[tuple[int, ...]] = []
    model = tiny.gpt2(1, eos=None)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    blockwise_best_of_k(
        Ensemble([model, tiny.llama(0)], tiny.tokenizer(eos_token=None)),
        PROMPTS,
        score_fn=taste,
        k=4,
        block_length=2,
        max_new_tokens=5,
    )
    assert read == [(3, 9), *[(12, 1)] * 4]


@pytest.mark.parametrize("seed", [3, [5, -6, 2**64 - 1], None], ids=str)
def test_one_continuation_is_what_generate_draws(ensemble: Ensemble, seed: Any) -> None:
    options: dict[str, Any] = {
        "weights": [[0.6, 0.7], [1.0, 0.0], [0.2, 0.3]],
        "temperature": [1.5, 0.7, 1.0],
        "divergence": "jsd",
        "sequence_history": True,
        "max_new_tokens": 6,
        "seed": seed,
        "return_model_logprobs": True,
    }
    torch.manual_seed(1)
    expected = generate(ensemble, PROMPTS, **options)
    torch.manual_seed(1)
    out = blockwise_best_of_k(ensemble, PROMPTS, score_fn=taste, k=1, block_length=2, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.logprobs, expected.logprobs)
    assert torch.equal(out.model_logprobs, expected.model_logprobs)
    assert out.finish_reasons == expected.finish_reasons and out.texts == expected.texts
    assert out.kl_bound.eq(0).all()


def test_without_weights_values_tilt_the_reference_alone() -> None:
    ran: list[Any] = []
    options: dict[str, Any] = {
        "input_ids": torch.full((3, 1), 3),
        "value_fn": lambda step, sequences: normal(3, tiny.V).expand(1, len(sequences), -1).clone(),
        "value_weights": [0.5],
        "divergence": "jsd",
        "seed": 2,
        "use_cache": False,
        "return_model_logprobs": True,
    }
    models = [tiny.bigram(0), lambda tokens: ran.append(tokens)]
    out = blockwise_best_of_k(Ensemble(models), score_fn=taste, k=1, block_length=9, **options)
    expected = generate(Ensemble(models[:1]), weights=[], **options)
    assert torch.equal(out.tokens, expected.tokens)
    assert torch.equal(out.model_logprobs, expected.model_logprobs)
    assert not ran


def test_best_of_n_is_the_best_of_n_independent_generates(ensemble: Ensemble) -> None:
    n, seeds = 5, [11, 13, -4]
    options: dict[str, Any] = {"weights": WEIGHTS, "max_new_tokens": 7, "eos_token_id": [2, 5, 9]}
    out = best_of_n(ensemble, PROMPTS, score_fn=taste, n=n, seed=seeds, **options)
    tries = [
        generate(ensemble, PROMPTS, seed=[seeds_of(s, n)[k] for s in seeds], **options)
        for k in range(n)
    ]
    winners = []
    for row, prompt in enumerate(PROMPTS):
        texts = [t.tokens[row, : t.lengths[row]].tolist() for t in tries]
        scores = [float(TASTE[[*ids_of(prompt), *text]].sum()) for text in texts]
        winners.append(int(np.argmax(scores)))
        assert out.tokens[row, : out.lengths[row]].tolist() == texts[winners[-1]]
        assert abs(out.scores[row] - max(scores)) < 1e-5
    assert max(winners) > 0 and set(out.finish_reasons) == {"eos", "length"}
    assert out.blocks.tolist() == [1, 1, 1]
    assert out.kl_bound.tolist() == pytest.approx([math.log(5) - 0.8] * 3)


def test_a_row_does_not_depend_on_its_place_or_its_company(ensemble: Ensemble) -> None:
    order, seeds = [2, 0, 1], [5, 6, 7]
    options: dict[str, Any] = {
        "weights": WEIGHTS,
        "score_fn": taste,
        "k": 3,
        "block_length": 3,
        "eos_token_id": [2, 5],
        "max_new_tokens": 8,
    }
    first = blockwise_best_of_k(ensemble, PROMPTS, seed=seeds, **options)
    moved = blockwise_best_of_k(
        ensemble, [PROMPTS[i] for i in order], seed=[seeds[i] for i in order], **options
    )
    assert torch.equal(moved.tokens, first.tokens[order])
    assert torch.equal(moved.blocks, first.blocks[order])
    for row in range(3):
        alone = blockwise_best_of_k(ensemble, PROMPTS[row], seed=[seeds[row]], **options)
        length = int(first.lengths[row])  # of the longest response alone, whatever was dropped
        assert alone.tokens[0].tolist() == first.tokens[row, :length].tolist()
        torch.testing.assert_close(alone.scores[0], first.scores[row])


def chain_of(table: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: table[tokens[:, -1]]


def run(score_fn: Any, table: torch.Tensor | None = None, **options: Any) -> BlockwiseOutput:
    """64 prompts of one token on an order-1 chain, flat over six tokens unless given."""
    defaults: dict[str, Any] = {
        "input_ids": torch.full((64, 1), 3),
        "k": 4,
        "block_length": 2,
        "max_new_tokens": 6,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "seed": 0,
        "use_cache": False,
    }
    chain = chain_of(torch.zeros(6, 6) if table is None else table)
    return blockwise_best_of_k(Ensemble([chain]), score_fn=score_fn, **(defaults | options))


def test_an_ended_response_keeps_its_score_and_is_not_drawn_on() -> None:
    calls: list[torch.Tensor] = []

    def shorter(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(mask)
        assert mask.shape == sequences.shape
        assert sequences[mask == 0].eq(0).all() and mask[:, 0].all()
        return 10.0 - mask.sum(dim=1) - 100.0 * len(calls)

    out = run(shorter)
    # The shortest wins: an end in the first block if one of four continuations has one.
    ends = (out.tokens == 1).long()
    assert torch.equal(out.lengths, torch.where(ends.any(1), ends.argmax(1) + 1, 6))
    assert [r == "eos" for r in out.finish_reasons] == ends.any(1).tolist()
    behind = torch.arange(out.tokens.shape[1]) >= out.lengths[:, None]
    assert out.tokens[behind].eq(0).all() and out.logprobs[behind].eq(0).all()
    assert torch.equal(out.blocks, (out.lengths + 1) // 2)
    assert set(out.blocks.tolist()) >= {1, 2}
    assert torch.equal(out.scores, 9.0 - out.lengths - 100.0 * out.blocks)
    assert len(calls) == int(out.blocks.max())
    # What is said about it later does not matter, be it NaN.
    calls.clear()

    def forgetful(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = shorter(sequences, mask)
        ended_before = (sequences[:, 1:3] == 1).any(1) & (sequences.shape[1] > 3)
        return torch.where(ended_before, torch.nan, scores)

    assert torch.equal(run(forgetful).scores, out.scores)
    # Scores against an end: only four ends of four continuations end a response early.
    out = run(lambda sequences, mask: -(sequences == 1).any(1).long())
    assert (out.blocks == 3).float().mean() > 0.9


def test_it_stops_when_every_continuation_has_ended_inside_a_block() -> None:
    table = torch.zeros(6, 6)
    table[:, 1] = 50.0
    widths: list[int] = []
    out = run(lambda s, m: [widths.append(s.shape[1]), m.sum(1)][1], table, block_length=5)
    assert widths == [2] and out.tokens.shape == (64, 1) and out.blocks.eq(1).all()


def test_stop_strings_follow_the_chosen_continuations() -> None:
    words = {name: tiny.VOCAB[name] for name in ("fox", "dog", "ran")}
    table = torch.full((tiny.V, tiny.V), -50.0)
    table[:, list(words.values())] = 0.0
    options: dict[str, Any] = {
        "score_fn": lambda sequences, mask: TASTE[sequences[:, -1]],
        "k": 3,
        "block_length": 1,
        "max_new_tokens": 8,
        "stop_strings": "dog ran",
        "use_cache": False,
        "seed": 2,
    }
    models = Ensemble([chain_of(table)], tiny.tokenizer())
    out = blockwise_best_of_k(models, input_ids=torch.full((60, 1), 3), **options)
    assert out.texts is not None
    for text, reason in zip(out.texts, out.finish_reasons, strict=True):
        assert text.endswith("dog ran") == (reason == "stop")
        assert "dog ran" not in text.removesuffix("dog ran")
    assert set(out.finish_reasons) == {"stop", "length"}


def test_invalid_continuations_lose_and_a_row_without_others_is_invalid() -> None:
    table = torch.zeros(6, 6)
    table[5] = torch.nan  # nothing can be drawn after 5
    options: dict[str, Any] = {"eos_token_id": [], "max_new_tokens": 4}
    out = run(lambda sequences, mask: (sequences == 5).sum(1), table, **options)
    # A 5 inside a block ends its continuation, a 5 at the block's end is chosen, and the next
    # block has nothing to draw.
    assert not out.tokens[:, 0].eq(5).any()
    dead = out.tokens[:, 1] == 5
    assert 0 < dead.sum() < 64
    assert torch.equal(~dead, out.valid)
    assert out.lengths[dead].eq(2).all() and out.lengths[~dead].eq(4).all()
    assert [r == "invalid" for r in out.finish_reasons] == dead.tolist()
    assert out.scores[dead].isnan().all() and not out.scores[~dead].isnan().any()
    assert out.logprobs[dead, 2].isnan().all() and not out.logprobs[~dead].isnan().any()


def test_nan_scores_lose_to_all_others_and_minus_infinity_is_a_score() -> None:
    def never_2(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where((sequences == 2).any(1), torch.nan, -torch.inf)

    out = run(never_2, k=32, max_new_tokens=2, eos_token_id=[])
    assert not (out.tokens == 2).any() and out.scores.eq(-torch.inf).all()
    with pytest.raises(ValueError, match="NaN for all continuations of prompt 0"):
        run(lambda sequences, mask: torch.full((len(mask),), torch.nan))


def test_of_equal_scores_the_first_continuation_wins() -> None:
    out = run(lambda sequences, mask: torch.zeros(len(mask), dtype=torch.int32))
    chain = chain_of(torch.zeros(6, 6))
    expected = generate(
        Ensemble([None, chain]),
        input_ids=torch.full((64, 1), 3),
        weights=[1.0],
        max_new_tokens=6,
        eos_token_id=1,
        pad_token_id=0,
        seed=0,
    )
    assert torch.equal(out.tokens, expected.tokens)


class Recorder:
    """A streamer as transformers' are."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.calls.append(tokens.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("block_length", [1, 2, 4, 99])
def test_streamed_blocks_join_to_the_tokens(block_length: int) -> None:
    events: list[Any] = []

    def scores(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        events.append("scored")
        return normal(5, 6)[sequences].sum(1)

    def show(step: int, tokens: torch.Tensor) -> None:
        events.append((step, tokens))

    options: dict[str, Any] = {"block_length": block_length, "eos_token_id": [1, 4]}
    options |= {"input_ids": torch.full((5, 1), 3), "k": 3}
    out = run(scores, streamer=show, **options)
    assert torch.equal(out.tokens, run(scores, **options).tokens)
    assert set(out.finish_reasons) >= {"eos"} and len(set(out.lengths.tolist())) > 1
    shown = [e for e in events if e != "scored"]
    assert [step for step, _ in shown] == list(range(out.tokens.shape[1]))
    assert torch.equal(torch.stack([tokens for _, tokens in shown], 1), out.tokens)
    # The steps of a block come behind its scores, before the next block's.
    for number, event in enumerate(events):
        if event != "scored":
            assert events[:number].count("scored") == event[0] // block_length + 1


def test_a_transformers_streamer_gets_the_prompt_the_chosen_tokens_and_one_end(
    ensemble: Ensemble,
) -> None:
    options: dict[str, Any] = {"weights": WEIGHTS, "score_fn": taste, "max_new_tokens": 5}
    for choose, size in (
        (blockwise_best_of_k, {"k": 3, "block_length": 2}),
        (best_of_n, {"n": 3}),
    ):
        streamer = Recorder()
        out = choose(ensemble, PROMPTS[0], streamer=streamer, seed=1, **size, **options)
        tokens = [[t] for t in out.tokens[0].tolist()]
        assert streamer.calls == [[ids_of(PROMPTS[0])], *tokens, "end"]


@pytest.mark.parametrize(
    ("options", "error", "puts"),
    [
        ({"score_fn": lambda s, m: torch.full((len(m),), torch.nan)}, ValueError, 1),
        ({"score_fn": lambda s, m: m[:, 0] if s.shape[1] < 5 else 1 / 0}, ZeroDivisionError, 3),
        ({"input_ids": torch.full((2, 1), 3)}, ValueError, 0),
        ({"k": 0}, ValueError, 0),
        ({"top_p": 2.0}, ValueError, 0),
        ({"num_candidates": 2}, TypeError, 0),
        ({"num_beams": 2}, TypeError, 0),
    ],
)
def test_the_end_of_a_stream_comes_once_whatever_is_raised(
    options: dict[str, Any], error: type[Exception], puts: int
) -> None:
    streamer = Recorder()
    options = {"score_fn": taste, "input_ids": torch.full((1, 1), 3), **options}
    with pytest.raises(error):
        run(**options, streamer=streamer, eos_token_id=[])
    assert streamer.calls[-1] == "end" and len(streamer.calls) == puts + 1
    assert streamer.calls.count("end") == 1
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(Ensemble([chain_of(torch.zeros(6, 6))]), score_fn=taste, n=0, streamer=streamer)
    assert streamer.calls.count("end") == 2


def test_steps_in_which_no_chosen_row_drew_are_not_streamed() -> None:
    table = torch.zeros(6, 6)
    table[5] = torch.nan  # nothing can be drawn after 5
    shown: list[Any] = []
    options: dict[str, Any] = {"input_ids": torch.full((1, 1), 3), "block_length": 1, "seed": 3}
    out = run(
        lambda sequences, mask: (sequences == 5).sum(1),
        table,
        streamer=lambda step, tokens: shown.append(tokens.tolist()),
        eos_token_id=[],
        **options,
    )
    assert out.finish_reasons == ["invalid"] and out.tokens.shape[1] > out.lengths[0] > 0
    assert shown == [[t] for t in out.tokens[0, : int(out.lengths[0])].tolist()]


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (lambda s, m: torch.zeros(len(s), 1), ValueError, r"shape \[N = 256\], got \[256, 1\]"),
        (lambda s, m: torch.zeros(64), ValueError, r"shape \[N = 256\], got \[64\]"),
        (lambda s, m: torch.zeros(()), ValueError, r"shape \[N = 256\], got \[\]"),
        (lambda s, m: [0.0] * len(s), TypeError, "must return a tensor, got list"),
        (lambda s, m: m[:, 0] == 1, TypeError, "real numbers, got torch.bool"),
    ],
)
def test_scores_of_another_kind_are_refused(
    scores: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(scores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.0}, TypeError, "k must be an integer"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": True}, TypeError, "block_length must be a number, got bool"),
        ({"score_fn": 3}, TypeError, "score_fn must be a function, got int"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"streamer": 3}, TypeError, "streamer must be a callable"),
        ({"resample_fn": print}, TypeError, "resample_fn is set here"),
        ({"num_return_sequences": 2}, TypeError, "num_return_sequences is set here"),
        ({"num_candidates": 2}, TypeError, "num_candidates is set here"),
        ({"num_beams": 2}, TypeError, "num_beams is set here"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"weights": [1.0, 1.0]}, ValueError, "weights"),
        ({"beams": 3}, TypeError, "beams"),
    ],
)
def test_bad_arguments_are_refused_before_any_model_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    ran: list[Any] = []
    defaults: dict[str, Any] = {"score_fn": taste, "k": 2, "block_length": 2}
    chain = Ensemble([lambda tokens: ran.append(tokens)] * 2)
    with pytest.raises(error, match=message):
        blockwise_best_of_k(
            chain, input_ids=torch.ones(2, 1).long(), use_cache=False, **(defaults | options)
        )
    assert not ran


def test_what_cannot_be_drawn_from_or_copied_is_refused() -> None:
    ran: list[Any] = []
    options: dict[str, Any] = {
        "input_ids": torch.ones(2, 1).long(),
        "score_fn": taste,
        "block_length": 2,
    }
    step = lambda tokens: ran.append(tokens)  # noqa: E731
    for k in (1, 2):
        with pytest.raises(TypeError, match="the reference is a callable.*use_cache=False"):
            blockwise_best_of_k(Ensemble([step, step]), weights=[0.5], k=k, **options)
    with pytest.raises(ValueError, match="draws from the reference, but the ensemble has none"):
        blockwise_best_of_k(Ensemble([None, step]), k=2, **options)
    with pytest.raises(TypeError, match="must be a mod_fused.Ensemble, got function"):
        blockwise_best_of_k(step, k=2, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n(Ensemble([step]), n=0, input_ids=options["input_ids"], score_fn=taste)
    assert not ran
