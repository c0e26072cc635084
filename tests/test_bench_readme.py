"""The tables and pictures of the READMEs are what bench/results says."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is not installed

from bench import pictures, readme

README = readme.ROOT / "README.md"


def test_readmes_and_pictures_are_what_the_committed_results_say():
    assert readme.stale() == [], "python -m bench.readme"
    for file in readme.FILES:
        assert "<!-- bench: cpu -->" in file.read_text()


def test_a_changed_result_changes_the_block_and_nothing_else(tmp_path):
    result = json.loads((readme.RESULTS / "cpu.json").read_text())
    for row in result["rows"]:
        row["other_cores"] = 0.0
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    before = readme.rewritten(README.read_text(), README, tmp_path)
    row = next(r for r in result["rows"] if (r["dtype"], r["vocab"]) == ("bfloat16", 128256))
    row["timings"]["cpu"]["median_us"], row["other_cores"] = 123456.0, 0.5
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    after = readme.rewritten(before, README, tmp_path)
    new, old = (set(x.split("\n")) for x in (after, before))
    assert any("| 123456 \\* |" in line for line in new - old)
    assert "other processes were busy" in after and "other processes were busy" not in before
    changed = {line.split(" |")[0] for line in new ^ old}
    assert changed == {f"| {row['divergence']}", next(x for x in new - old if "`python" in x)} | {
        next(x for x in old - new if "`python" in x)
    }
    assert readme.stale([README], tmp_path) == ["README.md"]


def test_results_that_are_not_there_are_said_to_be_missing(tmp_path):
    text = "before\n<!-- bench: cpu -->\nold\n<!-- /bench -->\nafter\n"
    made = readme.rewritten(text, README, tmp_path)
    assert "Not measured yet: `python -m bench.run cpu --out bench/results`." in made
    assert made.startswith("before\n<!-- bench: cpu -->\n") and "old" not in made
    assert made.endswith("<!-- /bench -->\nafter\n")


@pytest.mark.parametrize(
    "text", ["<!-- bench: nonsense -->\n<!-- /bench -->\n", "<!-- bench: cpu -->\n"]
)
def test_unknown_and_unended_blocks_are_refused(text):
    with pytest.raises(ValueError, match="README.md has"):
        readme.rewritten(text, README)


def test_a_picture_is_stale_until_it_is_drawn_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def line(figure, result):
        figure.subplots().plot([row["timings"]["cpu"]["median_us"] for row in result["rows"]])

    monkeypatch.setattr(pictures, "PICTURES", {"cpu": line})
    shutil.copy(readme.RESULTS / "cpu.json", tmp_path)
    (picture,) = pictures.stale(tmp_path)
    pictures.draw(picture)
    assert picture == tmp_path / "cpu.svg" and "<svg" in picture.read_text()
    assert pictures.stale(tmp_path) == []
    text = readme.rewritten("<!-- bench: cpu -->\n<!-- /bench -->\n", README, tmp_path)
    assert "![cpu](bench/results/cpu.svg)" in text
    (tmp_path / "cpu.json").write_text((tmp_path / "cpu.json").read_text() + " ")
    assert pictures.stale(tmp_path) == [picture]
