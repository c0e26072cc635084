"""`mod-fused`: the parser of all commands, and the exit codes."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from . import demo, doctor, generate, sweep, tune
from .models import mixture_options
from .options import Parser


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = Parser(
        prog="mod-fused",
        description="multi-objective decoding with several models",
        epilog="MOD_FUSED_DEBUG=1 in the environment shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"mod_fused {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    mixture = mixture_options()
    demo.add_options(commands)
    generate.add_options(commands, mixture)
    sweep.add_options(commands, mixture)
    tune.add_options(commands)
    doctor.add_options(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mod-fused` and return the exit code: that of the command; 2 with one line on stderr for
    an error; 130 after Ctrl-C; 141 when the reader of the output has closed it. With
    MOD_FUSED_DEBUG in the environment errors are raised, with their traceback.

    Args:
        argv: the arguments; None: those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # do not fail at a character that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one package about another
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            args = build_parser().parse_args(argv)
            code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Discard what is still buffered: at its exit Python would fail to flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("MOD_FUSED_DEBUG"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"mod-fused: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _show_warning(message: Warning | str, *where: Any) -> None:
    print(f"mod-fused: {' '.join(str(message).split())}", file=sys.stderr)
