"""Where `generate` ends a row, what it shows meanwhile, and what it refuses to begin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate

PROMPTS = tiny.PROMPTS
WEIGHTS = [0.6, 0.7]
FOX, DOG, RAN = (tiny.VOCAB[w] for w in ("fox", "dog", "ran"))


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


def scripted(*rows: list[int], vocab_size: int = tiny.V) -> Any:
    """A step() for which row b's next tokens are almost surely rows[b]; keeps its inputs."""

    def step(tokens: torch.Tensor) -> torch.Tensor:
        step.inputs.append(tokens.clone())
        logits = torch.zeros(len(rows), vocab_size)
        for b, row in enumerate(rows):
            logits[b, row[min(len(step.inputs) - 1, len(row) - 1)]] = 100.0
        return logits

    step.inputs = []  # type: ignore[attr-defined]
    return step


def run_script(*rows: list[int], **options: Any) -> tuple[Any, Any]:
    step = scripted(*rows)
    models = Ensemble([step, tiny.bigram(0)], tiny.tokenizer())
    options = {"max_new_tokens": 6, "weights": [0.0], "return_model_logprobs": True, **options}
    return generate(models, input_ids=torch.full((len(rows), 2), 3), seed=0, **options), step


def test_an_ended_row_is_padded_and_the_others_go_on() -> None:
    out, step = run_script([4, 5, 1], [6, 6, 6, 2, 7], [8], eos_token_id=[1, 2], pad_token_id=9)
    assert out.tokens.tolist() == [[4, 5, 1, 9, 9, 9], [6, 6, 6, 2, 9, 9], [8] * 6]
    assert out.lengths.tolist() == [3, 4, 6]
    assert out.finish_reasons == ["eos", "eos", "length"]
    assert out.valid.all()
    assert out.logprobs[0, 3:].eq(0).all() and out.model_logprobs[0, 3:].eq(0).all()
    assert out.model_logprobs[0, :3, 1].lt(-1e-3).all()
    assert step.inputs[0].shape == (3, 2)
    assert [x.tolist() for x in step.inputs[1:]] == [[[t] for t in c] for c in out.tokens.T[:-1]]
    assert out.sequences[:, 2:].equal(out.tokens) and out.sequences[:, :2].eq(3).all()
    assert out.texts[0] == " red blue"  # ids 4 and 5; the end and the padding are not text


def test_it_stops_when_all_rows_have_ended() -> None:
    out, step = run_script([4, 1], [1], eos_token_id=1)
    assert out.tokens.shape == (2, 2) and len(step.inputs) == 2
    assert out.logprobs.shape == (2, 2) and out.model_logprobs.shape == (2, 2, 2)
    assert out.sequences.shape == (2, 4)
    out, step = run_script([4, 1], [1], eos_token_id=[])
    assert out.tokens.shape == (2, 6) and len(step.inputs) == 6


def test_stop_strings_match_the_text_across_tokens() -> None:
    rows = [DOG, FOX, RAN, DOG], [FOX, DOG, RAN], [RAN, FOX, RAN, FOX]
    out, step = run_script(*rows, stop_strings=["x ra", "og dog"], eos_token_id=RAN + 1)
    assert out.texts == [" dog fox ran", " fox dog ran ran ran ran", " ran fox ran"]
    assert out.finish_reasons == ["stop", "length", "stop"]
    assert out.lengths.tolist() == [3, 6, 3]
    out, step = run_script(*rows, stop_strings="ran")
    assert out.lengths.tolist() == [3, 3, 1] and len(step.inputs) == 3
    assert set(out.finish_reasons) == {"stop"}
    # What follows an end is no part of the text.
    out, _ = run_script([DOG, 1], [DOG], stop_strings="fox", eos_token_id=1, pad_token_id=FOX)
    assert out.finish_reasons == ["eos", "length"]


def test_an_invalid_row_ends_and_disturbs_no_other() -> None:
    def broken(tokens: torch.Tensor) -> torch.Tensor:
        logits = table(tokens)
        if len(seen) == 2:
            logits[1, 3] = torch.nan
        seen.append(tokens)
        return logits

    table, seen = tiny.bigram(0), []  # type: ignore[var-annotated]
    options: dict[str, Any] = {
        "input_ids": torch.full((3, 1), 4),
        "weights": [0.5],
        "divergence": "jsd",
        "sequence_history": True,
        "seed": 0,
        "eos_token_id": [],
        "pad_token_id": 1,
        "max_new_tokens": 5,
    }
    whole = generate(Ensemble([tiny.bigram(0), tiny.bigram(1)]), **options)
    out = generate(Ensemble([broken, tiny.bigram(1)]), **options)
    assert out.valid.tolist() == [True, False, True]
    assert out.finish_reasons == ["length", "invalid", "length"]
    assert torch.equal(out.tokens[[0, 2]], whole.tokens[[0, 2]])
    assert torch.equal(out.logprobs[[0, 2]], whole.logprobs[[0, 2]])
    assert out.tokens[1].tolist() == [*whole.tokens[1, :2].tolist(), 1, 1, 1]
    assert out.lengths.tolist() == [5, 2, 5]
    assert out.logprobs[1].isnan().tolist() == [False, False, True, False, False]


