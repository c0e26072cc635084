"""What the engine refuses to start with, and what requests it refuses: no engine runs here."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import BambaConfig, LlamaConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from mod_fused.serving.vllm.config import _check_version, settings_of
from mod_fused.serving.vllm.requests import Settings, arguments, check

from .conftest import POLICIES, REFERENCE, overrides
from .test_models import checkpoint, quantised

SETTINGS = Settings(2, (2, 5), 904, 904)


def configure(**more: Any) -> Any:
    given = {"model": REFERENCE, "dtype": "float32", "max_model_len": 256}
    return EngineArgs(**{**given, "hf_overrides": overrides(), **more}).create_engine_config()


def test_the_settings_reach_the_workers() -> None:
    config = configure(hf_overrides=overrides(mod_fused_defaults={"mod_weights": [1, 0, 0]}))
    settings = settings_of(config.model_config)
    assert settings == Settings(3, (2,), 904, 904, True, {"mod_weights": [1, 0, 0]})
    # The checks know them in every process, whatever other engines are there.
    module, name = config.model_config.logits_processors[0].split(":")
    assert getattr(importlib.import_module(module), name).settings == settings
    assert config.model_config.get_vocab_size() == 904


def test_another_model_is_left_alone() -> None:
    config = EngineArgs(model=REFERENCE, dtype="float32").create_engine_config()
    assert not config.model_config.logits_processors
    assert not hasattr(config.model_config.hf_config, "mod_fused_settings")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"enable_prompt_embeds": True}, "prompt-embeds"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs-mode"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker-cls"),
        ({"logits_processors": ["a.b:C"]}, "custom logits processor"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        ({"hf_overrides": {"architectures": ["ModFusedForCausalLM"]}}, "mod_fused_policies"),
        ({"hf_overrides": overrides(mod_fused_policies="A")}, "list of folders"),
        ({"hf_overrides": overrides(mod_fused_policies=[])}, "1 to 8 policies"),
        ({"hf_overrides": overrides(mod_fused_policies=["/no/such/folder"])}, r"policy 1 \(/no"),
        ({"hf_overrides": overrides(mod_fused_polices=POLICIES)}, "mod_fused_polices"),
        ({"hf_overrides": overrides(vocab_size=904)}, "vocab_size"),
        ({"load_format": "tensorizer"}, "load-format"),
        ({"disable_sliding_window": True}, "disable-sliding-window"),
        ({"kv_offloading_size": 1.0}, "kv-offloading-size"),
        ({"hf_overrides": overrides(mod_fused_defaults=[])}, "mod_fused_defaults"),
        ({"hf_overrides": overrides(mod_fused_defaults=[1])}, "mod_fused_defaults"),
        ({"hf_overrides": overrides(mod_fused_defaults={"mod_weights": [1]})}, "3 finite numbers"),
        ({"hf_overrides": overrides(mod_fused_defaults={"weights": [1, 0, 0]})}, "weights"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_engine_refuses(more: dict[str, Any], word: str) -> None:
    with pytest.raises(Exception, match=word):
        configure(**more)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("max_position_embeddings", 128, "(?s)policy 1 .*max_model_len"),
        ("vocab_size", 800, "ids up to 903"),
    ],
)
def test_a_policy_that_cannot_read_all_that_the_reference_can_is_refused(
    tmp_path: Path, field: str, value: int, word: str
) -> None:
    policy = checkpoint(tmp_path, "llama")
    config = LlamaConfig.from_pretrained(policy)
    setattr(config, field, value)
    config.save_pretrained(policy)
    with pytest.raises(Exception, match=word):
        configure(hf_overrides=overrides(mod_fused_policies=[policy]))


def test_a_policy_with_recurrent_layers_is_refused(tmp_path: Path) -> None:
    policy = checkpoint(tmp_path, "llama")
    config = BambaConfig(num_hidden_layers=2, attn_layer_indices=[1], max_position_embeddings=256)
    config.architectures = ["BambaForCausalLM"]
    config.save_pretrained(policy)
    with pytest.raises(Exception, match="no architecture that vLLM implements|hybrid"):
        configure(hf_overrides=overrides(mod_fused_policies=[policy]))


def test_models_that_are_quantised_differently_are_refused(tmp_path: Path) -> None:
    policy = quantised(checkpoint(tmp_path, "llama"))
    with pytest.raises(Exception, match="must be quantised alike"):
        configure(hf_overrides=overrides(mod_fused_policies=[policy]), dtype="bfloat16")


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({}, "mod_weights is missing"),
        ({"mod_weights": 1.0}, "list of 2 numbers"),
        ({"mod_weights": "0.5,0.5"}, "list of 2 numbers"),
        ({"mod_weights": [1.0]}, "2 finite numbers"),
        ({"mod_weights": [1.0, "a"]}, "list of 2 numbers"),
        ({"mod_weights": [1.0, True]}, "list of 2 numbers"),
        ({"mod_weights": [1.0, math.nan]}, "2 finite numbers"),
        ({"mod_weights": [1.0, math.inf]}, "2 finite numbers"),
        ({"mod_weights": [0.5, 0.5], "mod_seed": 1}, "unknown arguments"),
        ({"mod_weights": [0.5, 0.5], "weights": [1, 0]}, "unknown arguments"),
        ({"mod_weights": [0.5, 0.5], "mod_values": [[1.0]]}, "not supported inside vLLM"),
        ({"mod_weights": [0.5, 0.5], "mod_divergence": "tv"}, "mod_.*divergence"),
        ({"mod_weights": [0.5, 0.5], "mod_divergence": 3}, "divergence"),
        ({"mod_weights": [0.5, 0.5], "mod_normalizer": "none"}, "mod_normalizer"),
        ({"mod_weights": [0.5, 0.5], "mod_normalizer": ["exact"]}, "normalizer"),
        ({"mod_weights": [0.5, 0.5], "mod_sequence_history": "yes"}, "mod_sequence_history"),
        ({"mod_weights": [0.5, 0.5], "mod_sequence_history": 2}, "true or false"),
        ({"mod_weights": [0.5, 0.5], "mod_plausibility": 2.0}, "mod_plausibility"),
        ({"mod_weights": [0.5, 0.5], "mod_plausibility": [0.5]}, "plausibility"),
        ({"mod_weights": [0.5, 0.5], "mod_plausibility": "on"}, "plausibility"),
        ({"mod_weights": [1e300, 0.5]}, "mod_weights"),
        ({"mod_weights": [3e38, -3e38]}, "mod_weights"),
    ],
)
def test_arguments_are_refused(extra: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        arguments(extra, SETTINGS)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logit_bias": {3: math.nan}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1024"),
        ({"allowed_token_ids": list(range(1025))}, "at most 1024"),
        ({"stop_token_ids": list(range(10, 137)), "min_tokens": 1}, "at most 128 tokens, got 129"),
        ({"logprobs": 2}, "at least 3"),
        (
            {"extra_args": {}, "logprobs": 4, "max_tokens": 1, "detokenize": False}
            | {"watermarking": False},
            "beam search",
        ),
    ],
)
def test_params_are_refused(more: dict[str, Any], word: str) -> None:
    own = {"mod_weights": [0.5, 0.5], "mod_model_logprobs": True}
    with pytest.raises(ValueError, match=word):
        check(SamplingParams(**{"extra_args": own, "logprobs": 3, **more}), SETTINGS)


@pytest.mark.parametrize(("version", "good"), [("0.31.9", 0), ("0.32.1+cpu", 1), ("0.33.0", 0)])
def test_other_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, good: int
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    if good:
        _check_version()
    else:
        with pytest.raises(ValueError, match=f"below 0.33, found {version}"):
            _check_version()


def test_a_tokenizer_may_not_bear_ids_beyond_its_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def convert(tokenizer: object, ids: list[int]) -> list[str]:
        assert ids == [904, 905, 906, 907]
        raise KeyError(ids)

    monkeypatch.setattr("mod_fused.serving.vllm.config.convert_ids_list_to_tokens", convert)
    settings = settings_of(configure().model_config)
    own = {"mod_weights": [1, 0, 0], "mod_model_logprobs": True}
    with pytest.raises(ValueError, match="not supported with this tokenizer"):
        check(SamplingParams(extra_args=own, logprobs=4), settings)


def test_defaults_give_way_to_what_is_asked_for() -> None:
    settings = Settings(2, (2,), 9, 9, True, {"mod_weights": [1, 0], "mod_divergence": "jsd"})
    assert arguments({"session_id": "mine"}, settings).divergence == "jsd"
    found = arguments({"mod_divergence": "jeffrey"}, settings)
    assert found.weights == (1.0, 0.0) and found.divergence == "jeffrey"


def test_the_support_cut_is_that_of_generate() -> None:
    def cut(weights: list[float], divergence: str, **more: Any) -> float:
        return arguments(
            {"mod_weights": weights, "mod_divergence": divergence, **more}, SETTINGS
        ).cut

    assert cut([0.5, 0.5], "reverse_kl") == 0.0
    assert cut([0.5, 0.5], "jsd") == 1e-3
    assert cut([0.0, 1.0], "jsd") == cut([0.0, 0.0], "jsd") == 0.0
    assert cut([0.5, 0.5], "jsd", mod_plausibility=None) == 0.0
    assert cut([0.0, 1.0], "jsd", mod_plausibility=0.2) == 0.2


def test_the_end_of_every_model_ends_a_request() -> None:
    params = SamplingParams(extra_args={"mod_weights": [1, 0]}, stop_token_ids=[7])
    for _ in range(2):  # the same object may come again
        check(params, SETTINGS)
    assert params.stop_token_ids == [7, 2, 5] and params.all_stop_token_ids == {2, 5, 7}
    params = SamplingParams(extra_args={"mod_weights": [1, 0]}, ignore_eos=True)
    check(params, SETTINGS)
    assert params.stop_token_ids == []
