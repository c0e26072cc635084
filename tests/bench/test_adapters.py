"""The case `adapters`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import run
from bench.cases import adapters

pytest.importorskip("peft")


def test_every_contestant_is_timed_and_weighed(tmp_path: Path) -> None:
    words = ["adapters", "--quick", "--dtypes", "float32", "--policies", "2", "--tokens", "3"]
    assert run.main([*words, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "adapters.md").read_text()
    result = json.loads((tmp_path / "adapters.json").read_text())
    fields = result["rows"]["fields"]
    rows = [dict(zip(fields, row, strict=True)) for row in result["rows"]["records"]]
    assert len(rows) == 10 and all(row["contestant"] in text for row in rows)
    assert rows[0]["step / one model"] == 1.0 and all(row["ms / step"] > 0 for row in rows)
    weights = {record[-2]: record[-1] for record in result["memory"]["records"]}
    assert weights["separate"] == pytest.approx(3 * weights["one model"])
    assert weights["one model"] < weights["stacked"] == pytest.approx(weights["PEFT by name"])


def test_a_contestant_that_draws_other_tokens_stops_the_run() -> None:
    def loop(*tokens: int) -> Any:
        return lambda prompts, count: ([1.0], torch.tensor([tokens] * 2))

    prompts = torch.zeros(1, 2, dtype=torch.int64)
    loops = {adapters.ONE: loop(9), "a": loop(1, 2), "b": loop(1, 2), "simplex": loop(3)}
    loops["one row"] = lambda prompts, count: ([1.0], torch.tensor([[1, 2], [1, 3]]))
    adapters._check(loops, prompts, exact=True)
    with pytest.raises(RuntimeError, match="c draws other tokens than a"):
        adapters._check(loops | {"c": loop(1, 3)}, prompts, exact=True)
    adapters._check(loops | {"c": loop(1, 3)}, prompts, exact=False)


def test_a_run_that_is_stopped_keeps_the_cells_that_are_through(tmp_path, monkeypatch) -> None:
    def rows(head: dict[str, Any], *_: Any) -> Any:
        if head["B"] == 3:
            raise KeyboardInterrupt
        yield head | {"contestant": "a", "ms / step": 1.0, "step / one model": 1.0}

    monkeypatch.setattr(adapters, "contestants", lambda *_: ({"a": None}, {"separate": 1}))
    monkeypatch.setattr(adapters, "timed", rows)
    words = ["adapters", "--quick", "--dtypes", "float32", "--policies", "2", "--batches", "1", "3"]
    assert run.main([*words, "4", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "adapters.json").read_text())
    assert len(result["rows"]["records"]) == 1
    assert "the run was stopped" in result["left_out"][0]
