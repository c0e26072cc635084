"""Adapters on a quantised base: separate PEFT models on bases of their own, quantised alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from mod_fused import Ensemble, generate

VOCAB = 100
IDS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))


def config(kind: str) -> Any:
    if kind == "int8 of torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "int8 of bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


KINDS = ("int8 of torchao", "int8 of bitsandbytes", "4 bits of bitsandbytes")
#: bitsandbytes rounds the inputs of a product, to 8 bits or on a CPU to bfloat16: a last digit of
#: an input may become 2^-7 of it.
TOLERANCES = dict(zip(KINDS, (5e-5, 5e-2, 3e-2), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": VOCAB, "initializer_range": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None, bos_token_id=None))
    model.save_pretrained(path)
    return path


def base(folder: Path, kind: str) -> Any:
    options = {"quantization_config": config(kind), "device_map": "cpu", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def adapters(folder: Path, kind: str, target: Path, **options: Any) -> list[Path]:
    """Two adapters for the base, saved."""
    for rank in (2, 3):
        settings = {"r": rank, "task_type": "CAUSAL_LM", **options}
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **settings)
        model = peft.get_peft_model(base(folder, kind), lora)
        generator = torch.Generator().manual_seed(rank)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(target / str(rank))
    return [target / "2", target / "3"]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_tokens_are_those_of_separate_models(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    paths = adapters(folder, kind, tmp_path)
    ours = Ensemble.from_adapters(base(folder, kind), paths)
    models = [peft.PeftModel.from_pretrained(base(folder, kind), p).eval() for p in paths]
    theirs = Ensemble([base(folder, kind), *models])
    states = [e.start([IDS] * 3, [None] * 3, max_new_tokens=3) for e in (ours, theirs)]
    for tokens in (None, IDS[:, 0], IDS[:, 1]):
        got, expected = (state.step(tokens) for state in states)
        for x, y in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(x, y, atol=TOLERANCES[kind], rtol=0)
        assert all((x - expected[0]).abs().max() > 0.5 for x in expected[1])
    if kind != KINDS[0]:
        return
    options: dict[str, Any] = {"weights": [0.5, 0.4], "max_new_tokens": 12, "seed": 1}
    tokens = [generate(e, input_ids=IDS, pad_token_id=0, **options).tokens for e in (ours, theirs)]
    assert torch.equal(*tokens)


def test_bitsandbytes_8_bits_do_not_run_stacked(folder: Path, tmp_path: Path) -> None:
    paths = adapters(folder, KINDS[1], tmp_path)
    ensemble = Ensemble.from_adapters(base(folder, KINDS[1]), paths, forward="stacked")
    with pytest.raises(ValueError, match="round a row by what the other rows hold: pass forward="):
        generate(ensemble, input_ids=IDS, weights=[0.5, 0.4], pad_token_id=0)


def test_dora_over_a_quantised_layer_is_refused(folder: Path, tmp_path: Path) -> None:
    """On a CPU bitsandbytes packs the weights anew at the first call: PEFT then reads others."""
    paths = adapters(folder, KINDS[2], tmp_path, use_dora=True)
    with pytest.raises(ValueError, match="cannot be stacked .*DoraLinearVariant"):
        Ensemble.from_adapters(base(folder, KINDS[2]), paths)
