"""README and documentation: the Python runs as it stands, links lead somewhere, no variable of the
environment is missing. `make docs` checks the links inside docs/."""

import ast
import re
from pathlib import Path

import pytest
import torch

from mod_fused.divergence import DIVERGENCES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "bench/README.md", "csrc/README.md")]
OTHERS.append(ROOT / "triton_kernels/README.md")


def blocks(language):
    """(where, code) of every block of a language: ```python stands alone, ```py needs what the
    reader brings."""
    return [
        pytest.param(code, id=f"{page.relative_to(ROOT)}:{number}")
        for page in PAGES
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        )
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_that_stands_alone_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("code", blocks("py"))
def test_python_that_needs_more_says_so_and_parses(code):
    assert re.match(r"# with .* of your own", code)
    ast.parse(code)


@pytest.mark.parametrize("page", [PAGES[0], *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_on_environment_variables_has_all_and_no_others():
    folders = ("mod_fused", "triton_kernels", "csrc", "bench", "tests")
    files = [ROOT / "setup.py", *(f for name in folders for f in (ROOT / name).rglob("*.*"))]
    sources = [f.read_text() for f in files if f.suffix in (".py", ".cpp", ".h")]
    named = {name for text in sources for name in re.findall(r'"(MOD_FUSED_[A-Z_]+)"', text)}
    macros = {name for text in sources for name in re.findall(r"defined\((MOD_FUSED_\w+)\)", text)}
    page = (ROOT / "docs/environment.md").read_text()
    assert set(re.findall(r"`(MOD_FUSED_[A-Z_]+)`", page)) == named - macros


def test_the_readmes_table_has_every_divergence():
    table = PAGES[0].read_text().partition("| `divergence=` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([a-z_]+)", table, re.MULTILINE)
    assert rows == [name.split(":")[0] for name in DIVERGENCES]
