"""Checkpoints, adapters and tokenizers: loaded whole, or refused with their names."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from mod_fused import Ensemble, generate
from mod_fused.app import scorers as guiding

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a GPT-2 with tied embeddings, a GPT-Neo and a scalar scorer without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tiny.llama(0).save_pretrained(root / "llama")
    tiny.gpt2(1).save_pretrained(root / "gpt2")
    tiny.llama_value(2).save_pretrained(root / "value")
    neo = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=tiny.V, **neo)).save_pretrained(root / "neo")
    for name in ("llama", "gpt2", "neo"):
        tiny.tokenizer().save_pretrained(root / name)
    return root


def changed(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


# ---- checkpoints ---------------------------------------------------------------------------------


def drop(*keys: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(key) for key in keys]


def put(key: str, *shape: int) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


WRONG = [
    ("llama", drop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
    ("llama", drop("model.norm.weight", "lm_head.weight"), r"2 missing \(lm_head.*, model.norm"),
    ("llama", put("v_head.summary.weight", 1, 32), r"1 unexpected \(v_head.summary.weight\)"),
    ("llama", put("model.norm.weight", 5), r"1 of another shape .*\(\[5\] instead of \[32\]\)"),
    ("gpt2", drop("transformer.wte.weight"), r"transformer.wte.weight"),
    ("gpt2", drop("transformer.h.0.ln_1.weight"), r"1 missing \(transformer.h.0.ln_1.weight\)"),
]


@pytest.mark.parametrize(("kind", "change", "said"), WRONG)
def test_a_checkpoint_with_other_tensors_is_refused_with_their_names(
    folders: Path, tmp_path: Path, kind: str, change: Any, said: str
) -> None:
    bad = changed(folders / kind, tmp_path / "bad", change)
    for reference, policy in ((bad, folders / "llama"), (folders / "llama", bad)):
        with pytest.raises(ValueError, match=f"bad has wrong tensors: .*{said}"):
            Ensemble.from_pretrained(reference, [policy])
    with pytest.raises(ValueError, match=f"bad has wrong tensors: .*{said}"):
        guiding.load_scorers([str(bad)])


def test_many_names_are_cut_and_counted(folders: Path, tmp_path: Path) -> None:
    bad = changed(folders / "llama", tmp_path / "bad", lambda tensors: tensors.clear())
    with pytest.raises(ValueError, match=r"21 missing \(lm_head.weight, [^,]*, [^,]*, \.\.\.\)"):
        Ensemble.from_pretrained(bad, [])


def test_a_scalar_scorer_with_other_tensors_is_refused(folders: Path, tmp_path: Path) -> None:
    guiding.load_scorers([str(folders / "value")])
    bad = changed(folders / "value", tmp_path / "bad", drop("score.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(score.weight\)"):
        guiding.load_scorers([str(bad)])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gpt2", put("transformer.h.0.attn.bias", 1, 1, 64, 64)),  # the causal mask
        ("gpt2", put("transformer.h.1.attn.masked_bias")),
        ("neo", put("transformer.h.1.attn.attention.bias", 1, 1, 64, 64)),
        ("neo", lambda tensors: [
            tensors.update({key.removeprefix("transformer."): tensors.pop(key)})
            for key in list(tensors)
        ] + [tensors.update({"h.0.attn.attention.bias": torch.ones(1, 1, 64, 64)})]),
        ("llama", put("model.layers.0.self_attn.rotary_emb.inv_freq", 8)),
        ("gpt2", lambda tensors: tensors.update(  # saved with the head of tied embeddings
            {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
        )),
        ("gpt2", lambda tensors: [  # saved as a base model
            tensors.update({key.removeprefix("transformer."): tensors.pop(key)})
            for key in list(tensors)
        ]),
    ],
)  # fmt: skip
def test_what_old_versions_saved_and_new_ones_compute_is_no_fault(
    folders: Path, tmp_path: Path, kind: str, change: Any
) -> None:
    old = changed(folders / kind, tmp_path / "old", change)
    loaded, whole = (Ensemble.from_pretrained(x, []).models[0] for x in (old, folders / kind))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


class Bomb:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "value"])
def test_a_pickle_is_not_loaded(folders: Path, tmp_path: Path, kind: str, indexed: bool) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folders / kind, bad)
    (bad / WEIGHTS).unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, bad / "pytorch_model.bin")
    if indexed:  # safetensors by its name alone
        names = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (bad / f"{WEIGHTS}.index.json").write_text(json.dumps(names))
    load: Callable[[], Any] = lambda: guiding.load_scorers([str(bad)])  # noqa: E731
    for attempt in (load, lambda: Ensemble.from_pretrained(bad, [])):
        with pytest.raises(OSError, match="pickle.*save it as safetensors"):
            attempt()
    assert not (tmp_path / "exploded").exists()


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def directory(name: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink(), (folder / name).mkdir()]


def cut_weights(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lost_shard(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors")
    (folder / WEIGHTS).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


BROKEN = {
    "weights cut": cut_weights,
    "weights garbage": write(WEIGHTS, b"garbage" * 99),
    "weights empty": write(WEIGHTS, b""),
    "weights a directory": directory(WEIGHTS),
    "shard lost": lost_shard,
    "config {}": write("config.json", b"{}"),
    "config list": write("config.json", b"[]"),
    "config null": write("config.json", b"null"),
    "config garbage": write("config.json", b"\xff\xfe{"),
    "config empty": write("config.json", b""),
    "config a directory": directory("config.json"),
    "architecture unknown": write("config.json", b'{"model_type": "nonsense"}'),
    "architecture a number": write("config.json", b'{"model_type": 3}'),
    "code of its own": write(
        "config.json", b'{"model_type": "odd", "auto_map": {"AutoConfig": "a.B"}}'
    ),
    "generation config": write("generation_config.json", b"garbage"),
    "generation ids": write("generation_config.json", b'{"eos_token_id": "x"}'),
}
BROKEN_TOKENIZER = {
    "tokenizer {}": write("tokenizer.json", b"{}"),
    "tokenizer list": write("tokenizer.json", b"[]"),
    "tokenizer garbage": write("tokenizer.json", b"\x80\x04garbage"),
    "tokenizer empty": write("tokenizer.json", b""),
    "tokenizer a directory": directory("tokenizer.json"),
    "tokenizer lost": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer config": write("tokenizer_config.json", b"[]"),
}


@pytest.mark.parametrize("what", [*BROKEN, *BROKEN_TOKENIZER])
def test_a_broken_file_is_one_line_that_names_the_folder(
    folders: Path, tmp_path: Path, what: str
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(folders / "llama", bad)
    (BROKEN | BROKEN_TOKENIZER)[what](bad)
    with pytest.raises(OSError) as caught:
        Ensemble.from_pretrained(folders / "llama", [bad], trust_remote_code=False)
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)
    if what in BROKEN:
        with pytest.raises(OSError, match="cannot load"):
            guiding.load_scorers([str(bad)], trust_remote_code=False)


# ---- adapters ------------------------------------------------------------------------------------


def adapter(base: Path, folder: Path, config: Any) -> Any:
    """Save an adapter that changes what the base says; the adapted model."""
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return LoraConfig(r=2, **options)


def kinds_of_adapters() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    causal = {"task_type": "CAUSAL_LM"}
    return {
        "lora": lora(),
        "lora without a task": lora(task_type=None),
        "head too": lora(modules_to_save=["lm_head"]),
        "dora": lora(use_dora=True),
        "vera": peft.VeraConfig(r=2, target_modules=["q_proj"], **causal),
        "vb-lora": peft.VBLoRAConfig(
            r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"], **causal
        ),
        "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, **causal),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **causal
        ),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **causal),
    }


@pytest.mark.parametrize("kind", kinds_of_adapters())
def test_an_adapter_folder_is_the_adapted_model_with_the_references_tokenizer(
    folders: Path, tmp_path: Path, kind: str
) -> None:
    expected = adapter(folders / "llama", tmp_path / "a", kinds_of_adapters()[kind])
    ensemble = Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain, ours, wanted = (
            model(input_ids=ids).logits for model in (*ensemble.models, expected)
        )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    assert (plain - ours[:, -3:]).abs().max() > 0.1
    assert not ensemble.models[1].training
    assert ensemble.tokenizers[1].get_vocab() == tiny.VOCAB
    assert ensemble.encode("fox ran")[0][1].tolist() == ensemble.encode("fox ran")[0][0].tolist()


def test_a_loaded_adapter_decodes_at_its_corner_as_it_does_alone(
    folders: Path, tmp_path: Path
) -> None:
    expected = adapter(folders / "llama", tmp_path / "a", lora())
    ensemble = Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])
    ids = torch.tensor([[3, 4, 5]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    wanted = expected.generate(input_ids=ids, eos_token_id=None, pad_token_id=0, **options)
    out = generate(ensemble, input_ids=ids, weights=[1.0], eos_token_id=[], **options)
    assert out.sequences.tolist() == wanted.tolist()


def test_an_adapter_keeps_the_dtype_that_was_asked_for(folders: Path, tmp_path: Path) -> None:
    adapter(folders / "llama", tmp_path / "a", lora())
    (model,) = Ensemble.from_pretrained(None, [tmp_path / "a"], dtype="bfloat16").models[1:]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_adapter_with_other_tensors_is_refused_with_their_names(
    folders: Path, tmp_path: Path
) -> None:
    adapter(folders / "llama", tmp_path / "a", lora(modules_to_save=["lm_head"]))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    head = "base_model.model.lm_head.weight"
    for change, said in [
        (drop(first), r"1 missing \(.*layers.0.self_attn.q_proj.lora_A"),
        (drop(head), "base_model.model.lm_head.weight"),
        (put("base_model.model.v_head.weight", 1, 32), "1 unexpected .*v_head"),
        (put(first, 2, 16), "size mismatch for .*layers.0.self_attn.q_proj.lora_A"),
    ]:
        other = dict(tensors)
        change(other)
        save_file(other, file)
        with pytest.raises((ValueError, OSError), match=f"{tmp_path / 'a'}.*{said}"):
            Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])


def test_a_fault_of_the_adapters_base_is_seen(folders: Path, tmp_path: Path) -> None:
    base = changed(folders / "llama", tmp_path / "base", lambda tensors: None)
    adapter(base, tmp_path / "a", lora())
    shutil.rmtree(base)
    changed(folders / "llama", base, drop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"the adapter .*a needs its base .*model.norm.weight"):
        Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])
    shutil.rmtree(base)
    with pytest.raises(OSError, match=rf"the adapter .*a needs its base .*{base} does not exist"):
        Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for name, said in [
        (None, "does not name its base"),
        (str(tmp_path / "a"), "an adapter itself"),
        (str(folders / "gpt2"), "cannot load the adapter"),
    ]:
        file.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises((ValueError, OSError), match=said):
            Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])


def test_a_base_may_be_named_from_the_current_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(folders / "llama", tmp_path / "a", lora())
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "./llama"}
    file.write_text(json.dumps(config))
    monkeypatch.chdir(folders)
    Ensemble.from_pretrained("llama", [tmp_path / "a"])


def test_adapters_that_are_not_for_this_are_refused(folders: Path, tmp_path: Path) -> None:
    adapter(folders / "llama", tmp_path / "a", lora())
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "a", whole)
    shutil.copy(folders / "llama" / WEIGHTS, whole)
    with pytest.raises(ValueError, match="holds a model .* and an adapter"):
        Ensemble.from_pretrained(folders / "llama", [whole])
    (whole / WEIGHTS).unlink()
    config = json.loads((whole / "adapter_config.json").read_text())
    (whole / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    with pytest.raises(OSError, match="expected an adapter of a causal model, got SEQ_CLS"):
        Ensemble.from_pretrained(folders / "llama", [whole])
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(OSError, match="pickle.*save it as safetensors"):
        Ensemble.from_pretrained(folders / "llama", [tmp_path / "a"])
    assert not (tmp_path / "exploded").exists()


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_policy_without_a_tokenizer_has_the_references_and_a_reference_none(
    folders: Path, tmp_path: Path
) -> None:
    # transformers makes an empty tokenizer of its own for such a folder of a GPT-2.
    tiny.gpt2(1).save_pretrained(tmp_path / "bare")
    ensemble = Ensemble.from_pretrained(folders / "llama", [tmp_path / "bare"])
    assert [t.get_vocab() == tiny.VOCAB for t in ensemble.tokenizers] == [True, True]
    ensemble = Ensemble.from_pretrained(tmp_path / "bare", [folders / "llama"])
    assert ensemble.tokenizers[0] is None
    with pytest.raises(ValueError, match="the reference has no tokenizer"):
        ensemble.encode("fox")
    assert Ensemble.from_pretrained(None, [folders / "llama", tmp_path / "bare"]).encode("fox")


def test_options_about_files_reach_model_and_tokenizer(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "sub")
    adapter(folders / "llama", tmp_path / "adapters" / "sub", lora())
    options = {"subfolder": "sub", "cache_dir": tmp_path / "cache", "revision": "main"}
    ensemble = Ensemble.from_pretrained(tmp_path, [tmp_path / "adapters"], **options)
    assert ensemble.tokenizer.get_vocab() == tiny.VOCAB
    assert type(ensemble.models[1]).__name__ == "PeftModelForCausalLM"


def extended(*added: str, **roles: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(extended.folder)
    tokenizer.add_tokens([token for token in added if token not in roles.values()])
    tokenizer.add_special_tokens(roles)
    return tokenizer


@pytest.fixture
def base(folders: Path) -> Any:
    extended.folder = folders / "llama"  # type: ignore[attr-defined]
    return AutoTokenizer.from_pretrained(folders / "llama")


@pytest.mark.parametrize("reversed_order", [False, True])
def test_tokens_added_behind_the_vocabulary_are_noted_and_never_drawn(
    base: Any, reversed_order: bool
) -> None:
    other = extended(pad_token="[PAD]")
    assert len(other) == tiny.V + 1
    models = [tiny.llama(0, tiny.V + 8, eos=None), tiny.llama(1, tiny.V + 8, eos=None)]
    with torch.no_grad():  # both would say [PAD] and nothing else
        for model in models:
            model.lm_head.weight[tiny.V] = 50 * model.lm_head.weight.abs().max()
            model.lm_head.weight[tiny.V + 1] = -model.lm_head.weight[tiny.V]
    tokenizers = [base, other]
    label = "policy 1"
    if reversed_order:
        tokenizers, label = tokenizers[::-1], "the reference"
    with pytest.warns(UserWarning, match=rf"only the {tiny.V} token ids.*{label}'s adds 1 \('\["):
        ensemble = Ensemble(models, tokenizers)
    assert ensemble.vocab_size == tiny.V
    assert ensemble.pad_token_id < tiny.V
    options: dict[str, Any] = {"weights": [0.5], "max_new_tokens": 8, "seed": 0}
    out = generate(ensemble, ["fox ran"] * 8, eos_token_id=[], **options)
    assert int(out.tokens.max()) < tiny.V
    # With one tokenizer padded embeddings stay as they are.
    plain = generate(Ensemble(models, base), ["fox ran"] * 8, eos_token_id=[], **options)
    assert int(plain.tokens.max()) >= tiny.V


def test_several_tokenizers_may_add_different_tokens(base: Any) -> None:
    models = [tiny.llama(0, tiny.V + 8)] * 3
    tokenizers = [extended("<a>", "<b>"), extended(eos_token="<end>"), base]
    said = r"adds 2 \('<a>', '<b>'\); policy 1's adds 1 .*its end of a sequence '<end>'"
    with pytest.warns(UserWarning, match=said):
        ensemble = Ensemble(models, tokenizers)
    assert ensemble.vocab_size == tiny.V
    with pytest.raises(ValueError, match="vocab_size must be at most"):
        generate(ensemble, "fox", weights=[1.0, 1.0], vocab_size=tiny.V + 1)


def test_equal_tokenizers_give_no_note(base: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble = Ensemble([tiny.llama(0, tiny.V + 8)] * 2, [base, tiny.tokenizer()])
    assert ensemble.vocab_size == tiny.V + 8


def test_an_added_token_that_hides_another_is_refused(base: Any) -> None:
    swapped = tiny.tokenizer({**tiny.VOCAB, "fox": tiny.VOCAB["dog"], "dog": tiny.VOCAB["fox"]})
    swapped.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"maps 'fox' to .*3 of \d+ tokens differ"):
        Ensemble([tiny.llama(0)] * 2, [base, swapped])
