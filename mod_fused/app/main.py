"""The command `mod-fused`: its arguments, and how an error ends it. What it does: commands.py."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..call.checks import NORMALIZERS
from . import options as cli_types
from .doctor import DIVERGENCES
from .generate import run_generate
from .models import UsageError, run_demo, run_doctor, run_tune
from .scorers import STRENGTHS, numbers
from .sweep import run_sweep

DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = _Parser(
        prog="mod-fused",
        description="multi-objective decoding with several models",
        epilog="MOD_FUSED_DEBUG=1 in the environment shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"mod_fused {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    mixture = _mixture()
    _add_demo(commands)
    _add_generate(commands, mixture)
    _add_sweep(commands, mixture)
    _add_tune(commands)
    doctor = commands.add_parser("doctor", help="versions, devices, backends and a self-check")
    doctor.set_defaults(run=run_doctor)
    return parser


def _mixture() -> argparse.ArgumentParser:
    """What generate and sweep have in common."""
    mixture = _Parser(add_help=False)
    group = mixture.add_argument_group("models (default: the embedded ones)")
    group.add_argument(
        "--reference",
        type=cli_types.model,
        metavar="PATH",
        help="folder or hub name of the reference",
    )
    group.add_argument(
        "--policy",
        type=cli_types.model,
        metavar="PATH",
        action="append",
        default=[],
        help="folder or hub name of a policy; repeat it for several",
    )
    group.add_argument(
        "--objectives",
        type=cli_types.names,
        metavar="A,B",
        help="embedded policies to use: helpful, harmless, humorous (default: all)",
    )
    group.add_argument("--device", type=cli_types.device, help="cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=DTYPES, help="of the models' weights")
    group = mixture.add_argument_group("mixture")
    group.add_argument(
        "--divergence",
        type=cli_types.divergence,
        default="reverse_kl",
        metavar="NAME",
        help=f"{', '.join(DIVERGENCES)} (default: reverse_kl)",
    )
    group.add_argument(
        "--normalizer",
        choices=NORMALIZERS,
        default="exact",
        help="zero: the paper's formula as printed, Z = 0 (default: exact)",
    )
    group.add_argument(
        "--sequence-history",
        action="store_true",
        help="weigh the whole response so far, not the next token alone",
    )
    group.add_argument(
        "--max-new-tokens",
        type=cli_types.whole(1),
        default=64,
        metavar="N",
        help="the most tokens of a response (default: 64)",
    )
    group.add_argument("--seed", type=cli_types.whole(0), default=0, help="(default: 0)")
    group = mixture.add_argument_group("conversations (with own models)")
    group.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, rendered by each model's own chat template",
    )
    group.add_argument("--system", metavar="TEXT", help="a system message in front")
    group = mixture.add_argument_group(
        "value guidance (of the reference alone, unless --objectives or --policy names policies)"
    )
    group.add_argument(
        "--values",
        type=cli_types.names,
        metavar="A,B",
        help="scorers: helpful, harmless, humorous, or folders",
    )
    group.add_argument(
        "--candidates",
        type=cli_types.whole(1),
        metavar="K",
        help="score the reference's K most likely tokens alone (needed for scalar scorers)",
    )

    return mixture


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="steer the embedded models, draw their trade-off")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("mod_fused_demo.png"),
        metavar="FILE",
        help="the picture (default: mod_fused_demo.png)",
    )
    demo.add_argument("--seed", type=cli_types.whole(0), default=0, help="(default: 0)")
    demo.add_argument(
        "--divergence",
        type=cli_types.divergence,
        default="reverse_kl",
        metavar="NAME",
        help=f"{', '.join(DIVERGENCES)} (default: reverse_kl)",
    )
    demo.add_argument("--quick", action="store_true", help="fewer questions and weights")
    demo.set_defaults(run=run_demo)


def _add_generate(commands: Any, mixture: argparse.ArgumentParser) -> None:
    generate = commands.add_parser("generate", parents=[mixture], help="answer prompts")
    generate.add_argument(
        "--weights",
        nargs="+",
        metavar="W",
        help="one number per policy, any sign (default: equal, summing to 1); with commas and a"
        " minus sign in front write --weights=-1,2,0",
    )
    generate.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="repeat it for several; default: the lines of standard input",
    )
    generate.add_argument(
        "--messages",
        metavar="FILE",
        help='whole conversations, JSON Lines of [{"role": ..., "content": ...}, ...] or of'
        ' {"messages": [...]}; - is standard input',
    )
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--min-p", type=float, metavar="P")
    generate.add_argument(
        "--strength",
        type=numbers,
        metavar="L",
        help="of --values: one number, or one per scorer (default: 1)",
    )
    generate.add_argument(
        "--best-of",
        type=cli_types.whole(1),
        metavar="K",
        help="draw K continuations and keep the best by --values or --score",
    )
    generate.add_argument(
        "--block-length",
        type=cli_types.whole(1),
        metavar="L",
        help="choose after every L tokens (default: once, among whole responses)",
    )
    generate.add_argument(
        "--score",
        type=cli_types.names,
        metavar="A,B",
        help="choose by the sum of these rewards of the embedded world",
    )
    generate.add_argument("--greedy", action="store_true", help="the most likely token each time")
    generate.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line and prompt; infinite and undefined numbers are null",
    )
    generate.set_defaults(run=run_generate)


def _add_sweep(commands: Any, mixture: argparse.ArgumentParser) -> None:
    sweep = commands.add_parser(
        "sweep", parents=[mixture], help="rewards over a grid of weights, as CSV and picture"
    )
    sweep.add_argument(
        "--points",
        type=cli_types.whole(2),
        default=5,
        metavar="K",
        help="weights per edge of the simplex (default: 5: 0, 1/4, ..., 1)",
    )
    sweep.add_argument(
        "--prompts",
        type=cli_types.whole(1),
        default=100,
        metavar="N",
        help="held-out prompts of the embedded world (default: 100)",
    )
    sweep.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="own prompts, one a line (needed with own models)",
    )
    sweep.add_argument(
        "--samples",
        type=cli_types.whole(1),
        default=1,
        metavar="N",
        help="responses per prompt and weight (default: 1)",
    )
    sweep.add_argument(
        "--batch-size",
        type=cli_types.whole(1),
        default=256,
        metavar="N",
        help="responses decoded at the same time (default: 256)",
    )
    sweep.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="function of (prompt, response) for own models, one per policy; without"
        " them the table shows log pi_i/pi_ref, the policies' implicit reward",
    )
    sweep.add_argument(
        "--strength",
        type=numbers,
        metavar="L,L",
        help="of --values, a grid; each number counts for all scorers"
        f" (default: {','.join(f'{x:g}' for x in STRENGTHS)})",
    )
    sweep.add_argument(
        "--csv",
        type=Path,
        default=Path("mod_fused_sweep.csv"),
        metavar="FILE",
        help="each point is written as soon as it is finished; FILE.points is what --resume needs",
    )
    sweep.add_argument(
        "--resume", action="store_true", help="go on with an interrupted sweep of the same options"
    )
    sweep.add_argument("--picture", type=Path, default=Path("mod_fused_sweep.png"), metavar="FILE")
    sweep.set_defaults(run=run_sweep)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="measure launch configurations of the Triton kernels")
    tune.add_argument("--vocab-size", type=cli_types.whole(1), required=True, metavar="V")
    tune.add_argument(
        "--policies", type=cli_types.whole(1), default=2, metavar="M", help="(default: 2)"
    )
    tune.add_argument("--dtype", choices=DTYPES[1:], default="bfloat16", help="of the logits")
    tune.add_argument(
        "--divergences",
        type=cli_types.each(cli_types.divergence),
        default=["reverse_kl", "jsd"],
        metavar="A,B",
        help="(default: reverse_kl,jsd)",
    )
    tune.add_argument(
        "--batch-sizes",
        type=cli_types.each(cli_types.whole(1)),
        default=[1, 64],
        metavar="A,B",
        help="few rows and many have configurations of their own (default: 1,64)",
    )
    tune.add_argument("--top-k", type=int, metavar="K", help="tune the filters too")
    tune.add_argument("--top-p", type=float, metavar="P", help="tune the filters too")
    tune.add_argument("--min-p", type=float, metavar="P", help="tune the filters too")
    tune.add_argument(
        "--minutes",
        type=cli_types.minutes,
        default=10.0,
        metavar="N",
        help="for everything, compilation included (default: 10)",
    )
    tune.add_argument(
        "--out",
        type=Path,
        default=Path("mod_fused_table.json"),
        metavar="FILE",
        help="(default: mod_fused_table.json)",
    )
    tune.set_defaults(run=run_tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mod-fused`; returns the exit code, 2 with one line on stderr for bad arguments.

    130 after Ctrl-C, 141 when whoever read the output has closed it. With MOD_FUSED_DEBUG in the
    environment errors are raised, with their traceback.

    Args:
        argv: the arguments; None: those of the process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it lacks is no reason to end
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between other packages
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            args = build_parser().parse_args(argv)
            code = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The rest goes nowhere, or Python would complain about it at its end.
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
