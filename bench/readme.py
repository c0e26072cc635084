"""`python -m bench.readme`: rewrites the tables and pictures of the READMEs from bench/results/.

A table stands between `<!-- bench: NAME -->` and `<!-- /bench -->`; NAME is a key of `BLOCKS`,
whose function makes the text from the committed JSON of its case. Pictures lie beside the JSON and
carry its digest, so that a stale one shows. `--check` writes nothing; the exit status says whether
all is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import pictures, tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
FILES = (ROOT / "README.md", ROOT / "bench/README.md")
_BLOCK = re.compile(
    r"(?P<head>^<!-- bench: (?P<name>\S+) -->\n).*?(?P<tail>^<!-- /bench -->)", re.S | re.M
)

#: By the name of a block: the results that it is made from, and how.
BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "cpu": ("cpu", tables.cpu),
    "cpu_memory": ("cpu_memory", tables.memory),
    "scaling": ("scaling", tables.scaling),
    "filters": ("filters", tables.filters),
    "distributions": ("distributions", tables.distributions),
    "decoder": ("decoder", tables.decoder),
    "decoder_1b": ("decoder_1b", tables.decoder),
    "host": ("host", tables.host),
}


def block(name: str, file: Path, results: Path = RESULTS) -> str:
    """The text of a block in a file: table, picture, and where they come from.

    Raises:
        ValueError: if there is no such block.
    """
    if name not in BLOCKS:
        raise ValueError(f"{file.name} has a block {name!r}, expected one of {list(BLOCKS)}")
    stem, table = BLOCKS[name]
    source = results / f"{stem}.json"
    if not source.exists():
        words = stem.replace("_memory", " --memory")
        return f"Not measured yet: `python -m bench.run {words} --out bench/results`.\n"
    result = json.loads(source.read_text())
    shown = table(result)
    parts = [shown, tables.origin(result, marked="\\*" in shown)]
    if stem in pictures.PICTURES:
        place = "bench/results" if file.parent == ROOT else "results"
        parts.insert(1, f"![{stem}]({place}/{stem}.svg)")
    return "\n\n".join(parts) + "\n"


def rewritten(text: str, file: Path, results: Path = RESULTS) -> str:
    """A README's text with all its blocks made anew.

    Raises:
        ValueError: if a block is unknown or does not end.
    """

    def made(match: re.Match[str]) -> str:
        return match["head"] + block(match["name"], file, results) + match["tail"]

    new, count = _BLOCK.subn(made, text)
    if count != (begun := len(re.findall("^<!-- bench: ", text, re.M))):
        raise ValueError(f"{file.name} has {begun} blocks, expected as many ends, got {count}")
    return new


def stale(files: Sequence[Path] = FILES, results: Path = RESULTS) -> list[str]:
    """Names of READMEs and pictures that are not what the results say."""
    old = [f.name for f in files if rewritten(f.read_text(), f, results) != f.read_text()]
    return old + [picture.name for picture in pictures.stale(results)]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or check; 0, or 1 if --check finds something stale."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing, report what is stale")
    args = parser.parse_args(argv)
    if not args.check:
        for file in FILES:
            file.write_text(rewritten(file.read_text(), file))
        for picture in pictures.stale(RESULTS):
            pictures.draw(picture)
            print(f"drew {picture.relative_to(ROOT)}")
        return 0
    for name in (old := stale()):
        print(f"{name} is not what bench/results says: python -m bench.readme")
    return int(bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
