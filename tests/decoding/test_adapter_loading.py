"""A base and adapters from names and objects: right, or refused before anything is changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lora_policies
import pytest
import tiny_models as tiny
import torch
from lora_policies import filled, logits, lora, peft, separate, several, shared
from transformers import AutoModelForCausalLM

from mod_fused import Ensemble

folders = lora_policies.folders


def test_tokenizers_are_the_adapters_own_else_the_bases(folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    filled(peft.get_peft_model(base, lora()), 1).save_pretrained(tmp_path / "a")
    tiny.tokenizer(pad_token="<unk>").save_pretrained(tmp_path / "a")
    ensemble = Ensemble.from_adapters(folders / "base", [tmp_path / "a", folders / "plain"])
    assert [t.pad_token for t in ensemble.tokenizers] == [None, "<unk>", None]
    given = tiny.tokenizer(pad_token="<eos>")
    ensemble = shared(folders, ["plain"], tokenizers=given)
    assert ensemble.tokenizers == [given, given]


def with_config(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter's folder with another configuration."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "weights of its base model .*'pissa'"),
        ({"init_lora_weights": "olora"}, "weights of its base model .*'olora'"),
        ({"bias": "all"}, "biases of its base model"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "repeats layers of its base model"),
        ({"kasa_config": {}}, "weights of its base model .kasa_config"),
        ({"alora_invocation_tokens": [3]}, "looks for in whole sequences"),
        ({"base_model_name_or_path": "someone/other"}, "made for the base model someone/other"),
    ],
)
def test_an_adapter_that_changes_its_base_is_refused_before_it_does(
    folders: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "kasa_config" in changes:
        changes = {"kasa_config": {"beta": 0.1, "gamma": 0.1}}
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    before = copy.deepcopy(base.state_dict())
    path = with_config(folders / "plain", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Ensemble.from_adapters(base, [folders / "rslora", path])
    assert str(path) in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


def test_an_adapter_saved_with_another_embedding_is_refused_before_it_is_loaded(
    folders: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    before = copy.deepcopy(base.state_dict())
    for shift in (0.0, 0.5):
        model = peft.get_peft_model(tiny.llama(0, eos=None), lora())
        model.get_input_embeddings().weight.data += shift
        filled(model, 1).save_pretrained(tmp_path / str(shift), save_embedding_layers=True)
    Ensemble.from_adapters(base, [tmp_path / "0.0"])
    with pytest.raises(ValueError, match="0.5 changes weights of its base .*embed_tokens.weight"):
        Ensemble.from_adapters(base, [folders / "plain", tmp_path / "0.5"])
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


def _with_compiled_layer(base: Any) -> None:
    base.model.layers[1].forward = torch.compile(base.model.layers[1].forward)


BASES: dict[str, tuple[Any, str]] = {
    "compiled forward": (
        lambda base: setattr(base, "forward", torch.compile(base.forward)),
        "the forward of the base model has been replaced",
    ),
    "compiled layer": (_with_compiled_layer, "the forward of model.layers.1 has been replaced"),
    "offloaded": (
        lambda base: pytest.importorskip("accelerate").cpu_offload(base),
        "weights of the base model are offloaded or not loaded",
    ),
    "training": (lambda base: base.train(), "the LlamaForCausalLM is in training mode"),
    "adapters": (  # as load_adapter puts them there
        lambda base: peft.inject_adapter_in_model(lora(), base).eval(),
        "the base model holds adapters already",
    ),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_base_in_memory_that_is_not_plain_is_refused(folders: Path, kind: str) -> None:
    change, message = BASES[kind]
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    change(base)
    before = [module.training for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        Ensemble.from_adapters(base, [folders / "plain"])
    assert [module.training for module in base.modules()] == before


def test_a_base_of_another_name_is_taken_on_request(folders: Path, tmp_path: Path) -> None:
    path = with_config(folders / "plain", tmp_path / "a", base_model_name_or_path="someone/other")
    ensemble = Ensemble.from_adapters(folders / "base", [path], check_base=False)
    expected = logits(separate(folders, ["plain"]), [0, 1])
    torch.testing.assert_close(logits(ensemble, [0, 1]), expected, atol=5e-5, rtol=0)


def test_a_base_is_known_by_any_path_to_it(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(folders / "base")
    assert Ensemble.from_adapters(tmp_path / "link", [folders / "plain"]).num_policies == 1
    monkeypatch.chdir(folders / "base")
    assert Ensemble.from_adapters(".", [folders / "plain"]).num_policies == 1


def test_a_missing_adapter_is_found_before_the_base_is_loaded(
    folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()  # it has no weights
    (tmp_path / "base/config.json").write_bytes((folders / "base/config.json").read_bytes())
    with pytest.raises(OSError, match="nowhere does not exist"):
        Ensemble.from_adapters(tmp_path / "base", [folders / "plain", folders / "nowhere"])


def test_a_subfolder_is_that_of_the_base(folders: Path) -> None:
    ensemble = Ensemble.from_adapters(
        folders, [folders / "plain"], subfolder="base", check_base=False
    )
    assert torch.equal(logits(ensemble, [0, 1]), logits(shared(folders, ["plain"]), [0, 1]))


def test_other_methods_than_lora_are_refused(folders: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    config = peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="kind IA3, not LoRA"):
        Ensemble.from_adapters(folders / "base", [tmp_path / "a"])


def test_tensors_that_do_not_fit_the_base_are_refused(folders: Path, tmp_path: Path) -> None:
    wide = tiny._ready(tiny.LlamaForCausalLM, tiny._llama_config(tiny.V, head_dim=32), 0, None)
    wide.save_pretrained(tmp_path / "base")
    with pytest.raises(OSError, match="cannot load the adapter .*plain.*size mismatch"):
        Ensemble.from_adapters(tmp_path / "base", [folders / "plain"])
    from safetensors.torch import load_file, save_file

    path = with_config(folders / "plain", tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    with pytest.raises(ValueError, match="a has wrong tensors for .*base: 1 missing"):
        Ensemble.from_adapters(base, [folders / "rslora", path])
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_arguments_that_do_not_fit_are_refused(folders: Path) -> None:
    base, plain = folders / "base", folders / "plain"
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "forward must be one of auto", (base, [plain]), {"forward": "both"}),
        (TypeError, "adapters must be a list", (base, str(plain)), {}),
        (ValueError, "at least one adapter", (base, []), {}),
        (ValueError, "at least one adapter", (several(), []), {}),
        (ValueError, "None for a PeftModel alone", (base, None), {}),
        (ValueError, "is no PEFT adapter", (base, [base]), {}),
        (ValueError, "is an adapter itself", (plain, [plain]), {}),
        (OSError, "nowhere does not exist", (base, [folders / "nowhere"]), {}),
        (TypeError, "a transformers model or a PeftModel, got int", (3, [plain]), {}),
        (ValueError, "has no adapter d, it has a, b, c", (several(), ["d"]), {}),
        (ValueError, "dtype: for a base model that is loaded", (several(),), {"dtype": "auto"}),
        (ValueError, "device: for a base model that is loaded", (several(),), {"device": "cpu"}),
        (ValueError, "in training mode", (several().train(),), {}),
    ]
    merged = several()
    merged.merge_adapter(["b"])
    cases.append((ValueError, "merged into the base", (merged,), {}))
    for kind, message, arguments, options in cases:
        with pytest.raises(kind, match=message):
            Ensemble.from_adapters(*arguments, **options)
