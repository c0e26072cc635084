"""Importing the decoder says which transformers it was tested with; importing the op needs none."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from mod_fused.decoding.transformers_version import OLDEST, check_transformers_version

ROOT = Path(__file__).parents[2]


def test_every_way_to_the_decoder_refuses_too_old_a_version() -> None:
    code = """
import importlib, importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: "5.4.9" if name == "transformers" else found(name)
import mod_fused
for use in (
    lambda: mod_fused.generate,
    lambda: mod_fused.Ensemble,
    lambda: importlib.import_module("mod_fused.decoding.generate"),
):
    try:
        use()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    message = "mod_fused's decoder needs transformers >= 5.5, found 5.4.9"
    assert done.stdout.count(message) == 3, done.stderr


@pytest.mark.parametrize("version", ["5.5.0", "5.24.3", "5.24.0.dev0"])
def test_a_tested_version_is_taken_without_a_word(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers_version()


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0.dev0"])
def test_a_newer_version_is_a_warning(version: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.warns(UserWarning, match=f"transformers 5.5 to 5.24, found {version}"):
        check_transformers_version()


def test_the_extra_asks_for_the_oldest_version_that_is_tested() -> None:
    extra = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert extra is not None and extra[1] == ".".join(map(str, OLDEST))
    versions = re.search(r"^VERSIONS \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert versions is not None and versions[1] == f"{extra[1]}.0"
