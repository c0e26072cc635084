"""What the commands demo, generate, sweep, tune and doctor do with their arguments."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import demo, doctor, guiding, strengths, tune, world
from .decoder import GenerateOutput, generate
from .ensemble import Ensemble
from .guidance import BlockwiseOutput
from .sweep import (
    draw,
    evaluate,
    leads,
    picture_endings,
    signed,
    simplex_grid,
    table_rows,
    write_csv,
)
from .terminal import TextStream, table, write


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
    options = {"device": args.device, "dtype": args.dtype}
    if _own(args):
        return Ensemble.from_pretrained(args.reference, args.policy, **options)
    _use_one_thread()
    return Ensemble.embedded(policy_names(args), **options)


def _own(args: argparse.Namespace) -> bool:
    """Whether the models are the caller's, not the embedded ones."""
    return bool(args.policy or args.reference)


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


def _weights(texts: Sequence[str] | None, names: Sequence[str]) -> list[float]:
    if texts is None:
        return [1.0 / len(names) for _ in names]
    numbers = [number for text in texts for number in text.split(",") if number]
    try:
        weights = [float(number) for number in numbers]
    except ValueError:
        raise UsageError(f"--weights must be numbers, got {' '.join(numbers)}") from None
    if len(weights) != len(names):
        raise UsageError(
            f"--weights needs {len(names)} numbers, one per policy ({', '.join(names)}), "
            f"got {len(weights)}"
        )
    return weights


def _as_conversations(prompts: Sequence[str]) -> list[str]:
    """The embedded models know one form of conversation: put bare questions into it."""
    return [p if p.endswith("\nAssistant:") else world.format_prompt(p) for p in prompts]


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = args.prompt
    if not prompts:
        if sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT, or one a line on standard input")
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty" if prompts else "no prompt on standard input")
    if _own(args):
        return prompts
    return _as_conversations(prompts)


def run_demo(args: argparse.Namespace) -> int:
    _check_files(args.out, picture=args.out)
    _quiet_transformers()
    _use_one_thread()
    demo.run(args.out, seed=args.seed, quick=args.quick, divergence=args.divergence)
    return 0


def run_generate(args: argparse.Namespace) -> int:
    guiding.check(args, best_of=True)
    names = policy_names(args)
    weights = _weights(args.weights, names)
    values = guiding.strengths(args) if args.values else None
    prompts = _prompts(args)
    if args.score and _own(args):
        raise UsageError("--score is of the embedded world: choose by --values with own models")
    ensemble = load_models(args)
    single = len(prompts) == 1 and not args.json
    options: dict[str, Any] = {
        "divergence": args.divergence,
        "normalizer": args.normalizer,
        "sequence_history": args.sequence_history,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": not args.greedy,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "seed": args.seed,
        "return_model_logprobs": args.json,
    }
    out: GenerateOutput | BlockwiseOutput
    if args.best_of:
        out = guiding.choose(args, ensemble, prompts, weights=weights or None, **options)
    else:
        options |= guiding.load_guidance(args) | {"value_weights": values}
        streamer = TextStream(ensemble.tokenizer) if single else None
        out = generate(ensemble, prompts, weights=weights, streamer=streamer, **options)
    if single:
        write("" if not args.best_of else (out.texts or [""])[0])
    for row, (prompt, text) in enumerate(zip(prompts, out.texts or (), strict=True)):
        if args.json:
            record = _record(out, row) | {"prompt": prompt}
            if not _own(args):
                rewards = names or world.OBJECTIVES
                record["rewards"] = {name: world.reward(name, prompt, text) for name in rewards}
            print(json.dumps(record))
        elif not single:
            write(prompt, style="dim", end="")
            write(text, end="\n\n")
    if not out.valid.all():
        raise ValueError("no valid distribution at some step: NaN logits, or no Z = 0 solution")
    return 0


def _record(out: GenerateOutput | BlockwiseOutput, row: int) -> dict[str, Any]:
    """One response as JSON values; log-probabilities per token, the models' reference first."""
    n, logs = int(out.lengths[row]), out.model_logprobs
    return {
        "text": out.texts[row] if out.texts else None,
        "finish_reason": out.finish_reasons[row],
        "tokens": out.tokens[row, :n].tolist(),
        "logprobs": out.logprobs[row, :n].tolist(),
        "model_logprobs": logs[row, :n].tolist() if logs is not None else None,
    } | ({"score": float(out.scores[row])} if isinstance(out, BlockwiseOutput) else {})


