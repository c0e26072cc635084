"""Prompts of `generate`: conversations by each model's chat template, strings with one BOS."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import tiny_tokenizers
import torch

from mod_fused import Ensemble, generate
from mod_fused.guidance import best_of_n, response_score

CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
OTHER = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system messages here') }}{% endif %}"
    "({{ m['role'] }}){% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
HI = [{"role": "user", "content": "hi there"}]
LONG = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
]


def tokenizers() -> list[Any]:
    """Of a reference and a policy: one vocabulary, two templates."""
    made = [tiny_tokenizers.framed("<s> $A") for _ in range(2)]
    made[0].chat_template, made[1].chat_template = CHATML, OTHER
    return made


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    made = tokenizers()
    return Ensemble([tiny.bigram(i, len(made[0])) for i in range(2)], made)


def rows(ensemble: Ensemble, *args: Any, **kwargs: Any) -> list[list[list[int]]]:
    """What `encode` gives for each model, without the padding."""
    ids, masks = ensemble.encode(*args, **kwargs)
    known = [torch.ones_like(i) if m is None else m for i, m in zip(ids, masks, strict=True)]
    return [
        [row[mask.bool()].tolist() for row, mask in zip(i, m, strict=True)]
        for i, m in zip(ids, known, strict=True)
    ]


def rendered(tokenizer: Any, conversation: Any, **options: Any) -> list[int]:
    options = options or {"add_generation_prompt": True}
    return tokenizer.apply_chat_template(conversation, return_dict=True, **options)["input_ids"]


def test_each_model_renders_a_conversation_with_its_own_template(ensemble: Ensemble) -> None:
    expected = [[rendered(t, c) for c in (HI, LONG)] for t in ensemble.tokenizers]
    assert expected[0] != expected[1]
    assert rows(ensemble, [HI, LONG]) == expected
    assert rows(ensemble, HI) == [e[:1] for e in expected]
    assert rows(ensemble, tuple(HI)) == [e[:1] for e in expected]
    mixed = rows(ensemble, [HI, "hi there"])
    assert [m[0] for m in mixed] == [e[0] for e in expected]
    assert mixed[0][1] == ensemble.tokenizer("hi there")["input_ids"]
    each = rows(ensemble, [[HI, "three"], [LONG, HI]])
    assert each[0] == [expected[0][0], ensemble.tokenizer("three")["input_ids"]]
    assert each[1] == [expected[1][1], expected[1][0]]
    assert rows(ensemble, [[HI], ["<s>"]]) == [expected[0][:1], [[1]]]


def test_generate_reads_conversations(ensemble: Ensemble) -> None:
    options: dict[str, Any] = {"weights": [0.5], "seed": 1, "max_new_tokens": 5}
    out = generate(ensemble, [LONG, HI], **options)
    ids, masks = ensemble.encode([LONG, HI])
    known = [torch.ones_like(i) if m is None else m for i, m in zip(ids, masks, strict=True)]
    same = generate(ensemble, input_ids=ids, attention_mask=known, **options)
    assert torch.equal(out.sequences, same.sequences)
    assert torch.equal(out.attention_mask, same.attention_mask)
    assert out.attention_mask.sum(1).tolist() == [len(r) + 5 for r in rows(ensemble, [LONG, HI])[0]]


def test_an_assistants_last_message_is_gone_on_with_as_transformers_pipelines_do(
    ensemble: Ensemble,
) -> None:
    begun = [*HI, {"role": "assistant", "content": "Well, I"}]
    got = rows(ensemble, begun)
    for tokenizer, (row,) in zip(ensemble.tokenizers, got, strict=True):
        assert row == rendered(tokenizer, begun, continue_final_message=True)
        assert tokenizer.decode(row).endswith("Well, I")


def test_parts_are_rendered_where_the_template_takes_them() -> None:
    takes, takes_not = tokenizers()[1], tokenizers()[0]
    step = tiny.bigram(0, len(takes))
    (row,) = rows(Ensemble([step], takes), PARTS)[0]
    assert row == rendered(takes, PARTS) and takes.decode(row) == "(user)ab(assistant)"
    message = "the reference's chat template takes content as a string, got a list of parts"
    with pytest.raises(ValueError, match=message):
        Ensemble([step], takes_not).encode(PARTS)
    with pytest.raises(ValueError, match=message):
        Ensemble([step], takes_not).encode([*HI, {**PARTS[0], "role": "assistant"}])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        (
            [{"role": "system", "content": "x"}],
            {},
            ValueError,
            "policy 1's tokenizer cannot render",
        ),
        ([{"role": "system", "content": "x"}], {}, ValueError, "no system messages here"),
        (
            [{"role": "assistant", "content": None}],
            {},
            ValueError,
            "the reference's tokenizer cannot",
        ),
        ([{"content": "x"}], {}, ValueError, "message 0 has no role"),
        ([*HI, "x"], {}, TypeError, "message 1 must be a dict, got str"),
        ([*HI, {"role": "user", "content": 3}], {}, TypeError, "content of message 1 must be"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            {},
            ValueError,
            "message 0 has a part of type 'image'",
        ),
        ([{"role": "user", "content": ["x"]}], {}, ValueError, "part of type 'str'"),
        (HI, {"add_special_tokens": True}, ValueError, "a chat template writes its own special"),
        ("hi", {"add_special_tokens": 1}, TypeError, "add_special_tokens must be None or a bool"),
        ([HI, []], {}, TypeError, "a mixture"),
        ([HI, ["hi"]], {}, TypeError, "a mixture"),
        ([[HI]], {}, ValueError, "expected 2 lists of prompts.*got 1"),
        ([[HI, HI], [HI]], {}, ValueError, "2 for the reference, 1 for policy 1"),
        (HI[0], {}, TypeError, "prompts must be a string, a conversation or a list, got dict"),
    ],
)
def test_what_cannot_be_rendered_is_refused_before_any_model_runs(
    prompts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    ran: list[Any] = []
    models = Ensemble([lambda tokens: ran.append(tokens)] * 2, tokenizers())
    with pytest.raises(error, match=message):
        generate(models, prompts, weights=[1.0], **options)
    assert not ran


def test_a_conversation_needs_a_tokenizer_with_a_template() -> None:
    step = tiny.bigram(0)
    with pytest.raises(
        ValueError, match="policy 1's tokenizer cannot render.*chat_template is not set"
    ):
        Ensemble([None, step], tiny.tokenizer()).encode(HI)
    with pytest.raises(ValueError, match="the reference has no tokenizer"):
        Ensemble([step]).encode(HI)
    with pytest.raises(ValueError, match="add_special_tokens goes with prompts"):
        Ensemble([step]).encode(input_ids=torch.ones(1, 2).long(), add_special_tokens=False)


BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("form", "text", "before", "behind"),
    [
        ("<s> $A", "hi", [BOS], []),
        ("<s> $A", "<s>hi", [], []),
        ("<s> $A", "hi<s>", [BOS], []),
        ("$A </s>", "hi", [], []),
        ("<s> $A </s>", "hi", [BOS], []),
        ("<s> $A </s>", "<s>hi</s>", [], []),
        ("</s> $A", "hi", [EOS], []),  # BOS by another name, as XGLM has it
        ("</s> $A", "</s>hi", [], []),
        ("</s> $A", "<s>hi", [], []),
        ("$A", "hi", [], []),
    ],
)
def test_a_string_gets_what_stands_in_front_of_a_text_once_and_no_end(
    form: str, text: str, before: list[int], behind: list[int]
) -> None:
    tokenizer = tiny_tokenizers.framed(form)
    models = Ensemble([tiny.bigram(0, len(tokenizer))], tokenizer)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rows(models, text) == [[before + bare + behind]]
    assert rows(models, text, add_special_tokens=False) == [[bare]]
    assert rows(models, text, add_special_tokens=True) == [[tokenizer(text)["input_ids"]]]


def test_a_rendered_conversation_is_the_conversation(ensemble: Ensemble) -> None:
    text = ensemble.tokenizer.apply_chat_template(LONG, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>")
    assert rows(ensemble, text)[0] == rows(ensemble, LONG)[0]
    twice = rows(ensemble, text, add_special_tokens=True)[0][0]
    assert twice[:2] == [BOS, BOS] and rows(ensemble, "")[0] == [[BOS]]


def test_scores_of_responses_begin_behind_the_prompt(ensemble: Ensemble) -> None:
    # "<s>" and the tokenizer's own BOS are one token: the responses begin behind that.
    prompts = ["<s>hi", "there"]
    seen: list[tuple[str, str]] = []

    def reward(prompt: str, text: str) -> float:
        seen.append((prompt, text))
        return float(text.count("a"))

    score = response_score(reward, ensemble.tokenizer, prompts)
    out = best_of_n(
        ensemble,
        prompts,
        score_fn=score,
        n=3,
        weights=[0.5],
        seed=4,
        max_new_tokens=6,
        use_cache=False,
    )
    assert all((p, t) in seen for p, t in zip(prompts, out.texts or (), strict=True))
    chats = best_of_n(
        ensemble, HI, score_fn=lambda s, m: s[:, -1].float(), n=2, weights=[0.5], seed=1,
        max_new_tokens=3, use_cache=False,
    )  # fmt: skip
    assert chats.sequences[0, :-3].tolist() == rows(ensemble, HI)[0][0]
