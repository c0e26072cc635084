"""The tables, reports and pictures are what bench/results says."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

from bench import readme, report

README = readme.ROOT / "README.md"


def test_readmes_reports_and_pictures_are_what_the_committed_results_say():
    assert readme.stale() == [], "python -m bench.readme"
    assert "<!-- bench: cpu -->" in README.read_text()
    assert len(list(readme.reports(readme.sources()))) >= 8


def test_a_changed_result_changes_the_block_and_nothing_else(tmp_path):
    result = report.load(readme.RESULTS / "cpu.json")
    for row in result["rows"]:
        row["other_cores"] = 0.0
    report.save(result, tmp_path / "cpu.json")
    others = [name for name in readme.BLOCKS if f"<!-- bench: {name} -->" in README.read_text()]
    others.remove("cpu")
    for name in others:
        other = report.load(readme.RESULTS / f"{name}.json")
        other["rows"] = [row | {"other_cores": 0.0} for row in other["rows"]]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        report.save(other, tmp_path / f"{name}.json")
    before = readme.rewritten(README.read_text(), README, tmp_path)
    row = next(r for r in result["rows"] if (r["dtype"], r["vocab"]) == ("bfloat16", 128256))
    row["timings"]["cpu"][0], row["other_cores"] = 123456.0, 0.5
    report.save(result, tmp_path / "cpu.json")
    after = readme.rewritten(before, README, tmp_path)
    new, old = (set(x.split("\n")) for x in (after, before))
    assert any("| 123456 \\* |" in line for line in new - old)
    assert "other processes were busy" in after and "other processes were busy" not in before
    changed = {line.split(" |")[0] for line in new ^ old}
    assert changed == {f"| {row['divergence']}", next(x for x in new - old if "`python" in x)} | {
        next(x for x in old - new if "`python" in x)
    }
    reports = [f"{Path(name).name}.md" for name in others]
    assert readme.stale([README], tmp_path) == ["README.md", "cpu.md", *reports]


@pytest.mark.parametrize(
    "text", ["<!-- bench: nonsense -->\n<!-- /bench -->\n", "<!-- bench: cpu -->\n"]
)
def test_unknown_and_unended_blocks_are_refused(text):
    with pytest.raises(ValueError, match="README.md has"):
        readme.rewritten(text, README)


def test_a_picture_is_stale_until_it_is_drawn_from_the_results(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def line(figure, result):
        figure.subplots().plot([row["timings"]["cpu"][0] for row in result["rows"]])

    monkeypatch.setattr(readme, "PICTURES", {"cpu": {"cpu": line}})
    shutil.copy(readme.RESULTS / "cpu.json", tmp_path)
    ((picture, source),) = readme.stale_pictures([tmp_path / "cpu.json"])
    readme.draw(picture, source)
    assert picture == tmp_path / "cpu.png" and picture.stat().st_size < 20_000
    assert list(readme.stale_pictures([tmp_path / "cpu.json"])) == []
    ((_, text),) = readme.reports([source])
    assert text.endswith("\n![cpu](cpu.png)\n")
    source.write_text(source.read_text() + " ")
    assert [p for p, _ in readme.stale_pictures([tmp_path / "cpu.json"])] == [picture]