def _load_reward(spec: str) -> Callable[[str, str], float]:
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")  # modules beside the caller, as with python -m
    try:
        reward = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UsageError(f"--reward takes MODULE:FUNCTION, got {spec!r}: {error}") from None
    finally:
        sys.path.remove("")
    return reward


def _check_files(*files: Path, picture: Path) -> None:
    """Refuse now what could not be written at the end."""
    for file in files:
        if not file.parent.is_dir() or file.is_dir():
            raise UsageError(f"cannot write {file}: expected a file in a folder that exists")
    endings = picture_endings()
    if endings and picture.suffix[1:].lower() not in endings:
        raise UsageError(f"cannot draw {picture}: expected a name ending in .{', .'.join(endings)}")


def run_sweep(args: argparse.Namespace) -> int:
    guiding.check(args)
    names = policy_names(args)
    _check_files(args.csv, args.picture, picture=args.picture)
    rewards: list[Callable[[str, str], float]] | None
    if _own(args):
        if args.reference is None or args.prompt_file is None:
            raise UsageError("a sweep of own models needs --reference and --prompt-file")
        if args.reward and not args.values and len(args.reward) != len(args.policy):
            raise UsageError(
                f"expected one --reward per --policy ({len(args.policy)}), got {len(args.reward)}"
            )
        rewards = [_load_reward(spec) for spec in args.reward] or None
    elif args.reward:
        raise UsageError("--reward goes with own models; the embedded world has its own rewards")
    if args.prompt_file is None:
        prompts = world.prompts(args.prompts, args.seed)
    else:
        prompts = [line for line in args.prompt_file.read_text().splitlines() if line.strip()]
        if not prompts:
            raise UsageError(f"{args.prompt_file} holds no prompt")
    if not _own(args):
        rewards = [world.REWARDS[name] for name in names]
        prompts = _as_conversations(prompts)
    ensemble = load_models(args)
    grid = simplex_grid(len(names), args.points) if names else [()]
    options: dict[str, Any] = {
        "samples": args.samples,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "divergence": args.divergence,
        "normalizer": args.normalizer,
        "sequence_history": args.sequence_history,
        "max_new_tokens": args.max_new_tokens,
    }
    if args.values:
        return _sweep_strengths(args, ensemble, prompts, grid, names, rewards, options)
    points = evaluate(ensemble, prompts, grid, rewards, **options)
    table(*table_rows(points, names))
    for pair, (lead, error) in leads(points, names).items():
        write(f"{pair}, beyond the straight line between them: {signed(lead, error)}")
    write_csv(args.csv, points, names)
    write(f"table: {args.csv}")
    if len(names) > 1:
        try:
            draw(args.picture, points, names, f"{args.divergence}, {len(prompts)} prompts")
            write(f"picture: {args.picture}")
        except ImportError as error:
            write(f"no picture: {error}")
    else:
        write("no picture: a trade-off needs at least two policies")
    return 0


def _sweep_strengths(
    args: argparse.Namespace,
    ensemble: Ensemble,
    prompts: list[str],
    grid: Sequence[Sequence[float]],
    names: list[str],
    rewards: list[Callable[[str, str], float]] | None,
    options: dict[str, Any],
) -> int:
    """The sweep of --values: every strength at every weight vector."""
    if _own(args):
        labels = args.reward
    else:
        embedded = [name for name in args.values if name in world.OBJECTIVES]
        labels = list(dict.fromkeys([*names, *embedded])) or list(world.OBJECTIVES)
        rewards = [world.REWARDS[name] for name in labels]
    guide = guiding.load_guidance(args)["value_fn"]
    found = strengths.evaluate(
        ensemble, prompts, grid, args.strength or guiding.STRENGTHS, guide, rewards, **options
    )
    table(*strengths.table_rows(found, names, labels))
    strengths.write_csv(args.csv, found, names, labels)
    write(f"table: {args.csv}")
    if not labels:
        write("no picture: it shows rewards, and there is no --reward")
        return 0
    try:
        title = f"{','.join(args.values)}: {args.divergence}, {len(prompts)} prompts"
        strengths.draw(args.picture, found, names, labels, title)
        write(f"picture: {args.picture}")
    except ImportError as error:
        write(f"no picture: {error}")
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
