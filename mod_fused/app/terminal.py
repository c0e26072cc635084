"""Terminal output of the commands: rich on a terminal that has it, plain text everywhere else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from ..decoding.text import Decoder, GrowingText

Item = TypeVar("Item")
# Seconds until `working` prints: on a terminal, and where stderr should hold errors only.
PATIENCE, PATIENCE_ELSEWHERE = 1.0, 10.0


def _rich_console(stream: Any) -> Any:
    """A rich console on `stream`; None if that is no terminal or rich is not installed."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    # Model text is shown as it is: no [markup], no :emoji: names.
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def write(text: str, *, style: str | None = None, end: str = "\n") -> None:
    """Print and flush; `style` (a name of rich's) shows on a terminal only."""
    console = _rich_console(sys.stdout) if style else None
    if console is None:
        print(text, end=end, flush=True)
    else:
        console.print(text, style=style, end=end, soft_wrap=True)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, every column aligned to the left."""
    console = _rich_console(sys.stdout)
    if console is None:
        columns = zip(headers, *rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        for row in (headers, *rows):
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    from rich import box
    from rich.table import Table

    rich_table = Table(box=box.SIMPLE_HEAD)
    for header in headers:
        rich_table.add_column(header)
    for row in rows:
        rich_table.add_row(*row)
    console.print(rich_table)


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the `total` items under a progress bar on stderr (plain: a line after each tenth)."""
    console = _rich_console(sys.stderr)
    if console is not None:
        from rich.progress import track as rich_track

        yield from rich_track(items, description, total, console=console)
        return
    reported = 0
    for done, item in enumerate(items, start=1):
        yield item
        if 10 * done // total > reported:
            reported = 10 * done // total
            print(f"{description}: {done}/{total}", file=sys.stderr, flush=True)


@contextmanager
def working(description: str, patience: float | None = None) -> Iterator[None]:
    """Print the description on stderr if the work takes longer than `patience` seconds."""
    if patience is None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        patience = PATIENCE if terminal else PATIENCE_ELSEWHERE
    timer = threading.Timer(
        patience, lambda: print(f"{description} ...", file=sys.stderr, flush=True)
    )
    timer.daemon = True  # it never keeps the process alive
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TextStream:
    """A streamer for `mod_fused.generate` of one row. It prints the text that no later token can
    change, and the rest at the end: all of `GenerateOutput.texts[0]`."""

    def __init__(self, tokenizer: Any, style: str | None = None) -> None:
        self.style = style
        self._text = GrowingText(Decoder(tokenizer))
        self._shown = 0  # how many characters of the open text are printed
        self._in_prompt = True

    def put(self, tokens: Tensor) -> None:
        """The prompt [1, n] at first, then each token [1]."""
        if self._in_prompt:
            self._in_prompt = False
            return
        settled = self._text.add(int(tokens[0]))
        self._show(settled, len(settled))
        self._shown -= len(settled)
        self._show(self._text.open, self._text.lasting())

    def end(self) -> None:
        """Show what was held back."""
        self._show(self._text.open, len(self._text.open))

    def _show(self, text: str, end: int) -> None:
        if end > self._shown:
            write(text[self._shown : end], style=self.style, end="")
            self._shown = end
