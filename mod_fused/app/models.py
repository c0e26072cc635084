"""What the commands demo, tune and doctor do with their arguments, and what all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import world
from ..decoding.ensemble import Ensemble
from . import demo, doctor, prompt_input, tune
from .terminal import working
from .trade_off import picture_endings


class UsageError(ValueError):
    """An argument that does not fit; its text is the one line that the user sees."""


def policy_names(args: argparse.Namespace) -> list[str]:
    """A name for each policy of the arguments: its objective, or policy_1, policy_2, ...

    None where the reference is guided, or chosen from, and no policy is named.
    """
    if args.policy:
        if args.objectives:
            raise UsageError("--objectives chooses embedded policies: leave it out with --policy")
        return [f"policy_{i}" for i in range(1, len(args.policy) + 1)]
    if not args.objectives and (args.values or getattr(args, "best_of", None)):
        return []
    if args.reference:
        raise UsageError("--reference needs at least one --policy")
    names = args.objectives or list(world.OBJECTIVES)
    if not set(names) <= set(world.OBJECTIVES) or len(set(names)) < len(names):
        raise UsageError(
            f"--objectives takes different ones of {', '.join(world.OBJECTIVES)}, "
            f"got {', '.join(names)}"
        )
    return names


def load_models(args: argparse.Namespace) -> Ensemble:
    """The models that the arguments name: own ones, or embedded ones."""
    _quiet_transformers()
    # Said here, or transformers would ask on the terminal.
    options = {"device": args.device, "dtype": args.dtype, "trust_remote_code": False}
    if is_own(args):
        with working("loading " + ", ".join(filter(None, [args.reference, *args.policy]))):
            return Ensemble.from_pretrained(args.reference, args.policy, **options)
    _use_one_thread()
    return Ensemble.embedded(policy_names(args), **options)


def is_own(args: argparse.Namespace) -> bool:
    """Whether the models are the caller's, not the embedded ones."""
    return bool(args.policy or args.reference)


def check_chat(args: argparse.Namespace) -> None:
    """Refuse options of conversations that do not fit the others."""
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
    """Prompts as the options of conversations want them: texts, or lists of messages."""
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
    """The embedded models know one form of conversation: put bare questions into it."""
    return [p if p.endswith("\nAssistant:") else world.format_prompt(p) for p in prompts]


def _use_one_thread() -> None:
    """The embedded models are so small that more threads cost more than they bring."""
    torch.set_num_threads(1)


def _quiet_transformers() -> None:
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading the models will say what is missing
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_files(*files: Path, picture: Path) -> None:
    """Refuse now what could not be written at the end."""
    for file in files:
        if not file.parent.is_dir() or file.is_dir():
            raise UsageError(f"cannot write {file}: expected a file in a folder that exists")
    endings = picture_endings()
    if endings and picture.suffix[1:].lower() not in endings:
        raise UsageError(f"cannot draw {picture}: expected a name ending in .{', .'.join(endings)}")


def run_demo(args: argparse.Namespace) -> int:
    check_files(args.out, picture=args.out)
    _quiet_transformers()
    _use_one_thread()
    demo.run(args.out, seed=args.seed, quick=args.quick, divergence=args.divergence)
    return 0


def run_tune(args: argparse.Namespace) -> int:
    if not args.out.parent.is_dir() or args.out.is_dir():
        raise UsageError(f"cannot write {args.out}: expected a file in a folder that exists")
    filters = {n: getattr(args, n) for n in ("top_k", "top_p", "min_p")}
    filters = {name: x for name, x in filters.items() if x is not None}
    shapes = [
        tune.Shape(divergence, batch, args.vocab_size, args.policies, args.dtype, filters)
        for divergence in args.divergences
        for batch in args.batch_sizes
    ]
    tune.run(shapes, args.minutes, args.out)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    return doctor.run()
