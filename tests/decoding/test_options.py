"""The arguments of `generate`: checked without a draw, whatever torch's defaults are, and NumPy's
numbers taken where Python's are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mod_fused
from mod_fused import Ensemble, generate
from mod_fused.decoding.options import off_at_corners, support_cut
from mod_fused.guidance import Guidance, best_of_n

IDS = torch.tensor([[3], [4]])


def bigrams() -> Ensemble:
    return Ensemble([tiny.bigram(0), tiny.bigram(1), tiny.bigram(2)])


class Ops(TorchDispatchMode):
    """Records the ops that compute something; those on meta tensors do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.namespace)
        return out


@pytest.mark.parametrize("values", [False, True])
def test_no_op_of_the_package_runs_before_the_models(values: bool) -> None:
    before: list[list[str]] = []
    bad: dict[str, Any] = {"top_p": 1.5}

    def step(tokens: torch.Tensor) -> torch.Tensor:
        before.append(list(ops.names))
        return torch.zeros(len(tokens), 8)

    options: dict[str, Any] = {
        "input_ids": IDS,
        "weights": torch.tensor([[0.5], [0.2]]),
        "temperature": [0.5, 1.0],
        "top_k": torch.tensor([3, 0]),
        "seed": None,
        "max_new_tokens": 1,
    }
    if values:
        options["value_fn"] = lambda step, sequences: torch.zeros(2, 2, 8)
        options["value_weights"] = [[1.0, 2.0], [0.0, 1.0]]
    with Ops() as ops:
        with pytest.raises(ValueError, match="top_p"):
            generate(Ensemble([step, step]), **options, **bad)
        assert not before and "mod_fused" not in ops.names
        generate(Ensemble([step, step]), **options)
    assert "mod_fused" not in before[0] and "mod_fused" in ops.names


def test_a_refused_call_draws_no_seeds() -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="min_p"):
        generate(bigrams(), input_ids=IDS, weights=[0.5, 0.1], min_p=2.0)
    assert torch.rand(()) == expected


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def everything(models: Ensemble, scorer: Any) -> list[torch.Tensor]:
    """Tensors of all that the decoder gives."""
    options: dict[str, Any] = {
        "weights": [[0.5, 0.4], [0.2, 0.7]],
        "temperature": [0.9, 1.1],
        "top_p": 0.9,
        "top_k": [5, 9],
        "divergence": "jsd",
        "sequence_history": True,
        "return_model_logprobs": True,
        "value_fn": Guidance([scorer], candidates=6),
        "value_weights": [0.5],
        "max_new_tokens": 4,
        "seed": 1,
    }
    out = generate(models, ["the fox", "it"], num_return_sequences=2, **options)
    more = generate(
        models,
        input_ids=out.sequences,
        attention_mask=out.attention_mask,
        position=4,
        **{**options, "weights": [0.5, 0.4], "temperature": 1.0, "top_k": None},
    )

    tokens_alone = {k: x for k, x in options.items() if not k.startswith("value")}
    chosen = generate(models, ["the fox", "it"], num_candidates=3, **tokens_alone)

    def score(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (sequences * mask).sum(1)

    best = best_of_n(models, ["the fox", "it"], score_fn=score, n=2, **options)
    results = [*vars(out).values(), *vars(more).values(), *vars(chosen).values(), *best]
    return [x for x in results if isinstance(x, torch.Tensor)]


def the_op(backend: str) -> list[torch.Tensor]:
    cpu = {"generator": torch.Generator("cpu").manual_seed(0), "device": "cpu"}
    ref, one, two = torch.randn(3, 2, 50, dtype=torch.float32, **cpu)
    results = []
    for divergence in ("reverse_kl", "jeffrey", "alpha:0.5"):
        options: dict[str, Any] = {"divergence": divergence, "backend": backend}
        for weights in ([0.5, 0.4], [[0.5, 0.4], [0.1, 0.2]]):
            results.append(mod_fused.log_probs(ref, [one, two], weights, **options))
            drawn = mod_fused.sample(
                ref,
                [one, two],
                weights,
                temperature=[0.5, 0.9],
                top_k=[3, 20],
                top_p=0.9,
                min_p=0.01,
                seed=[1, 2],
                position=[0, 3],
                return_model_logprobs=True,
                return_proposal_logprobs=True,
                **options,
            )
            results += [*drawn]
    return results


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_torchs_defaults_change_nothing(defaults: None, default: Any) -> None:
    models, scorer = tiny.three_models(), tiny.gpt2_value(3)
    backends = [b for b in ("cpu", "torch") if mod_fused.backends()[b] == "available"]
    expected = everything(models, scorer) + [x for b in backends for x in the_op(b)]
    if default == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(default)
    got = everything(models, scorer) + [x for b in backends for x in the_op(b)]
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and x.device == y.device
        torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)