def test_a_callback_gets_the_tokens_of_each_step() -> None:
    calls: list[tuple[int, list[int]]] = []
    out, _ = run_script(
        [4, 1],
        [6],
        eos_token_id=1,
        pad_token_id=9,
        streamer=lambda step, tokens: calls.append((step, tokens.tolist())),
    )
    assert calls == list(enumerate(out.tokens.T.tolist()))


def test_transformers_streamers_work_for_one_row(
    ensemble: Ensemble, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(ensemble.tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = generate(ensemble, PROMPTS[0], weights=WEIGHTS, seed=0, streamer=streamer)
    assert capsys.readouterr().out.split() == out.texts[0].split()
    with pytest.raises(ValueError, match="one row, got 3"):
        generate(ensemble, PROMPTS, weights=WEIGHTS, streamer=streamer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [0.5]}, ValueError, "weights"),
        ({"weights": [[0.5, 0.5]] * 2}, ValueError, "weights"),
        ({"weights": [0.5, float("nan")]}, ValueError, "finite"),
        ({"divergence": "total_variation"}, ValueError, "reverse_kl"),
        ({"normalizer": "none"}, ValueError, "normalizer"),
        ({"logit_scales": [1.0]}, ValueError, "logit_scales"),
        ({"plausibility": 2.0}, ValueError, "plausibility"),
        ({"temperature": [1.0, 1.0]}, ValueError, "temperature"),
        ({"temperature": [1.0, -1.0, 1.0]}, ValueError, "temperature"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"seed": [1, 2]}, ValueError, "seed"),
        ({"backend": "abacus"}, ValueError, "backend"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        (
            {"vocab_size": tiny.V + 1},
            ValueError,
            f"vocab_size must be at most the models' {tiny.V}",
        ),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size must be an int"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an int, got bool"),
        ({"eos_token_id": 2.0}, TypeError, "eos_token_id must be an int, got float"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int"),
        ({"max_new_tokens": 100}, ValueError, "policy 1 has 64 positions"),
        ({"eos_token_id": -1}, ValueError, "eos_token_id"),
        ({"pad_token_id": tiny.V}, ValueError, f"below the models' {tiny.V}"),
        ({"stop_strings": ["a", ""]}, ValueError, "empty string"),
        ({"stop_strings": [3]}, TypeError, "stop_strings"),
        ({"streamer": 3}, TypeError, "streamer"),
        ({"value_weights": [1.0]}, ValueError, "without value_fn"),
        ({"input_ids": torch.ones(1, 1)}, ValueError, "both"),
    ],
)
def test_bad_arguments_are_refused_before_any_model_runs(
    ensemble: Ensemble, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    ran: list[Any] = []
    hooks = [
        model.register_forward_pre_hook(lambda *args: ran.append(args)) for model in ensemble.models
    ]
    with pytest.raises(error, match=message):
        generate(ensemble, PROMPTS, **{"weights": WEIGHTS, **options})
    for hook in hooks:
        hook.remove()
    assert not ran


def test_integers_of_numpy_and_torch_serve_as_pythons_do(ensemble: Ensemble) -> None:
    options: dict[str, Any] = {"weights": WEIGHTS, "top_k": [2**64, 0, np.int64(9)]}
    seeds = [2**64 - 1, 5, 2**63]
    first = generate(ensemble, PROMPTS, seed=seeds, eos_token_id=[], max_new_tokens=6, **options)
    eos = int(first.tokens[0, 2])
    expected = generate(
        ensemble,
        PROMPTS,
        seed=seeds,
        eos_token_id=eos,
        pad_token_id=3,
        max_new_tokens=6,
        **options,
    )
    assert expected.finish_reasons[0] == "eos" and expected.lengths[0] <= 3
    for end in (np.int64(eos), torch.tensor(eos), np.array([eos]), torch.tensor([eos])):
        out = generate(
            ensemble,
            PROMPTS,
            seed=[np.uint64(seed) for seed in seeds],
            eos_token_id=end,
            pad_token_id=np.int64(3),
            max_new_tokens=np.int64(6),
            **options,
        )
        assert torch.equal(out.sequences, expected.sequences)
        assert out.finish_reasons == expected.finish_reasons


def test_other_misuse_is_refused() -> None:
    step = tiny.bigram(0)
    with pytest.raises(TypeError, match="must be a mod_fused.Ensemble, got list"):
        generate([step, step], "fox", weights=[1.0])  # type: ignore[arg-type]
    ids = torch.full((2, 1), 4)
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        generate(Ensemble([step, step]), input_ids=ids, weights=[1.0], stop_strings="fox")
    with pytest.raises(ValueError, match="reverse_kl only"):
        generate(Ensemble([None, step]), input_ids=ids, weights=[1.0], divergence="jsd")
    with pytest.raises(ValueError, match="vocab_size"):
        generate(Ensemble([step, step]), input_ids=ids, weights=[1.0], vocab_size=1000)
