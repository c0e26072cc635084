"""The Python of the README's section on value guidance runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_code_on_value_guidance_runs(capsys):
    section = README.split("## Value-guided decoding\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert len(names["out"].texts) == len(names["best"].texts) == 2
    assert bool(names["best"].valid.all()) and bool((names["best"].kl_bound > 0).all())
    assert torch.isfinite(names["out"].logprobs).all()