def test_numpys_numbers_and_arrays_serve_as_pythons_do() -> None:
    given: dict[str, Any] = {
        "weights": [[0.5, 0.25], [1.0, -0.5]],
        "value_weights": [[1.0, 2.0], [0.5, 0.0]],
        "temperature": [0.5, 1.5],
        "top_k": [0, 7],
        "top_p": [1.0, 0.75],
        "min_p": [0.0, 0.125],
        "seed": [5, 2**64 - 1],
        "position": [3, 4],
        "logit_scales": [1.0, 0.5, 2.0],
    }
    one: dict[str, Any] = {
        "plausibility": 0.125,
        "plausibility_tensor": 1,
        "max_new_tokens": 5,
        "num_return_sequences": 2,
        "vocab_size": 9,
        "pad_token_id": 3,
        "eos_token_id": [7, 8],
    }
    table = torch.randn(2, 1, 9, generator=torch.Generator().manual_seed(0))
    fixed: dict[str, Any] = {
        "value_fn": lambda step, ids: table.expand(2, len(ids), 9).contiguous(),
        "use_cache": False,
        "input_ids": IDS,
    }
    expected = generate(bigrams(), **fixed, **given, **one)
    kinds = {"seed": np.uint64, "top_k": np.int32, "position": np.uint32}
    arrays = {k: np.array(v, kinds.get(k, np.float32)) for k, v in given.items()}
    scalars = {k: np.float32(v) if isinstance(v, float) else np.int64(v) for k, v in one.items()}
    scalars["eos_token_id"] = np.array(one["eos_token_id"], np.int16)
    rows = {k: [np.float32(x) if isinstance(x, float) else x for x in v] for k, v in given.items()}
    rows["weights"] = [np.array(row) for row in given["weights"]]
    for form in (arrays, rows):
        out = generate(bigrams(), **fixed, **form, **scalars)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.logprobs, expected.logprobs)
    for name, value in {"seed": np.uint64(2**64 - 1), "temperature": np.float32(0.5)}.items():
        options: dict[str, Any] = {"weights": [0.5, 0.25], "input_ids": IDS, "seed": 1}
        a = generate(bigrams(), **{**options, name: value})
        b = generate(bigrams(), **{**options, name: value.item()})
        assert torch.equal(a.tokens, b.tokens)
    with pytest.raises(TypeError, match="seed must be an integer"):
        generate(bigrams(), input_ids=IDS, weights=[0.5, 0.2], seed=np.array([1.0, 2.0]))
    with pytest.raises(TypeError, match="top_k"):
        generate(bigrams(), input_ids=IDS, weights=[0.5, 0.2], top_k=np.array([True, False]))


def test_padding_falls_back_to_the_first_end_that_was_given() -> None:
    def pads(eos: Any, models: Ensemble, **options: Any) -> int:
        script = torch.full((2, tiny.V), 0.0)
        script[0, 9], script[1, 4] = 100.0, 100.0
        by_script = Ensemble([models.models[0], lambda tokens: script], models.tokenizers)
        out = generate(
            by_script, weights=[1.0], eos_token_id=eos, max_new_tokens=3, seed=0, **options
        )
        assert out.lengths.tolist() == [1, 3]
        return int(out.tokens[0, 1])

    ids = {"input_ids": torch.tensor([[5], [6]])}
    plain = Ensemble([tiny.bigram(0)] * 2)
    assert pads([9, 7], plain, **ids) == 9 and pads([7, 9], plain, **ids) == 7
    assert pads(np.array([7, 9]), plain, **ids) == 7 and pads(9, plain, **ids) == 9
    assert pads([9, 7], plain, pad_token_id=2, **ids) == 2
    padded = Ensemble([tiny.bigram(0)] * 2, tiny.tokenizer(pad_token="fox"))
    assert pads([9, 7], padded, **ids) == tiny.VOCAB["fox"]
    ended = Ensemble([tiny.bigram(0)] * 2, tiny.tokenizer())
    assert pads([9, 7], ended, **ids) == 9 and ended.pad_token_id == tiny.EOS


def test_model_log_probabilities_are_returned_when_asked_for_and_the_history_needs_none() -> None:
    options: dict[str, Any] = {
        "input_ids": IDS,
        "weights": [0.5, 0.4],
        "divergence": "jsd",
        "sequence_history": True,
        "seed": 1,
    }
    silent = generate(bigrams(), **options)
    asked = generate(bigrams(), return_model_logprobs=True, **options)
    assert silent.model_logprobs is None and asked.model_logprobs.shape == (2, 20, 3)
    assert torch.equal(silent.tokens, asked.tokens)
    assert torch.equal(silent.logprobs, asked.logprobs)


def test_auto_is_a_thousandth_of_the_reference_off_reverse_kl_and_off_at_corners() -> None:
    assert [support_cut("auto", d) for d in ("jsd", "alpha:0.5", "kl")] == [1e-3, 1e-3, None]
    assert support_cut(0.5, "kl") == 0.5 and support_cut(None, "jsd") is None

    def cut(weights: Any, values: Any = None, valued: bool = False) -> Any:
        options = {"plausibility": 1e-3, "weights": weights, "value_weights": values}
        return off_at_corners(options, valued)

    rows = [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, -1e-40], [2.0, 0.0], [0.0, 1.0]]
    kept = [1e-3, 0.0, 0.0, 1e-3, 0.0, 1e-3, 0.0]
    assert [cut(row) for row in rows] == kept
    by_row = cut(torch.tensor(rows, dtype=torch.float64))
    assert by_row.tolist() == kept
    assert cut(torch.tensor(rows[1])).tolist() == 0.0
    # Values tilt the mixture, unless they have no weight.
    assert cut([1.0, 0.0], None, True) == 1e-3 and cut([1.0, 0.0], [0.0], True) == 0.0
    assert cut([1, 0], torch.tensor([[0.0], [0.5]]), True).tolist() == [0.0, 1e-3]
    assert cut(None, None, True) == 1e-3
