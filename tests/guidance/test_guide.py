"""`Guidance` in the decoder: scorers with their caches, candidates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from cases import normal

from mod_fused import Ensemble, generate, reference
from mod_fused.guidance import Guidance, Scorer

PROMPTS = tiny.PROMPTS


def ids_of(prompt: str) -> list[int]:
    return [tiny.VOCAB[word] for word in prompt.split()]


def recorded(guide: Guidance, prompts: list[str], **options: Any) -> tuple[Any, list[Any]]:
    """What `generate` returned, and the (values, ids) of every step."""
    steps: list[Any] = []

    class Recorder:
        num_values = guide.num_values

        def start(self, *args: Any, **kwargs: Any) -> Any:
            state = guide.start(*args, **kwargs)

            class State:
                def step(self, *inputs: Any) -> Any:
                    steps.append(state.step(*inputs))
                    return steps[-1]

            return State()

    models = Ensemble([tiny.llama(0)], tiny.tokenizer())
    out = generate(models, prompts, weights=[], value_fn=Recorder(), **options)
    return out, steps


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [tiny.llama_value, tiny.gpt2_value])
def test_candidates_in_one_pass_score_as_separate_sequences_without_a_cache(
    kind: Any, implementation: str
) -> None:
    model = kind(3, attn_implementation=implementation)
    first = tiny.teacher_forced(tiny.llama(0), ids_of(PROMPTS[1]), [0])[0]
    eos = int(first.argmax())  # greedy: the second row ends at once, the others go on
    for use_cache in (True, False):
        guide = Guidance([model], candidates=5)
        out, steps = recorded(
            guide,
            PROMPTS,
            value_weights=[0.0],
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            max_new_tokens=6,
            use_cache=use_cache,
        )
        assert out.lengths[1] == 1 and out.lengths.max() > 3
        assert len(steps) == out.tokens.shape[1]
        for row, prompt in enumerate(PROMPTS):
            # What was fed: behind its end a row goes on with padding.
            fed = out.tokens[row].tolist()
            for step, (values, ids) in enumerate(steps):
                assert values.shape == (1, 3, 5) and len(set(ids[row].tolist())) == 5
                for value, candidate in zip(values[0, row], ids[row].tolist(), strict=True):
                    sequence = torch.tensor([[*ids_of(prompt), *fed[:step], candidate]])
                    with torch.no_grad():
                        alone = model(input_ids=sequence, use_cache=False).logits[0, -1, 0]
                    assert abs(value - alone) < 2e-4


def test_scalar_values_differ_between_candidates_steps_and_rows() -> None:
    _, steps = recorded(Guidance([tiny.llama_value(3)], candidates=4), PROMPTS, max_new_tokens=4)
    stacked = torch.stack([values[0] for values, _ in steps])
    assert stacked.unique().numel() == stacked.numel()


@pytest.mark.parametrize("candidates", [None, 6])
def test_a_dense_scorer_is_read_with_its_cache(candidates: int | None) -> None:
    scorer = tiny.gpt2(5, tiny.V + 3)  # a padded vocabulary is cut
    out, steps = recorded(
        Guidance([scorer], candidates=candidates), PROMPTS, value_weights=[1.5], max_new_tokens=6,
        seed=1, eos_token_id=[],
    )  # fmt: skip
    model = tiny.llama(0)
    for row, prompt in enumerate(PROMPTS):
        response = out.tokens[row].tolist()
        expected = tiny.teacher_forced(scorer, ids_of(prompt), response)[:, : tiny.V]
        ref = tiny.teacher_forced(model, ids_of(prompt), response).double()
        for step in range(6):
            scores = steps[step] if candidates is None else steps[step][0]
            at = expected[step]
            tilted = ref[step] + 1.5 * at.double()
            if candidates is not None:
                ids = steps[step][1][row]
                assert set(ids.tolist()) == set(ref[step].topk(6).indices.tolist())
                at, excluded = at[ids], torch.ones(tiny.V, dtype=torch.bool)
                excluded[ids] = False
                tilted[excluded] = -torch.inf
            torch.testing.assert_close(scores[0, row], at, atol=2e-4, rtol=0)
            want = tilted.log_softmax(-1)[response[step]]
            assert abs(out.logprobs[row, step] - want) < 1e-3


def test_several_scorers_of_both_kinds_and_policies_mix_in_one_call() -> None:
    models = [tiny.llama(0, eos=None), tiny.gpt2(1, eos=None)]
    dense, flat = tiny.llama(7), tiny.gpt2_value(8)
    guide = Guidance([dense, Scorer(flat, torch.nn.functional.logsigmoid)], candidates=7)
    assert guide.num_values == 2
    strengths = [[0.5, 1.0], [0.0, 2.0], [-1.0, 0.5]]
    for divergence in ("reverse_kl", "jsd"):
        out = generate(
            Ensemble(models, tiny.tokenizer(eos_token=None)),
            PROMPTS,
            weights=[0.6],
            divergence=divergence,
            value_fn=guide,
            value_weights=strengths,
            max_new_tokens=5,
            seed=2,
        )
        assert out.valid.all()
        for row, prompt in enumerate(PROMPTS):
            response = out.tokens[row].tolist()
            logits = [tiny.teacher_forced(m, ids_of(prompt), response) for m in (*models, dense)]
            for step in range(5):
                ids = logits[0][step].topk(7).indices
                branches = [[*ids_of(prompt), *response[:step], z] for z in ids.tolist()]
                with torch.no_grad():
                    raw = flat(input_ids=torch.tensor(branches), use_cache=False).logits[:, -1, 0]
                values = torch.stack([logits[2][step][ids], -(1 + (-raw.double()).exp()).log()])
                expected = reference.log_probs_row(
                    logits[0][step],
                    [logits[1][step]],
                    [0.6],
                    divergence=divergence,
                    values=values,
                    value_ids=ids,
                    value_weights=strengths[row],
                )
                assert abs(out.logprobs[row, step] - expected[response[step]]) < 2e-3


def test_strength_zero_is_the_reference_and_a_negative_one_pushes_away() -> None:
    scorer = tiny.gpt2(5)
    runs = {}
    for strength in (-2.0, 0.0, 2.0):
        runs[strength] = generate(
            Ensemble([tiny.llama(0)], tiny.tokenizer()),
            PROMPTS,
            weights=[],
            value_fn=Guidance([scorer]),
            value_weights=[strength],
            max_new_tokens=1,
            seed=3,
            return_model_logprobs=True,
        )
    by_itself = Ensemble([None, tiny.llama(0)], tiny.tokenizer())
    alone = generate(by_itself, PROMPTS, weights=[1.0], max_new_tokens=1, seed=3)
    assert torch.equal(runs[0.0].tokens, alone.tokens)
    torch.testing.assert_close(runs[0.0].logprobs, runs[0.0].model_logprobs[..., 0])
    # log pi* - log pi_ref = strength V - const, so the tilts of two strengths are opposite.
    for row, prompt in enumerate(PROMPTS):
        values = tiny.teacher_forced(scorer, ids_of(prompt), [0])[0].double()
        ref = tiny.teacher_forced(tiny.llama(0), ids_of(prompt), [0])[0].double().log_softmax(-1)
        for strength in (-2.0, 2.0):
            out = runs[strength]
            const = torch.logsumexp(ref + strength * values, 0)
            token = int(out.tokens[row, 0])
            gain = out.logprobs[row, 0] - out.model_logprobs[row, 0, 0]
            assert abs(gain - (strength * values[token] - const)) < 1e-3


def test_nan_values_end_their_row_and_disturb_no_other() -> None:
    table = normal(0, tiny.V, tiny.V)

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        values = table[tokens[:, -1]].clone()
        if len(seen) == 1:
            values[1, 4] = torch.nan
        seen.append(tokens)
        return values

    seen: list[torch.Tensor] = []
    options: dict[str, Any] = {
        "input_ids": torch.full((3, 1), 4), "weights": [], "seed": 0, "max_new_tokens": 4,
        "eos_token_id": [],
    }  # fmt: skip
    models = Ensemble([tiny.bigram(0)])
    whole = generate(models, value_fn=Guidance([lambda tokens: table[tokens[:, -1]]]), **options)
    out = generate(models, value_fn=Guidance([broken]), **options)
    assert out.valid.tolist() == [True, False, True]
    assert out.finish_reasons == ["length", "invalid", "length"] and out.lengths[1] == 1
    assert torch.equal(out.tokens[[0, 2]], whole.tokens[[0, 2]])


def test_a_mask_that_leaves_no_candidate_ends_the_row() -> None:
    models = Ensemble([lambda tokens: torch.arange(8.0).expand(len(tokens), 8)])
    guide = Guidance([lambda tokens: torch.zeros(len(tokens), 8)], candidates=2)
    allowed = torch.zeros(2, 8, dtype=torch.bool)
    allowed[0, 6] = allowed[1, 5] = True  # candidates are 6 and 7
    out = generate(
        models, input_ids=torch.zeros(2, 1, dtype=torch.int64), weights=[], value_fn=guide,
        mask_fn=lambda step, sequences: allowed, max_new_tokens=2,
    )  # fmt: skip
    assert out.tokens[0].tolist() == [6, 6] and out.valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: Guidance([tiny.llama(7)], candidates=0), {}, ValueError,
         "candidates must be at least 1, got 0"),
        (lambda: Guidance([tiny.llama(7)], candidates=2.0), {}, TypeError,
         "candidates must be an int, got float"),
        (lambda: Guidance([tiny.llama(7)], candidates=True), {}, TypeError, "an int, got bool"),
        (lambda: Guidance([]), {}, ValueError, "at least one model, got none"),
        (lambda: Guidance([3]), {}, TypeError, "language model or a callable .* got int"),
        (lambda: Guidance(tiny.llama(7)), {}, TypeError, "scorers must be a list"),
        (lambda: Guidance([tiny.llama_value(0)]), {}, ValueError, "candidates=K"),
        (lambda: Guidance([tiny.llama_value(0, num_labels=2)], candidates=3), {}, TypeError,
         "2 labels"),
        (lambda: Guidance([tiny.bert_value(0)], candidates=3), {}, ValueError,
         "scorer 0 must take position_ids and a cache"),
        (lambda: Guidance([tiny.llama(7)]), {"value_weights": [1.0, 2.0]}, ValueError,
         "value_weights"),
        (lambda: Guidance([tiny.llama(7)]), {"value_weights": [float("nan")]}, ValueError,
         "finite"),
        (lambda: Guidance([tiny.llama(7).train()]), {}, ValueError, "scorer 0 is in training mode"),
        (lambda: Guidance([tiny.llama(7).to("meta")]), {}, ValueError,
         "scorer 0 is on the meta device"),
        (lambda: Guidance([tiny.gpt2(7)]), {"max_new_tokens": 64}, ValueError,
         "scorer 0 has 64 positions"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_model_runs(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a model ran")

    models = Ensemble([never], tiny.tokenizer())
    with pytest.raises(error, match=message):
        generate(models, PROMPTS, weights=[], value_fn=make(), **options)


def test_one_position_more_is_read_by_a_scalar_scorer_than_by_a_dense_one() -> None:
    n = max(len(ids_of(p)) for p in PROMPTS)
    options: dict[str, Any] = {"weights": [], "max_new_tokens": 64 - n + 1, "seed": 0}
    models = Ensemble([tiny.bigram(0)], tiny.tokenizer())
    out = generate(models, PROMPTS, value_fn=Guidance([tiny.gpt2(7)]), **options)
    assert out.valid.all()
    guide = Guidance([tiny.gpt2_value(0)], candidates=2)
    with pytest.raises(ValueError, match="scorer 0 has 64 positions"):
        generate(models, PROMPTS, value_fn=guide, **options)
    options["max_new_tokens"] -= 1
    assert generate(models, PROMPTS, value_fn=guide, **options).valid.all()


def test_other_misuse_is_refused() -> None:
    ids = torch.full((2, 1), 4)
    models = Ensemble([tiny.bigram(0)])
    with pytest.raises(TypeError, match="value_fn must be a function .* got int"):
        generate(models, input_ids=ids, weights=[], value_fn=3)  # type: ignore[arg-type]
    guide = Guidance([tiny.bigram(1)], candidates=3)
    with pytest.raises(ValueError, match="the reference's most likely tokens"):
        generate(Ensemble([None, tiny.bigram(0)]), input_ids=ids, weights=[1.0], value_fn=guide)
    for candidates in (None, 3):
        narrow = Guidance([tiny.bigram(1, tiny.V - 2)], candidates=candidates)
        with pytest.raises(ValueError, match="scorer 0 knows 20 tokens.* 22: pass vocab_size"):
            generate(models, input_ids=ids % 3, weights=[], value_fn=narrow)
    out = generate(
        models, input_ids=ids, weights=[], value_fn=narrow, vocab_size=tiny.V - 2, seed=0
    )
    assert out.valid.all() and int(out.tokens.max()) < tiny.V - 2


def test_callables_need_no_transformers() -> None:
    done = tiny.without_transformers(
        "import torch, mod_fused\n"
        "step = lambda tokens: torch.zeros(len(tokens), 5)\n"
        "value = lambda tokens: torch.eye(5)[(tokens[:, -1] + 1) % 5]\n"
        "guide = mod_fused.guidance.Guidance([value], candidates=5)\n"
        "out = mod_fused.generate(mod_fused.Ensemble([step]), weights=[], value_fn=guide,\n"
        "    value_weights=[1000.0], input_ids=torch.tensor([[0], [2]]), max_new_tokens=4)\n"
        "print(out.tokens.tolist())\n"
    )
    assert done.stdout.strip() == "[[1, 2, 3, 4], [3, 4, 0, 1]]", done.stderr
