"""Shared by the commands: the options of a mixture, the models they name, conversations, files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import world
from ..call.checks import NORMALIZERS
from ..decoding.ensemble import Ensemble
from ..divergence import DIVERGENCES
from . import options, prompt_input
from .options import DTYPES, Parser, UsageError
from .terminal import working
from .trade_off import picture_endings


def own_options(group: Any) -> None:
    """Add the options that name models of the caller's."""
    group.add_argument(
        "--reference",
        "--model",
        type=options.model,
        metavar="PATH",
        help="folder or hub name of the reference",
    )
    group.add_argument(
        "--policy",
        type=options.model,
        metavar="PATH",
        action="append",
        default=[],
        help="folder or hub name of a policy; repeat it for several",
    )
    group.add_argument(
        "--adapters",
        type=options.model,
        metavar="PATH",
        nargs="+",
        action="extend",
        default=[],
        help="instead of --policy: LoRA adapters (PEFT) of the reference, with its weights once",
    )
    group.add_argument("--device", type=options.device, help="cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=DTYPES, help="of the models' weights")


def mixture_options() -> argparse.ArgumentParser:
    """The options that generate and sweep have in common."""
    mixture = Parser(add_help=False)
    group = mixture.add_argument_group("models (default: the embedded ones)")
    own_options(group)
    group.add_argument(
        "--objectives",
        type=options.names,
        metavar="A,B",
        help="embedded policies to use: helpful, harmless, humorous (default: all)",
    )
    group = mixture.add_argument_group("mixture")
    group.add_argument(
        "--divergence",
        type=options.divergence,
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
        "--plausibility",
        type=options.plausibility,
        default="auto",
        metavar="P",
        help="exclude tokens that the reference finds less likely than P times its most likely"
        " one; off: none (default: 0.001, off for reverse_kl)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=options.whole(1),
        default=64,
        metavar="N",
        help="the most tokens of a response (default: 64)",
    )
    group.add_argument("--seed", type=options.whole(0), default=0, help="(default: 0)")
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
        type=options.names,
        metavar="A,B",
        help="scorers: helpful, harmless, humorous, or folders",
    )
    group.add_argument(
        "--candidates",
        type=options.whole(1),
        metavar="K",
        help="score the reference's K most likely tokens alone (needed for scalar scorers)",
    )

    return mixture


def policy_names(args: argparse.Namespace) -> list[str]:
    """A name for each policy of the arguments: its objective, or policy_1, policy_2, ...

    The list is empty where no policy is named and --values or --best-of steer the reference.
    """
    if own := own_policies(args):
        if args.objectives:
            raise UsageError(
                "--objectives chooses embedded policies: leave it out with --policy and --adapters"
            )
        return [f"policy_{i}" for i in range(1, len(own) + 1)]
    if not args.objectives and (args.values or getattr(args, "best_of", None)):
        return []
    if args.reference:
        raise UsageError("--reference needs at least one --policy, or --adapters")
    names = args.objectives or list(world.OBJECTIVES)
    if not set(names) <= set(world.OBJECTIVES) or len(set(names)) < len(names):
        raise UsageError(
            f"--objectives takes different ones of {', '.join(world.OBJECTIVES)}, "
            f"got {', '.join(names)}"
        )
    return names


def load_models(args: argparse.Namespace) -> Ensemble:
    """The models that the arguments name: own ones, or embedded ones."""
    quiet_transformers()
    # Without trust_remote_code transformers would ask on the terminal.
    given = {"device": args.device, "dtype": args.dtype, "trust_remote_code": False}
    if is_own(args):
        own = own_policies(args)
        with working("loading " + ", ".join(filter(None, [args.reference, *own]))):
            load: Any = Ensemble.from_adapters if args.adapters else Ensemble.from_pretrained
            return load(args.reference, own, **given)
    use_one_thread()
    return Ensemble.embedded(policy_names(args), **given)


def own_policies(args: argparse.Namespace) -> list[str]:
    """The folders or hub names of the caller's policies; [] where there are none."""
    if args.adapters and args.policy:
        raise UsageError("--adapters are the policies: leave out --policy")
    if args.adapters and not args.reference:
        raise UsageError("--adapters need --reference, the base model that they were made for")
    return args.policy or args.adapters


def is_own(args: argparse.Namespace) -> bool:
    """Whether the models are the caller's, not the embedded ones."""
    return bool(own_policies(args) or args.reference)


def check_chat(args: argparse.Namespace) -> None:
    """Refuse options of conversations that do not fit the other options."""
    messages = getattr(args, "messages", None) is not None
    if not is_own(args) and (args.chat or messages or args.system is not None):
        raise UsageError(
            "--chat, --messages and --system go with own models: the embedded ones know one form "
            "of conversation, and questions are put into it"
        )
    if args.system is not None and not args.chat and not messages:
        raise UsageError("--system goes with --chat or --messages")
    if args.chat and args.command == "sweep" and args.prompt_file is None:
        raise UsageError("--chat needs --prompt-file")


def with_roles(args: argparse.Namespace, prompts: Sequence[Any]) -> list[Any]:
    """Apply --chat and --system to prompts: texts, or lists of messages."""
    if args.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    if args.system is None:
        return list(prompts)
    system = {"role": "system", "content": prompt_input.argument(args.system, "--system")}
    for number, messages in enumerate(prompts, start=1):
        if messages[0]["role"] == "system":
            raise UsageError(f"--system: conversation {number} has a system message already")
    return [[system, *messages] for messages in prompts]


def as_conversations(prompts: Sequence[str]) -> list[str]:
    """Put bare questions into the only form of conversation that the embedded models know."""
    return [p if p.endswith("\nAssistant:") else world.format_prompt(p) for p in prompts]


def use_one_thread() -> None:
    """Set one thread: the embedded models are so small that more threads are slower."""
    torch.set_num_threads(1)


def quiet_transformers() -> None:
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading the models will say what is missing
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_files(*files: Path, picture: Path) -> None:
    """Refuse files now that could not be written at the end."""
    for file in files:
        if not file.parent.is_dir() or file.is_dir():
            raise UsageError(f"cannot write {file}: expected a file in a folder that exists")
    endings = picture_endings()
    if endings and picture.suffix[1:].lower() not in endings:
        raise UsageError(f"cannot draw {picture}: expected a name ending in .{', .'.join(endings)}")
