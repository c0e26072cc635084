"""Tables of launch configurations."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from mod_fused.triton_kernels.configurations import TABLE, Configuration, read_table


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
