"""Tables of launch configurations."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
from mod_fused.triton_kernels.configurations import (  # noqa: E402
    TABLE,
    Configuration,
    read_table,
    rows_together,
)

from mod_fused.call.checks import check_mixture  # noqa: E402


def test_a_file_replaces_the_entries_that_it_has(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"configurations": {"general, few rows": {"chunk": 2}}}))
    assert read_table(path) == {**TABLE, "general, few rows": Configuration(chunk=2)}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        '{"configurations": {"other rows": {}}}',
        '{"configurations": {"general, few rows": {"speed": 1}}}',
        '{"configurations": {"general, few rows": {"chunk": 0}}}',
        '{"configurations": {"general, few rows": {"threads": 96}}}',
        '{"configurations": {"general, few rows": {"filter_block": 512}}}',
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="table.json"):
        read_table(path)


@pytest.mark.parametrize(
    ("vocab", "rows", "phases", "programs", "expected"),
    # 3 tensors of 2 bytes, 40 MB over all phases, of which each has a group. 32 tasks a row.
    [
        (128256, 256, 6, 528, 8),
        (128256, 256, 2, 528, 25),
        (128256, 4, 2, 528, 4),
        (128256, 256, 6, 1000, 11),  # 192 tasks a row in all, half of them to do something
        (10_000_000, 9, 6, 96, 1),
    ],
)
def test_what_is_read_again_fits_the_cache_and_all_programs_have_work(
    vocab, rows, phases, programs, expected
):
    x = torch.empty((rows, vocab), dtype=torch.bfloat16, device="meta")
    mixing = check_mixture(x, [x, x], [0.6, 0.3], divergence="jsd")
    assert rows_together(mixing, rows, phases, 32, programs) == expected
