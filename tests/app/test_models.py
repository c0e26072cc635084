"""The models that the command line's arguments name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mod_fused import world
from mod_fused.cli import main


def test_adapters_of_the_reference_answer_as_policies_with_bases_of_their_own(
    capsys: Any, tmp_path: Any
) -> None:
    peft = pytest.importorskip("peft")
    base = str(world.checkpoint("reference"))
    adapters = [str(tmp_path / "a"), str(tmp_path / "b")]
    for seed, path in enumerate(adapters):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(path)
    argv = ["generate", "--reference", base, "--weights", "1.5,-0.4", "--seed", "3", "--json"]
    argv += ["--prompt", "User: How do I bake bread?\nAssistant:"]
    answers = []
    one, other = adapters
    together, repeated = ["--adapters", one, other], ["--adapters", one, "--adapters", other]
    for given in (together, repeated, ["--policy", one, "--policy", other]):
        assert main([*argv, *given]) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] == answers[1]
    assert main([*argv, "--adapters", *adapters[::-1]]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] != answers[0]
