"""LoRA adapters that share one base: the logits and tokens of separate PEFT models."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import lora_policies
import pytest
import tiny_models as tiny
import torch
from lora_policies import IDS, KINDS, MASK, filled, logits, lora, peft, separate, several, shared
from small_models import small_model
from transformers import AutoModelForCausalLM, CompileConfig

from mod_fused import Ensemble, custom_generate, generate, loglikelihood
from mod_fused.decoding import stacked_layers

folders = lora_policies.folders


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", range(1, 9))
def test_logits_are_those_of_separate_models(folders: Path, count: int, masked: bool) -> None:
    kinds = list(KINDS)[-count:]
    ours, theirs = shared(folders, kinds), separate(folders, kinds)
    for running in {tuple(range(count + 1)), tuple(range(1, count + 1)), (0, count), (1, count)}:
        if len(set(running)) < len(running):
            continue
        expected = logits(theirs, list(running), masked, copies=2)
        got = logits(ours, list(running), masked, copies=2)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
        if 0 in running:  # the adapters matter, each in its own way
            assert all((x - expected[:, 0]).abs().max() > 0.1 for x in expected[:, 1:].unbind(1))


def test_models_by_themselves_are_the_separate_ones(folders: Path) -> None:
    kinds = list(KINDS)
    ours, theirs = shared(folders, kinds, forward="separate"), separate(folders, kinds)
    with torch.no_grad():
        for mine, other in zip(ours.models, theirs.models, strict=True):
            expected = other(input_ids=IDS, attention_mask=MASK).logits
            got = mine(input_ids=IDS, attention_mask=MASK).logits
            torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
    every = list(range(9))
    torch.testing.assert_close(logits(ours, every), logits(theirs, every), atol=5e-5, rtol=0)


CALLS: dict[str, dict[str, Any]] = {
    "simplex": {"weights": [0.5, 0.2, 0.3]},
    "off the simplex": {"weights": [1.5, -0.6, 0.4]},
    "by row": {"weights": [[1.0, 0.0, 0.0], [0.3, 0.3, 0.4], [0.0, 0.0, 2.0]]},
    "jsd": {"weights": [0.4, 0.4, 0.2], "divergence": "jsd", "sequence_history": True},
    "forward_kl": {"weights": [0.4, 0.0, 0.6], "divergence": "forward_kl"},
    "beams": {"weights": [0.5, 0.2, 0.3], "num_beams": 3, "num_return_sequences": 2, "seed": None},
    "candidates": {"weights": [0.5, 0.5, 0.0], "num_candidates": 4, "resample_below": 0.5},
    "recomputed": {"weights": [0.5, 0.2, 0.3], "use_cache": False, "num_return_sequences": 2},
    "resampled": {
        "weights": [0.5, 0.2, 0.3],
        "resample_fn": lambda step, *_: torch.tensor([2, 0, 0]) if step == 3 else None,
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_tokens_are_those_of_separate_models(folders: Path, call: str) -> None:
    kinds = ["plain", "rslora", "saved"]
    options = {"max_new_tokens": 12, "seed": 5, "return_model_logprobs": call == "by row"}
    options |= CALLS[call]
    ours = generate(shared(folders, kinds), tiny.PROMPTS, **options)
    theirs = generate(separate(folders, kinds), tiny.PROMPTS, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)
    assert ours.texts == theirs.texts


@pytest.mark.parametrize("count", range(1, 9))
def test_tokens_of_any_number_of_policies(folders: Path, count: int) -> None:
    kinds = list(KINDS)[:count]
    options: dict[str, Any] = {"weights": [0.9 / count] * count, "max_new_tokens": 12, "seed": 8}
    ours, theirs = (
        generate(make(folders, kinds), tiny.PROMPTS, num_return_sequences=4, **options)
        for make in (shared, separate)
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len({tuple(row) for row in ours.tokens.tolist()}) > 4


def test_prompts_of_different_lengths_by_model(folders: Path) -> None:
    prompts = [tiny.PROMPTS, ["the cat"] * 3, ["a bird ran over it", "it", "the dog"]]
    options: dict[str, Any] = {"weights": [0.9, 0.6], "max_new_tokens": 10, "seed": 2}
    kinds = ["patterns", "dora"]
    ours = generate(shared(folders, kinds), prompts, **options)
    assert torch.equal(ours.tokens, generate(separate(folders, kinds), prompts, **options).tokens)


def test_likelihoods_are_those_of_separate_models(folders: Path) -> None:
    kinds, responses = ["plain", "biases"], ["red fox ran", "it", "dog slept near the cat"]
    options: dict[str, Any] = {"weights": [0.7, 0.7], "return_model_logprobs": True}
    ours = loglikelihood(shared(folders, kinds), tiny.PROMPTS, responses, **options)
    theirs = loglikelihood(separate(folders, kinds), tiny.PROMPTS, responses, **options)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=5e-5, rtol=0)
    torch.testing.assert_close(ours.model_logprobs, theirs.model_logprobs, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("forward", "calls"), [("stacked", 1), ("separate", 2)])
def test_how_often_a_step_runs_the_base(folders: Path, forward: str, calls: int) -> None:
    ensemble = shared(folders, ["plain", "rslora"], forward=forward)
    seen: list[int] = []
    norm = ensemble.models[0].model.layers[0].input_layernorm  # no adapter: all share it
    norm.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    generate(ensemble, input_ids=IDS, weights=[0.5, 0.5], max_new_tokens=4, pad_token_id=0)
    assert seen == [6 // calls] * (4 * calls)  # the reference's coefficient is 0


def test_responses_to_a_prompt_share_its_reading(folders: Path) -> None:
    ensemble = shared(folders, ["plain", "rslora"])
    seen: list[list[int]] = []
    norm = ensemble.models[0].model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda _, args: seen.append(list(args[0].shape[:2])))
    options: dict[str, Any] = {"weights": [0.5, 0.5], "max_new_tokens": 3, "pad_token_id": 0}
    generate(ensemble, input_ids=IDS, num_return_sequences=4, **options)
    assert seen == [[6, 5], [24, 1], [24, 1]]


def test_inside_transformers_own_generate(folders: Path) -> None:
    ensemble = shared(folders, ["plain", "rslora"])
    options: dict[str, Any] = {"weights": [0.5, 0.8], "seed": 4, "max_new_tokens": 8}
    expected = generate(ensemble, input_ids=IDS, eos_token_id=[], pad_token_id=0, **options)
    reference = ensemble.models[0]
    inside: dict[str, Any] = {"custom_generate": custom_generate, "do_sample": True, "top_k": 0}
    inside |= {"pad_token_id": 0, "attention_mask": torch.ones_like(IDS), **options}
    assert torch.equal(reference.generate(IDS, policies=ensemble, **inside), expected.sequences)
    with pytest.raises(ValueError, match="must be the model whose generate is called"):
        ensemble.models[1].generate(IDS, policies=ensemble, **inside)
    with pytest.raises(ValueError, match="an ensemble has its own"):
        reference.generate(IDS, policies=ensemble, tokenizers=tiny.tokenizer(), **inside)


def test_two_batches_in_progress_and_a_model_by_itself_do_not_disturb_each_other(
    folders: Path,
) -> None:
    ours, theirs = (make(folders, ["plain", "rslora", "biases"]) for make in (shared, separate))
    runs = ([0, 1, 2, 3], [1, 3])
    states = [
        [e.start([IDS] * len(r), [None] * len(r), models=r) for r in runs] for e in (ours, theirs)
    ]
    for tokens in (None, IDS[:, 0], IDS[:, 1]):
        for mine, other in zip(*states, strict=True):
            got, expected = mine.step(tokens), other.step(tokens)
            for x, y in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
                torch.testing.assert_close(x, y, atol=5e-5, rtol=0)
            with torch.no_grad():
                ours.models[2](input_ids=IDS)


def test_two_threads_may_decode_with_one_ensemble(folders: Path) -> None:
    ensemble = shared(folders, ["plain", "rslora"])
    calls: list[dict[str, Any]] = [  # 6 rows each, of other models
        {"input_ids": IDS[:2], "weights": [0.3, 0.3]},
        {"input_ids": IDS, "weights": [0.6, 0.4]},
    ]
    options: dict[str, Any] = {"max_new_tokens": 3, "seed": 1, "pad_token_id": 0}
    expected = [generate(ensemble, **call, **options) for call in calls]
    found: list[Any] = []

    def meanwhile(*_: Any) -> None:
        hook.remove()  # once
        thread = threading.Thread(
            target=lambda: found.append(generate(ensemble, **calls[1], **options))
        )
        thread.start()
        thread.join()

    norm = ensemble.models[0].model.layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(meanwhile)
    found.insert(0, generate(ensemble, **calls[0], **options))
    for out, right in zip(found, expected, strict=True):
        torch.testing.assert_close(out.logprobs, right.logprobs, atol=5e-5, rtol=0)


def test_autocast_does_what_it_does_to_separate_models(folders: Path) -> None:
    kinds = ["plain", "embeddings", "dora"]
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(shared(folders, kinds), [0, 1, 2, 3])
        expected = logits(separate(folders, kinds), [0, 1, 2, 3])
    exact = logits(separate(folders, kinds), [0, 1, 2, 3])
    assert (found - exact).abs().mean() < 1.1 * (expected - exact).abs().mean()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_ensemble_is_one(folders: Path, copied: Any) -> None:
    ensemble = shared(folders, ["plain", "dora"])
    expected = logits(ensemble, [0, 1, 2])
    assert torch.equal(logits(copied(ensemble), [0, 1, 2]), expected)


# ---- what is shared, and what stays as it is -----------------------------------------------------


def test_the_weights_of_the_base_are_in_memory_once(folders: Path) -> None:
    ensemble = shared(folders, ["plain", "rslora", "dora"])
    base = dict(ensemble.models[0].named_parameters())
    pointers = {parameter.data_ptr() for parameter in base.values()}
    for model in (*ensemble.models[1:], ensemble.stacked.together):
        assert {parameter.data_ptr() for parameter in model.parameters()} <= pointers


def test_adapters_by_name_of_a_peft_model_that_stays_as_it_is() -> None:
    model = several()
    before = copy.deepcopy(model)
    ensemble = Ensemble.from_adapters(model, ["c", "a", "c"])
    found = logits(ensemble, [0, 1, 2, 3])
    assert [str(module) for module in model.modules()] == [str(m) for m in before.modules()]
    for (name, mine), (_, other) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other) and mine.requires_grad == other.requires_grad, name
    assert model.active_adapters == before.active_adapters
    models = [tiny.llama(0, eos=None)]
    for name in ("c", "a", "c"):
        models.append(copy.deepcopy(before))
        models[-1].set_adapter(name)
    expected = logits(Ensemble(models), [0, 1, 2, 3])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    assert Ensemble.from_adapters(model).num_policies == 3


def test_a_base_in_memory_stays_as_it_is(folders: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    before = [(name, p.requires_grad) for name, p in base.named_parameters()]
    modules = list(map(str, base.modules()))
    ensemble = Ensemble.from_adapters(base, [folders / "plain", folders / "saved"])
    theirs = separate(folders, ["plain", "saved"])
    expected = logits(theirs, [0, 1, 2])
    torch.testing.assert_close(logits(ensemble, [0, 1, 2]), expected, atol=5e-5, rtol=0)
    assert [(name, p.requires_grad) for name, p in base.named_parameters()] == before
    assert list(map(str, base.modules())) == modules
    assert ensemble.models[0].lm_head is base.lm_head


def test_gradient_checkpointing_of_a_base_in_memory_adds_no_hooks(folders: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    base.gradient_checkpointing_enable()
    before = list(base.model.embed_tokens._forward_hooks)
    Ensemble.from_adapters(base, [folders / "plain", folders / "rslora"])
    assert list(base.model.embed_tokens._forward_hooks) == before
    assert base.is_gradient_checkpointing


def test_a_policy_does_not_generate_with_what_transformers_compiled_of_the_base(
    folders: Path,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    compiled = CompileConfig(backend="eager", fullgraph=False, mode="default")
    compiled._compile_all_devices = True  # else on a GPU alone
    static = {"cache_implementation": "static", "compile_config": compiled}
    call: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    base.generate(IDS, **call, **static)
    policy = Ensemble.from_adapters(base, [folders / "plain"]).models[1]
    expected = separate(folders, ["plain"]).models[1].generate(input_ids=IDS, **call)
    assert torch.equal(policy.generate(IDS, **call, **static), expected)


def test_a_compiled_base_is_the_model_in_it(folders: Path) -> None:
    expected = logits(shared(folders, ["plain"]), [0, 1])
    base = torch.compile(AutoModelForCausalLM.from_pretrained(folders / "base"))
    assert torch.equal(logits(Ensemble.from_adapters(base, [folders / "plain"]), [0, 1]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_farther_from_float32_than_separate_models(
    folders: Path, dtype: torch.dtype
) -> None:
    kinds = ["plain", "dora", "embeddings"]
    exact = logits(separate(folders, kinds), [0, 1, 2, 3])
    theirs = separate(folders, kinds)
    for model in theirs.models:
        model.to(dtype)
    errors = [
        (logits(ensemble, [0, 1, 2, 3]).float() - exact).abs().mean()
        for ensemble in (shared(folders, kinds, dtype=dtype), theirs)
    ]
    assert errors[0] < 1.1 * errors[1]


# ---- architectures -------------------------------------------------------------------------------

FAMILIES = {
    "bloom": "all-linear",
    "falcon (ALiBi)": "all-linear",
    "gemma2": "all-linear",
    "gemma3_text": ["embed_tokens", "q_proj"],  # its embedding is scaled
    "gpt2": "all-linear",
    "mamba": ["in_proj", "x_proj"],
    "opt": "all-linear",
    "qwen2": "all-linear",  # one of them with DoRA over layers with biases
    "recurrent_gemma": "all-linear",
    "xlnet": "all-linear",  # one after the other
}


def of_a_family(kind: str, folder: Path, targets: Any) -> list[Path]:
    """Two adapters of a family, saved."""
    for seed in (1, 2):
        dora = kind == "qwen2" and seed == 2  # its layers have biases
        config = lora("?", r=1 + seed, use_dora=dora)
        config.target_modules = targets
        model = filled(peft.get_peft_model(small_model(kind, 1), config), seed)
        model.save_pretrained(folder / str(seed))
    return [folder / "1", folder / "2"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_equals_separate_models(kind: str, tmp_path: Path) -> None:
    paths = of_a_family(kind, tmp_path, FAMILIES[kind])
    ours = Ensemble.from_adapters(small_model(kind, 1), paths)
    adapted = [peft.PeftModel.from_pretrained(small_model(kind, 1), p).eval() for p in paths]
    theirs = Ensemble([small_model(kind, 1), *adapted])
    expected = logits(theirs, [0, 1, 2])
    scale = expected.abs().max()
    torch.testing.assert_close(logits(ours, [0, 1, 2]), expected, atol=5e-6 * scale, rtol=0)
    assert (expected[:, 1] - expected[:, 2]).abs().max() > 1e-2 * scale


def test_a_saved_router_of_experts_equals_separate_models(tmp_path: Path) -> None:
    configs = [lora("q_proj", modules_to_save=["gate"]), lora("v_proj")]
    for seed, config in enumerate(configs):
        adapted = filled(peft.get_peft_model(small_model("mixtral", 1), config), seed)
        adapted.save_pretrained(tmp_path / str(seed))
    paths = [tmp_path / "0", tmp_path / "1"]
    base, *others = (small_model("mixtral", 1) for _ in range(3))
    adapted = [
        peft.PeftModel.from_pretrained(m, p).eval() for m, p in zip(others, paths, strict=True)
    ]
    expected = logits(Ensemble([base, *adapted]), [0, 1, 2])
    found = logits(Ensemble.from_adapters(base, paths), [0, 1, 2])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("jetmoe", ["layer"], "sees the tokens sorted by expert"),
        ("gpt2", ["wpe"], "wpe .* does not read the token ids"),
        ("mixtral", "all-linear", "changes parameters, not layers"),
    ],
)
def test_a_layer_that_cannot_be_stacked_is_refused(
    kind: str, targets: Any, message: str, tmp_path: Path
) -> None:
    paths = of_a_family(kind, tmp_path, targets)
    with pytest.raises(ValueError, match=f"{message}.*from_pretrained loads a base model for each"):
        Ensemble.from_adapters(small_model(kind, 1), paths)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("llama4_text", ["router"], "router .* computes more than a linear layer"),
    ],
)
def test_a_layer_that_is_not_called_as_a_linear_one_is_refused_when_it_runs(
    kind: str, targets: Any, message: str, tmp_path: Path
) -> None:
    paths = of_a_family(kind, tmp_path, targets)
    ensemble = Ensemble.from_adapters(small_model(kind, 1), paths)
    for forward in ("stacked", "separate"):
        ensemble.forward = forward
        with pytest.raises(ValueError, match=message):
            logits(ensemble, [0, 1, 2])


def test_prompts_that_stacking_would_have_to_pad_run_separately(tmp_path: Path) -> None:
    kind = "recurrent_gemma"  # which cannot read padding
    paths = of_a_family(kind, tmp_path, "all-linear")
    ours = Ensemble.from_adapters(small_model(kind, 1), paths)
    adapted = [peft.PeftModel.from_pretrained(small_model(kind, 1), p).eval() for p in paths]
    theirs = Ensemble([small_model(kind, 1), *adapted])
    prompts, options = [IDS, IDS[:, 1:], IDS[:, 2:]], {"weights": [0.4, 0.4], "pad_token_id": 0}
    expected = generate(theirs, input_ids=prompts, **options, seed=1)
    assert torch.equal(generate(ours, input_ids=prompts, **options, seed=1).tokens, expected.tokens)
    ours.forward = "stacked"
    with pytest.raises(ValueError, match="cannot read padded prompts"):
        generate(ours, input_ids=prompts, **options)


def test_a_family_whose_rows_do_not_come_first_is_refused_stacked(tmp_path: Path) -> None:
    paths = of_a_family("xlnet", tmp_path, "all-linear")
    ensemble = Ensemble.from_adapters(small_model("xlnet", 1), paths, forward="stacked")
    with pytest.raises(ValueError, match="cannot run stacked, XLNet.*forward='separate'"):
        logits(ensemble, [0, 1, 2])


def test_a_layer_with_two_ways_of_changing_it_runs_policy_by_policy(folders: Path) -> None:
    """One adapter saves lm_head whole, another has LoRA on it: PEFT cannot put them on one base."""
    ensemble = shared(folders, ["saved", "embeddings"])
    assert isinstance(ensemble.stacked.together.lm_head, stacked_layers.PerPolicy)
