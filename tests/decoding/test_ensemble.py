"""Loading, the tokenizer check, encoding, and the caches: each model as if it ran alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble
from mod_fused.decoding import architectures

BATCH = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 8, 9, 10], [0, 0, 0, 0, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bloom])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_row_has_the_logits_it_has_alone(make: Any, use_cache: bool) -> None:
    model = make(0)
    state = Ensemble([model]).start([BATCH], [MASK], max_new_tokens=3, use_cache=use_cache)
    drawn = torch.tensor([[12, 3], [4, 13], [5, 14]])
    steps = [state.step()[0], state.step(drawn[:, 0])[0], state.step(drawn[:, 1])[0]]
    for row in range(3):
        prompt = BATCH[row][MASK[row] == 1].tolist()
        expected = tiny.teacher_forced(model, prompt, [*drawn[row].tolist(), 0])
        torch.testing.assert_close(
            torch.stack([s[row] for s in steps]), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bloom])
@pytest.mark.parametrize("use_cache", [True, False])
def test_forked_and_selected_rows_go_on_as_if_they_had_been_alone(
    make: Any, use_cache: bool
) -> None:
    model = make(0)
    state = Ensemble([model]).start([BATCH], [MASK], max_new_tokens=3, use_cache=use_cache)
    state.fork(2)
    first = state.step()[0]
    assert torch.equal(first[::2], first[1::2])
    drawn = torch.tensor([12, 3, 4, 13, 5, 14])
    state.step(drawn)
    rows = torch.tensor([5, 5, 0, 3])
    state.select(rows)
    now = state.step(torch.tensor([6, 7, 8, 9]))[0]
    for place, row in enumerate(rows.tolist()):
        prompt = BATCH[row // 2][MASK[row // 2] == 1].tolist()
        response = [int(drawn[row]), 6 + place, 0]
        expected = tiny.teacher_forced(model, prompt, response)
        torch.testing.assert_close(first[row], expected[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(now[place], expected[2], atol=1e-4, rtol=1e-4)


def test_without_padding_no_mask_reaches_the_model() -> None:
    seen: list[dict[str, Any]] = []
    model = tiny.llama(0)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    ensemble = Ensemble([model])
    for mask in (torch.ones_like(MASK), MASK):
        ids, masks = ensemble.encode(input_ids=BATCH, attention_mask=mask)
        ensemble.start(ids, masks).step()
    assert seen[0].get("attention_mask") is None
    assert torch.equal(seen[1]["attention_mask"], MASK)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_head_multiplies_the_last_tokens_alone_and_all_rows_at_once(use_cache: bool) -> None:
    seen: list[torch.Tensor] = []
    model = tiny.llama(0)
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ensemble = Ensemble([model])
    state = ensemble.start(*ensemble.encode(input_ids=BATCH), use_cache=use_cache)
    found = [state.step()[0], state.step(torch.tensor([3, 4, 5]))[0]]
    # Not contiguous: torch would make a product for each row.
    assert [(x.shape[1], x.is_contiguous()) for x in seen] == [(1, True)] * 2
    for row, expected in enumerate(zip(*found, strict=True)):
        whole = tiny.teacher_forced(model, BATCH[row].tolist(), [3 + row, 0])
        torch.testing.assert_close(torch.stack(expected), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["on several devices", "remote code"])
def test_logits_are_kept_by_number_where_places_may_not_do(where: str, monkeypatch: Any) -> None:
    seen: list[Any] = []
    model = tiny.llama(0)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    if where == "on several devices":
        model.hf_device_map = {"model": 0, "lm_head": 1}
    else:
        monkeypatch.setattr(architectures, "_is_known", lambda model: False)
    ensemble = Ensemble([model])
    ensemble.start(*ensemble.encode(input_ids=BATCH)).step()
    assert seen == [1]


def test_layers_that_share_their_cache_keep_logits_by_number() -> None:
    model = tiny.llama(0)
    assert architectures.keeps_places(model)
    model.config.num_kv_shared_layers = 1
    assert not architectures.keeps_places(model)


def test_from_pretrained_loads_folders_and_loads_each_once(tmp_path: Path) -> None:
    for name, model in (("ref", tiny.llama(0)), ("policy", tiny.gpt2(1))):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    ensemble = Ensemble.from_pretrained(
        tmp_path / "ref",
        [str(tmp_path / "policy"), tmp_path / "ref"],
        dtype=torch.bfloat16,
        device="cpu",
        local_files_only=True,
    )
    assert ensemble.num_policies == 2
    assert [type(m).__name__ for m in ensemble.models] == [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
    ]
    assert ensemble.models[0] is ensemble.models[2]
    assert not any(m.training for m in ensemble.models)
    assert ensemble.models[1].dtype == torch.bfloat16
    expected = tiny.gpt2(1).state_dict()["transformer.wte.weight"].bfloat16()
    assert torch.equal(ensemble.models[1].state_dict()["transformer.wte.weight"], expected)
    assert ensemble.tokenizer.get_vocab() == tiny.VOCAB
    without = Ensemble.from_pretrained(None, [tmp_path / "policy"])
    assert without.models[0] is None and without.num_policies == 1
    with pytest.raises(TypeError, match="policies must be a list"):
        Ensemble.from_pretrained(tmp_path / "ref", str(tmp_path / "policy"))


def test_missing_transformers_is_an_import_error_that_says_what_to_install() -> None:
    done = tiny.without_transformers(
        "from mod_fused.decoding.ensemble import Ensemble\n"
        "try:\n    Ensemble.from_pretrained('x', ['y'])\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "pip install 'mod-fused[hf]'" in done.stdout, done.stderr


def test_a_tokenizer_mismatch_names_the_tokens_and_ids_that_differ() -> None:
    swapped = {**tiny.VOCAB, "fox": tiny.VOCAB["dog"], "dog": tiny.VOCAB["fox"]}
    models = [tiny.llama(0)] * 3
    tokenizers = [tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer(swapped)]
    message = (
        f"policy 2's maps 'fox' to {tiny.VOCAB['dog']}, "
        rf"the reference's maps 'fox' to {tiny.VOCAB['fox']} \(2 of {tiny.V} tokens differ\)"
    )
    with pytest.raises(ValueError, match=message):
        Ensemble(models, tokenizers)
    Ensemble(models, tokenizers, check_tokenizers=False)
    Ensemble(models, tokenizers[:2] + [None])

    more = tiny.tokenizer({**tiny.VOCAB, "wolf": tiny.V})
    with pytest.raises(ValueError, match=rf"policy 1's maps 'wolf' to {tiny.V}.*has no 'wolf'"):
        Ensemble(models[:2], [tiny.tokenizer(), more])


def test_the_tokenizer_check_is_about_ids_not_about_padded_embeddings_or_special_roles() -> None:
    other = tiny.tokenizer(eos_token="then", pad_token="<unk>")
    ensemble = Ensemble([tiny.llama(0), tiny.llama(1, tiny.V + 8)], [tiny.tokenizer(), other])
    assert ensemble.vocab_size == tiny.V


def test_the_ends_of_sequence_of_all_models_count() -> None:
    models = [tiny.llama(0, eos=4), tiny.llama(0, eos=None), tiny.bigram(0)]
    models[1].generation_config.eos_token_id = [7, 9]
    assert Ensemble(models).eos_token_ids == [4, 7, 9]
    models[0].generation_config.eos_token_id = None
    assert Ensemble(models, tiny.tokenizer()).eos_token_ids == [tiny.EOS, 7, 9]
    assert Ensemble([tiny.bigram(0)]).eos_token_ids == []


def test_the_padding_id_is_one_that_every_model_can_read() -> None:
    model = tiny.llama(0)
    assert Ensemble([model], tiny.tokenizer(pad_token="it")).pad_token_id == tiny.VOCAB["it"]
    model.generation_config.pad_token_id = None
    assert Ensemble([model], tiny.tokenizer()).pad_token_id == tiny.EOS
    added = tiny.tokenizer({**tiny.VOCAB, "<pad>": tiny.V}, pad_token="<pad>")
    assert Ensemble([model], added).pad_token_id == tiny.EOS  # the model has no row for <pad>
    assert Ensemble([tiny.bigram(0)]).pad_token_id == 0


def test_prompts_are_padded_on_the_left_without_a_padding_token() -> None:
    models = [tiny.llama(0), tiny.llama(1)]
    ensemble = Ensemble(models, tiny.tokenizer())
    fox, dog, ran = (tiny.VOCAB[w] for w in ("fox", "dog", "ran"))
    ids, masks = ensemble.encode(["fox ran", "dog"], pad_token_id=5)
    for i, m in zip(ids, masks, strict=True):
        assert i.tolist() == [[fox, ran], [5, dog]]
        assert m.tolist() == [[1, 1], [0, 1]]
    ids, masks = ensemble.encode([["fox", "dog"], ["ran ran", "fox"]], pad_token_id=5)
    assert [i.tolist() for i in ids] == [[[fox], [dog]], [[ran, ran], [5, fox]]]
    assert masks[0] is None and masks[1].tolist() == [[1, 1], [0, 1]]
    assert [i.tolist() for i in ensemble.encode("fox ran")[0]] == [[[fox, ran]]] * 2
    without_reference = Ensemble([None, *models], tiny.tokenizer())
    assert len(without_reference.encode([["fox"], ["dog"]])[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither"),
        ({"prompts": "fox", "input_ids": BATCH}, "both"),
        ({"prompts": "fox", "attention_mask": MASK}, "attention_mask goes with input_ids"),
        ({"prompts": []}, "same number of prompts, at least one"),
        ({"prompts": ["fox", ""]}, r"prompt 1 \(''\) has no tokens for the reference"),
        ({"prompts": [["fox"]]}, "expected 2 lists of prompts.*got 1"),
        ({"prompts": [["fox"], ["dog", "cat"]]}, "1 for the reference, 2 for policy 1"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "empty"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, "at least one"),
        ({"input_ids": BATCH.float()}, "integer tensor"),
        ({"input_ids": BATCH[0]}, r"\[B, n\]"),
        ({"input_ids": [BATCH]}, "expected 2 tensors of input_ids.*got 1"),
        ({"input_ids": BATCH, "attention_mask": MASK[:2]}, "shape of its input_ids"),
        ({"input_ids": BATCH, "attention_mask": MASK * 2}, "0 and 1 only"),
        ({"input_ids": BATCH, "attention_mask": MASK.flip(1)}, "padding on the left"),
        ({"input_ids": BATCH, "attention_mask": MASK * 0}, "padding on the left"),
    ],
)
def test_bad_prompts_are_value_errors(arguments: dict[str, Any], message: str) -> None:
    ensemble = Ensemble([tiny.bigram(0)] * 2, tiny.tokenizer())
    with pytest.raises(ValueError, match=message):
        ensemble.encode(**arguments)


@pytest.mark.parametrize("arguments", [{"prompts": 3}, {"prompts": ["a", ["b"]]}, {"input_ids": 3}])
def test_prompts_of_another_type_are_type_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Ensemble([tiny.bigram(0)] * 2, tiny.tokenizer()).encode(**arguments)


def test_prompts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="the reference has no tokenizer"):
        Ensemble([tiny.bigram(0)]).encode("fox")


def test_what_is_not_a_model_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1)
    with pytest.raises(TypeError, match="policy 1 is an encoder-decoder"):
        Ensemble([tiny.bigram(0), T5ForConditionalGeneration(config)])
    with pytest.raises(TypeError, match="policy 1 must be.*got NoneType"):
        Ensemble([tiny.bigram(0), None])
    with pytest.raises(TypeError, match="from_pretrained"):
        Ensemble("some/name")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a reference or a policy"):
        Ensemble([None])
    with pytest.raises(ValueError, match="expected 2 tokenizers.*got 1"):
        Ensemble([tiny.bigram(0)] * 2, [tiny.tokenizer()])


def test_what_would_go_wrong_inside_a_model_is_refused_before() -> None:
    model = tiny.gpt2(0)
    ensemble = Ensemble([tiny.bigram(0), model])
    with pytest.raises(ValueError, match="policy 1 has 64 positions.*need 65"):
        ensemble.start([BATCH] * 2, [MASK] * 2, max_new_tokens=61)
    ensemble.start([BATCH] * 2, [MASK] * 2, max_new_tokens=60)
    for bad in (tiny.V, -1):
        with pytest.raises(ValueError, match=f"vocabulary of {tiny.V} ids.*id {bad}"):
            ensemble.start([BATCH, BATCH.clone().fill_(bad)], [MASK] * 2)
    model.train()
    with pytest.raises(ValueError, match="policy 1 is in training mode"):
        ensemble.start([BATCH] * 2, [MASK] * 2)


@pytest.mark.parametrize("bad", [torch.zeros(1, 4), torch.zeros(3, 1, 4), "logits"])
def test_a_callable_that_returns_no_logits_is_named(bad: Any) -> None:
    ensemble = Ensemble([tiny.bigram(0), lambda tokens: bad])
    with pytest.raises(ValueError, match=r"policy 1 must return logits \[B=3, V\]"):
        ensemble.start([BATCH] * 2, [None] * 2).step()
