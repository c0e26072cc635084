"""Models that are not where the prompts are: offloaded weights, and a device of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mod_fused import Ensemble, generate
from mod_fused.decoding.model_state import CausalLMState

accelerate = pytest.importorskip("accelerate")

IDS = torch.tensor([[3, 4, 5, 6], [0, 0, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def decoded(models: list[Any]) -> Any:
    options: dict[str, Any] = {"weights": [0.7], "seed": 1, "max_new_tokens": 5}
    return generate(
        Ensemble(models), input_ids=IDS, attention_mask=MASK, num_return_sequences=2, **options
    )


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_draw_the_same_tokens(where: str, tmp_path: Path) -> None:
    def models() -> list[Any]:
        return [tiny.llama(0, eos=None), tiny.gpt2(1, eos=None)]

    expected = decoded(models())
    away = models()
    for place, model in enumerate(away):
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
        else:
            accelerate.disk_offload(model, str(tmp_path / str(place)), execution_device="cpu")
        assert model.get_input_embeddings().weight.device.type == "meta"
    assert Ensemble(away).device == torch.device("cpu")
    out = decoded(away)
    assert torch.equal(out.tokens, expected.tokens)
    torch.testing.assert_close(out.logprobs, expected.logprobs)


def test_inputs_go_to_a_models_device_and_its_logits_to_the_prompts() -> None:
    # The meta device stands for a second one: it has no values, but it refuses those of others.
    model = tiny.llama(0).to("meta")
    model.set_attn_implementation("eager")  # the others read the mask on the host
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs), with_kwargs=True)
    state = CausalLMState(model, "policy 1", IDS, MASK, True)
    moved: list[torch.device] = []
    state.home = "meta"  # type: ignore[assignment]  # nothing leaves the meta device
    for tokens in (None, torch.tensor([4, 5])):
        moved.append(state.step(tokens).device)
        state.select(torch.tensor([1, 0]))
    assert [device.type for device in moved] == ["meta", "meta"]
    for call in seen:
        for name in ("input_ids", "attention_mask", "position_ids"):
            assert call[name].device.type == "meta"
    state.home = torch.device("cpu")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        state.step(torch.tensor([4, 5]))  # back to the prompts' device, were there values


def test_prompts_are_placed_and_logits_mixed_where_the_first_language_model_is() -> None:
    away = tiny.llama(1).to("meta")
    assert Ensemble([tiny.llama(0), away]).device == torch.device("cpu")
    assert Ensemble([tiny.bigram(0), away, tiny.llama(0)]).device == torch.device("meta")
    assert Ensemble([tiny.bigram(0)]).device is None
    with pytest.raises(ValueError, match="policy 1 is on the meta device: its weights"):
        Ensemble([tiny.llama(0), away]).start([IDS, IDS], [None, None])
