"""The options of value guidance, checked, and the scorers that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import world
from ..decoding import loading
from ..guidance import Guidance, best_of_n, blockwise_best_of_k, prefix_score, response_score
from .terminal import working

STRENGTHS = (0.0, 2.0, 5.0, 10.0, 20.0)  # default of a sweep


def check(args: argparse.Namespace, best_of: bool = False) -> None:
    """Refuse options of guidance that do not fit each other.

    Raises:
        ValueError: names the options.
    """
    for name in ("strength", "candidates"):
        if getattr(args, name) is not None and not args.values:
            raise ValueError(f"--{name} goes with --values")
    for name in args.values or ():
        if name not in world.OBJECTIVES and not Path(name).is_dir():
            raise ValueError(
                f"--values takes {', '.join(world.OBJECTIVES)} or folders of scorers, got {name}"
            )
    if not best_of:
        return
    if args.robust:
        _check_robust(args)
    if args.best_of is None:
        if args.block_length is not None or args.score:
            raise ValueError("--block-length and --score go with --best-of")
        return
    if bool(args.values) == bool(args.score):
        raise ValueError("--best-of needs what to choose by: --values (scorers) or --score")
    if args.score and not set(args.score) <= set(world.OBJECTIVES):
        raise ValueError(f"--score takes {', '.join(world.OBJECTIVES)}, got {','.join(args.score)}")
    if args.score and args.block_length is not None:
        raise ValueError("--score is of complete responses: --block-length needs --values")
    if args.candidates is not None:
        raise ValueError("--candidates is for drawing tokens, not for --best-of")


def _check_robust(args: argparse.Namespace) -> None:
    if not args.values:
        raise ValueError("--robust goes with --values")
    if args.best_of is not None:
        raise ValueError("--robust weighs the values of tokens: leave out --best-of")
    if args.strength and len(args.strength) > 1:
        raise ValueError(f"--robust takes one --strength, got {len(args.strength)} numbers")


def strengths(args: argparse.Namespace) -> list[float]:
    """The strength of each scorer; one number counts for all.

    Raises:
        ValueError: neither one strength nor one per scorer.
    """
    given = args.strength or [1.0]
    if len(given) == 1:
        given = given * len(args.values)
    if len(given) != len(args.values):
        raise ValueError(
            f"--strength needs 1 or {len(args.values)} numbers, one per scorer, got {len(given)}"
        )
    return given


def load_scorers(names: Sequence[str], *, device: Any = None, **options: Any) -> list[Any]:
    """The scorers of embedded objectives or in folders, dense or scalar by their architecture.

    Args:
        names: embedded objectives, or folders.
        device: where to put them; None leaves them where transformers loads them.
        **options: as for `loading.load_model`, which checks the files.

    Raises:
        OSError: the files in a folder cannot be loaded.
        ValueError: the model in a folder is neither a causal model nor a token classifier, or its
            tensors are not those of its architecture.
    """
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    scorers: list[Any] = []
    for name in names:
        folder = str(world.scorer(name)) if name in world.OBJECTIVES else name
        kinds = loading.load_config(folder, **options).architectures or [""]
        loader: Any
        if kinds[0].endswith("ForTokenClassification"):
            loader = AutoModelForTokenClassification
        elif kinds[0].endswith(("ForCausalLM", "LMHeadModel")):
            loader = AutoModelForCausalLM
        else:
            raise ValueError(f"{name} must hold a causal model or a token classifier, got {kinds}")
        model = loading.load_model(loader, folder, **options)
        scorers.append(model if device is None else model.to(device))
    return scorers


def load_guidance(args: argparse.Namespace) -> dict[str, Any]:
    """The argument value_fn of `generate`; empty without --values."""
    if not args.values:
        return {}
    with working("loading " + ", ".join(args.values)):
        scorers = load_scorers(args.values, **_options(args))
    return {"value_fn": Guidance(scorers, candidates=args.candidates)}


def choose(args: argparse.Namespace, ensemble: Any, prompts: list[str], **options: Any) -> Any:
    """The `BlockwiseOutput` of --best-of."""
    if args.values:
        scorers = load_scorers(args.values, **_options(args))
        score = prefix_score(scorers, strengths(args))
    else:

        def total(prompt: str, response: str) -> float:
            return sum(world.reward(name, prompt, response) for name in args.score)

        score = response_score(total, ensemble.tokenizer, prompts)
    if args.block_length is None:
        return best_of_n(ensemble, prompts, score_fn=score, n=args.best_of, **options)
    return blockwise_best_of_k(
        ensemble, prompts, score_fn=score, k=args.best_of, block_length=args.block_length, **options
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    # Without trust_remote_code transformers would ask on the terminal.
    options = {"trust_remote_code": False, "device": args.device}
    return options if args.dtype is None else options | {"dtype": args.dtype}
