"""Going on with responses: two calls of `generate` draw what one draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import tiny_tokenizers
import torch

from mod_fused import Ensemble, generate
from mod_fused.guidance import Guidance

PROMPTS = tiny.PROMPTS


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


def bigrams() -> Ensemble:
    return Ensemble([tiny.bigram(0), tiny.bigram(1), tiny.bigram(2)])


def go_on(models: Ensemble, first: Any, position: Any = None, **options: Any) -> Any:
    """The call that follows, as `generate` documents it."""
    return generate(
        models,
        input_ids=first.sequences,
        attention_mask=first.attention_mask,
        seed=first.seeds,
        position=first.lengths if position is None else position,
        **options,
    )


@pytest.mark.parametrize("seed", [3, [3, 2**64 - 1], None], ids=["int", "list", "none"])
@pytest.mark.parametrize("copies", [1, 3])
def test_two_calls_equal_one_exactly(seed: Any, copies: int) -> None:
    options: dict[str, Any] = {"weights": [[0.5, 0.4], [1.0, -0.3]], "use_cache": False}
    begin = {"input_ids": torch.tensor([[3], [4]]), "seed": seed, "num_return_sequences": copies}
    torch.manual_seed(0)
    whole = generate(bigrams(), **begin, **options, max_new_tokens=11)
    torch.manual_seed(0)
    first = generate(bigrams(), **begin, **options, max_new_tokens=4)
    options["weights"] = [w for w in options["weights"] for _ in range(copies)]
    second = go_on(bigrams(), first, max_new_tokens=5, **options)
    third = go_on(bigrams(), second, max_new_tokens=2, position=[9] * 2 * copies, **options)
    assert torch.equal(third.sequences, whole.sequences)
    assert torch.equal(third.seeds, whole.seeds)
    for name in ("tokens", "logprobs"):
        parts = [getattr(out, name) for out in (first, second, third)]
        assert torch.equal(torch.cat(parts, 1), getattr(whole, name))
    assert not torch.equal(second.tokens[:, :4], first.tokens)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "forward_kl"])
def test_with_padding_and_history_the_models_read_on_where_they_were(
    ensemble: Ensemble, divergence: str
) -> None:
    options: dict[str, Any] = {
        "weights": [0.6, 0.7],
        "divergence": divergence,
        "sequence_history": True,
        "return_model_logprobs": True,
    }
    begin: dict[str, Any] = {"seed": [7, 8, 9], "num_return_sequences": 2, **options}
    whole = generate(ensemble, PROMPTS, max_new_tokens=9, **begin)
    first = generate(ensemble, PROMPTS, max_new_tokens=4, **begin)
    history, own = first.model_logprobs.double().sum(1), first.logprobs.double().sum(1)
    for form in (torch.Tensor.float, torch.Tensor.tolist, torch.Tensor.numpy):
        prefixes = {"prefix_logprobs": form(history), "mixture_prefix_logprobs": form(own)}
        second = go_on(ensemble, first, max_new_tokens=5, **prefixes, **options)
        assert torch.equal(torch.cat([first.tokens, second.tokens], 1), whole.tokens)
        for name in ("logprobs", "model_logprobs"):
            both = torch.cat([getattr(first, name), getattr(second, name)], 1)
            torch.testing.assert_close(both, getattr(whole, name), atol=1e-4, rtol=0)
    without = go_on(ensemble, first, max_new_tokens=5, **options)
    matters = (without.logprobs[:, 0] - whole.logprobs[:, 4]).abs().max() > 1e-2
    assert matters == (divergence != "reverse_kl")


def test_prefixes_belong_to_prompts_and_serve_every_response(ensemble: Ensemble) -> None:
    prefix = torch.tensor([[-1.0, -9.0, -2.0], [-4.0, -1.0, -1.0], [-3.0, -3.0, -3.5]])
    own = [-1.0, -2.0, -3.0]
    options: dict[str, Any] = {
        "weights": [0.6, 0.7],
        "divergence": "jsd",
        "sequence_history": True,
        "max_new_tokens": 3,
    }
    out = generate(
        ensemble, PROMPTS, seed=[7, 8, 9], prefix_logprobs=prefix, mixture_prefix_logprobs=own,
        num_return_sequences=2, **options,
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        alone = generate(
            ensemble, prompt, seed=[7 + row], prefix_logprobs=prefix[row : row + 1],
            mixture_prefix_logprobs=own[row : row + 1], **options,
        )  # fmt: skip
        assert torch.equal(out.tokens[2 * row], alone.tokens[0])
        torch.testing.assert_close(out.logprobs[2 * row], alone.logprobs[0], atol=1e-4, rtol=0)


def test_a_guide_reads_what_was_said_and_functions_count_their_own_steps(
    ensemble: Ensemble,
) -> None:
    seen: list[tuple[int, int]] = []

    def mask(step: int, sequences: torch.Tensor) -> torch.Tensor:
        seen.append((step, sequences.shape[1]))
        return torch.arange(tiny.V).expand(len(sequences), -1) != sequences[:, -1:]

    options: dict[str, Any] = {
        "weights": [0.6, 0.7],
        "value_fn": Guidance([tiny.gpt2(5)]),
        "value_weights": [3.0],
        "mask_fn": mask,
    }
    whole = generate(ensemble, PROMPTS, seed=1, max_new_tokens=7, **options)
    first = generate(ensemble, PROMPTS, seed=1, max_new_tokens=3, **options)
    seen.clear()
    second = go_on(ensemble, first, max_new_tokens=4, **options)
    assert torch.equal(torch.cat([first.tokens, second.tokens], 1), whole.tokens)
    assert seen == [(step, first.sequences.shape[1] + step) for step in range(4)]


def test_rows_that_ended_are_the_callers_to_leave_out() -> None:
    options: dict[str, Any] = {"weights": [0.5, 0.4], "eos_token_id": [1, 2, 5, 6, 7]}
    begin: dict[str, Any] = {"input_ids": torch.arange(3, 13)[:, None], "seed": 0}
    whole = generate(bigrams(), **begin, **options, max_new_tokens=9)
    first = generate(bigrams(), **begin, **options, max_new_tokens=3)
    going = torch.tensor([reason == "length" for reason in first.finish_reasons])
    assert going.any() and (first.lengths[~going] < 3).any()
    with pytest.raises(ValueError, match="padding on the left"):
        go_on(bigrams(), first, **options)
    second = generate(
        bigrams(),
        input_ids=first.sequences[going],
        attention_mask=first.attention_mask[going],
        seed=first.seeds[going],
        position=first.lengths[going],
        max_new_tokens=6,
        **options,
    )
    for row, origin in enumerate(going.nonzero()[:, 0].tolist()):
        length = int(whole.lengths[origin])
        said = [*first.tokens[origin].tolist(), *second.tokens[row].tolist()]
        assert said[:length] == whole.tokens[origin, :length].tolist()
        assert second.lengths[row] == length - 3


def test_a_stop_string_across_the_border_of_two_calls_does_not_count() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    step = lambda tokens: 100.0 * torch.eye(len(tokenizer))[[a if tokens[0, -1] == b else b]]  # noqa: E731
    models = Ensemble([None, step], tokenizer)
    options: dict[str, Any] = {"weights": [1.0], "use_cache": False, "stop_strings": ["ba"]}
    first = generate(models, input_ids=torch.tensor([[b]]), seed=0, max_new_tokens=2, **options)
    second = go_on(models, first, max_new_tokens=5, **options)
    assert first.texts == ["ab"] and first.finish_reasons == ["length"]
    assert second.texts == ["aba"] and second.finish_reasons == ["stop"]


@pytest.mark.parametrize(
    "position",
    [7, np.int64(7), [7, 7], np.array([7, 7]), np.array([7, 7], np.uint64), torch.tensor([7, 7])],
    ids=lambda p: type(p).__name__,
)
def test_positions_of_every_form(position: Any) -> None:
    options: dict[str, Any] = {"input_ids": torch.tensor([[3], [4]]), "weights": [0.5, 0.4]}
    out = generate(bigrams(), seed=1, position=position, max_new_tokens=3, **options)
    late = generate(bigrams(), seed=1, position=[9, 9], max_new_tokens=1, **options)
    expected = generate(bigrams(), seed=1, position=7, max_new_tokens=3, **options)
    assert torch.equal(out.tokens, expected.tokens) and len(late.tokens) == 2
    highest = 2**63 - 3
    generate(bigrams(), position=highest, max_new_tokens=3, **options)


def prefixes(of_models: Any, own: Any = (0.0, 0.0)) -> dict[str, Any]:
    return {
        "divergence": "jsd",
        "prefix_logprobs": of_models,
        "mixture_prefix_logprobs": own,
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"position": -1}, ValueError, r"position must be in \[0, 2\^63 - max_new_tokens.*got -1"),
        ({"position": [0, -1]}, ValueError, "position must be in"),
        ({"position": torch.tensor([0, -1])}, ValueError, "position must be in"),
        ({"position": 2**63 - 2}, ValueError, "position must be in"),
        ({"position": torch.tensor([0, 2**63 - 1])}, ValueError, "position must be in"),
        ({"position": 2**64}, ValueError, "position must be in"),
        ({"position": [0]}, ValueError, "position must be one integer or B = 2, got 1"),
        ({"position": torch.zeros(3).long()}, ValueError, r"position must have shape \[B\]"),
        ({"position": torch.zeros(2)}, TypeError, "position must be int64"),
        ({"position": 1.0}, TypeError, "position must be an integer"),
        ({"position": True}, TypeError, "position must be a number, got bool"),
        ({"position": None}, TypeError, "position must be a number, got NoneType"),
        ({"prefix_logprobs": [[0.0] * 3] * 2}, ValueError, "without sequence_history=True"),
        ({"mixture_prefix_logprobs": [0.0] * 2}, ValueError, "without sequence_history=True"),
        (prefixes([[0.0] * 2] * 2), ValueError, r"\[B, models\] = \[2, 3\]"),
        (prefixes([[0.0, "x"]]), TypeError, "prefix_logprobs must be numbers"),
        (prefixes(torch.zeros(2, 3).half()), TypeError, "float32 or float64"),
        (prefixes([[0.0, np.nan, 0.0]] * 2), ValueError, "must be finite"),
        (prefixes([[0.0] * 3] * 2, [0.0]), ValueError, r"\[B\] = \[2\], got \[1\]"),
        (prefixes([[0.0] * 3] * 2, ["x"]), TypeError, "mixture_prefix_logprobs must be numbers"),
        (prefixes([[0.0] * 3] * 2, [0.0, np.inf]), ValueError, "must be finite"),
        (prefixes([[0.0] * 3] * 2, None), ValueError, "go together with the exact normalizer"),
        (prefixes(None), ValueError, "go together with the exact normalizer"),
        (
            prefixes([[0.0] * 3] * 2) | {"normalizer": "zero"},
            ValueError,
            "needs normalizer 'exact'",
        ),
    ],
)
def test_bad_positions_and_prefixes_are_refused_before_any_model_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    ran: list[Any] = []
    models = Ensemble([lambda tokens: ran.append(tokens)] * 3)
    if "without" not in message:
        options = {"sequence_history": True, **options}
    with pytest.raises(error, match=message):
        generate(
            models,
            input_ids=torch.tensor([[3], [4]]),
            weights=[0.5, 0.4],
            max_new_tokens=3,
            **options,
        )
    assert not ran
