"""`python -m bench.readme`: makes the README's table, the reports and the pictures anew from the
committed JSON under bench/results.

The table stands between `<!-- bench: NAME -->` and `<!-- /bench -->` and comes from
results/NAME.json. A picture carries the digest of its JSON, because two versions of matplotlib do
not give the same bytes. `--check` writes nothing; the exit status says whether all is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import report
from .alignment import plots, tables
from .case import Case, Picture
from .cases import CASES, adapters
from .gpu import predict_report
from .real import tables as real

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
FILES = (ROOT / "README.md",)
_BLOCK = re.compile(
    r"(?P<head>^<!-- bench: (?P<name>\S+) -->\n).*?(?P<tail>^<!-- /bench -->)", re.S | re.M
)
#: By the stem of the JSON and of the picture: the function that plots a result into a figure.
PICTURES: dict[str, dict[str, Picture]] = (
    {
        name: {name: case.picture}
        for name, case in CASES.items()
        if isinstance(case, Case) and case.picture
    }
    | plots.PICTURES
    | {"real": real.PICTURES}
)
#: By the stem of the JSON: the function that makes the report; a case has its own.
REPORTS: dict[str, Callable[[report.Result], str]] = {
    "alignment": tables.alignment,
    "control": tables.control,
    "predicted": predict_report.markdown,
    "real": real.report,
    "real_cost": report.plain,
    "rules": tables.rules,
    "sizes": tables.sizes,
    "vllm": report.plain,
    "vllm_soak": report.plain,
}
#: By the name of a block, the path of its JSON: fields that select the rows, a tuple any of its
#: values, and the columns.
BLOCKS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "cpu": (
        {"dtype": "bfloat16", "vocab": 128256, "threads": 1},
        {"divergence": "divergence", "B": "batch", "µs": "cpu µs"}
        | {"torch.compile / ours": "compile / ours", "eager / ours": "eager / ours"}
        | {"ours / floor": "ours / floor"},
    ),
    "real/real_cost": (
        {"contestant": (adapters.ONE, "stacked, simplex", "separate, simplex", adapters.AUTHORS)},
        {"B": "B", "decoder": "contestant", "tokens / s": "tokens / s"}
        | {"step / one model's": "step / one model"},
    ),
}


def _origin(result: report.Result, marked: bool) -> str:
    """The line under a table: command and machine; `marked` if it has disturbed rows."""
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['instruction set']}"
    out = f"`{result['command']}`; {where}, torch {machine['torch']}, commit {machine['commit']}."
    return out + " \\*: other processes were busy meanwhile." * marked


def _fits(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def block(name: str, file: Path, results: Path = RESULTS) -> str:
    """The text of a block in a file: the table, its command and machine.

    Raises:
        ValueError: if there is no such block.
    """
    if name not in BLOCKS:
        raise ValueError(f"{file.name} has a block {name!r}, expected one of {list(BLOCKS)}")
    result, (wanted, columns) = report.load(results / f"{name}.json"), BLOCKS[name]
    rows = [row for row in result["rows"] if all(_fits(row[k], x) for k, x in wanted.items())]
    table = report.table(rows, columns)
    return f"{table}\n\n{_origin(result, marked=any(map(report.disturbed, rows)))}\n"


def rewritten(text: str, file: Path, results: Path = RESULTS) -> str:
    """A README's text with all its blocks made anew.

    Raises:
        ValueError: if a block has no results or does not end.
    """

    def made(match: re.Match[str]) -> str:
        return match["head"] + block(match["name"], file, results) + match["tail"]

    new, count = _BLOCK.subn(made, text)
    if count != (begun := len(re.findall("^<!-- bench: ", text, re.M))):
        raise ValueError(f"{file.name} has {begun} blocks, expected as many ends, got {count}")
    return new


def digest(source: Path) -> str:
    """The digest that a picture of this JSON must carry."""
    return "sha256 " + hashlib.sha256(source.read_bytes()).hexdigest()


def draw(picture: Path, source: Path) -> None:
    """Plot a JSON, in few colours, because the picture is kept in the repository.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from PIL import Image, PngImagePlugin

    figure = Figure(layout="constrained")
    PICTURES[source.stem][picture.stem](figure, report.load(source))
    figure.savefig(buffer := io.BytesIO(), dpi=72)
    about = PngImagePlugin.PngInfo()
    about.add_text("Description", digest(source))
    image, method = Image.open(buffer).convert("RGB"), Image.Quantize.MAXCOVERAGE
    few = image.quantize(64, method=method, dither=Image.Dither.NONE)
    few.save(picture, optimize=True, pnginfo=about)


def sources(results: Path = RESULTS) -> list[Path]:
    """All JSON of a folder."""
    return sorted(results.rglob("*.json"))


def reports(sources: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Each report beside a JSON: its file, and the text that it should hold."""
    for source in sources:
        result = report.load(source)
        case = CASES.get(result.get("case", ""))
        made = case.report if case else REPORTS.get(source.stem)
        if made is not None:
            text = made(result)
            for name in PICTURES.get(source.stem, ()):
                text += f"\n![{name}]({name}.png)\n"
            yield source.with_suffix(".md"), text


def stale_pictures(sources: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Pictures that are missing or were drawn from other results, each with its JSON."""
    for source in sources:
        for name in PICTURES.get(source.stem, ()):
            picture = source.with_name(f"{name}.png")
            if not picture.exists() or digest(source).encode() not in picture.read_bytes():
                yield picture, source


def texts(files: Sequence[Path] = FILES, results: Path = RESULTS) -> dict[Path, str]:
    """What the READMEs and the reports should hold."""
    return {f: rewritten(f.read_text(), f, results) for f in files} | dict(
        reports(sources(results))
    )


def stale(files: Sequence[Path] = FILES, results: Path = RESULTS) -> list[str]:
    """Names of READMEs, reports and pictures that differ from the results."""
    wanted = texts(files, results).items()
    old = [f.name for f, text in wanted if not f.exists() or f.read_text() != text]
    return old + [picture.name for picture, _ in stale_pictures(sources(results))]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check. Returns 0, or 1 if --check finds something stale."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, report what is stale")
    args = parser.parse_args(argv)
    old = stale()
    for name in old:
        print(f"{name} is not what bench/results says" + ": python -m bench.readme" * args.check)
    if args.check:
        return int(bool(old))
    for file, text in texts().items():
        file.write_text(text)
    for picture, source in stale_pictures(sources()):
        draw(picture, source)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
