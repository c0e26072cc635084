"""`mod-fused generate`: answers to prompts or conversations."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import world
from ..decoding.ensemble import Ensemble
from ..decoding.generate import GenerateOutput, generate
from ..guidance import BlockwiseOutput, WorstCaseWeights
from . import options, prompt_input, scorers
from .models import (
    as_conversations,
    check_chat,
    is_own,
    load_models,
    policy_names,
    with_roles,
)
from .options import UsageError
from .terminal import TextStream, working, write
from .trade_off import check_valid


def run_generate(args: argparse.Namespace) -> int:
    scorers.check(args, best_of=True)
    check_chat(args)
    names = policy_names(args)
    weights = _weights(args.weights, names)
    values: Any = scorers.strengths(args) if args.values else None
    if args.robust:
        values = WorstCaseWeights(values[0])
    if args.num_beams > 1 and args.best_of:
        raise UsageError("--num-beams draws no continuations to choose from: leave out --best-of")
    if args.num_beams == 1 and args.length_penalty != 1.0:
        raise UsageError("--length-penalty goes with --num-beams")
    _check_candidates(args)
    if args.one_head and args.json:
        raise UsageError("--one-head has no log-probabilities of each model: leave out --json")
    if args.score and is_own(args):
        raise UsageError("--score is of the embedded world: choose by --values with own models")
    prompts = _prompts(args)
    ensemble = load_models(args)
    single = len(prompts) == 1 and not args.json
    searching = args.num_beams > 1
    settings: dict[str, Any] = {
        "weights": weights or None if args.best_of else weights,
        "divergence": args.divergence,
        "normalizer": args.normalizer,
        "sequence_history": args.sequence_history,
        "plausibility": args.plausibility,
        "max_new_tokens": args.max_new_tokens,
        "do_sample": not (args.greedy or searching),
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": None if searching else args.seed,
        "return_model_logprobs": args.json,
        "one_head": args.one_head,
    }
    if args.num_candidates is not None:
        settings["num_candidates"] = args.num_candidates
        settings["resample_below"] = args.resample_below
    if not args.best_of:
        settings |= {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
        settings |= scorers.load_guidance(args) | {"value_weights": values}
    streams = single and not searching and args.num_candidates is None
    streamer = TextStream(ensemble.tokenizer) if streams else None
    out = _answers(args, ensemble, prompts, streamer, settings)
    if single:
        write("" if streamer is not None else (out.texts or [""])[0])
    for row, prompt in enumerate(prompts):
        if args.json:
            record = _record(out, row) | _given(prompt)
            if not is_own(args):
                text, rewards = record["text"], names or world.OBJECTIVES
                record["rewards"] = {name: world.reward(name, prompt, text) for name in rewards}
            write(json.dumps(_finite(record), allow_nan=False))
        elif not single:
            write(_shown(prompt), style="dim", end="")
            write((out.texts or [""])[row], end="\n\n")
    check_valid(out.valid, [weights] * len(out.valid))
    return 0


def _check_candidates(args: argparse.Namespace) -> None:
    """Refuse what --num-candidates cannot go with."""
    if args.num_candidates is None:
        if args.resample_below is not None:
            raise UsageError("--resample-below goes with --num-candidates")
        return
    others = {"greedy": args.greedy, "robust": args.robust, "best-of": args.best_of}
    others["num-beams"] = args.num_beams > 1
    for name, given in others.items():
        if given:
            raise UsageError(f"--num-candidates cannot be combined with --{name}")


def _answers(
    args: argparse.Namespace,
    ensemble: Ensemble,
    prompts: list[Any],
    streamer: TextStream | None,
    settings: dict[str, Any],
) -> GenerateOutput | BlockwiseOutput:
    if streamer is not None:
        settings = settings | {"streamer": streamer}
        if args.best_of:
            return scorers.choose(args, ensemble, prompts, **settings)
        return generate(ensemble, prompts, **settings)
    each = f", the best of {args.best_of} for each" if args.best_of else ""
    with working(f"decoding {len(prompts)} responses{each}"):
        if args.best_of:
            return scorers.choose(args, ensemble, prompts, **settings)
        return generate(ensemble, prompts, **settings)


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


def _prompts(args: argparse.Namespace) -> list[Any]:
    """Texts, or conversations with --chat and --messages."""
    if args.messages is not None:
        if args.prompt or args.chat:
            raise UsageError("--messages gives whole conversations: leave out --prompt and --chat")
        if str(args.messages) == "-":
            data, source = prompt_input.standard_input(), "standard input"
        else:
            data, source = Path(args.messages).read_bytes(), str(args.messages)
        conversations = prompt_input.read_conversations(data, source)
        if not conversations:
            raise UsageError(f"{source} holds no conversation")
        return with_roles(args, conversations)
    prompts = [prompt_input.argument(text, "--prompt") for text in args.prompt]
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT, or one a line on standard input")
        prompts = prompt_input.read_prompts(prompt_input.standard_input(), "standard input")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty" if prompts else "no prompt on standard input")
    if is_own(args):
        return with_roles(args, prompts)
    return as_conversations(prompts)


def _shown(prompt: Any) -> str:
    """The text to show above an answer: the prompt, or a conversation's last message."""
    return prompt if isinstance(prompt, str) else f"{prompt[-1].get('content') or ''}\n"


def _given(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}


def _record(out: GenerateOutput | BlockwiseOutput, row: int) -> dict[str, Any]:
    """One response as JSON values; log-probabilities per token, the models' reference first."""
    n, logs = int(out.lengths[row]), out.model_logprobs
    scores = out.scores if isinstance(out, BlockwiseOutput) else out.sequences_scores
    return (
        {
            "text": out.texts[row] if out.texts else None,
            "finish_reason": out.finish_reasons[row],
            "tokens": out.tokens[row, :n].tolist(),
            "logprobs": out.logprobs[row, :n].tolist(),
            "model_logprobs": logs[row, :n].tolist() if logs is not None else None,
        }
        | ({} if scores is None else {"score": float(scores[row])})
        | _of_candidates(out, row)
    )


def _of_candidates(out: GenerateOutput | BlockwiseOutput, row: int) -> dict[str, Any]:
    """What is known of the candidates that a response was chosen from."""
    if isinstance(out, BlockwiseOutput) or out.weights is None:
        return {}
    fields = "weights", "effective_sample_size", "log_normalizer", "resamplings"
    return {name: getattr(out, name)[row].tolist() for name in fields}


def _finite(value: Any) -> Any:
    """The same JSON value with null for infinities and NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_options(commands: Any, mixture: argparse.ArgumentParser) -> None:
    """Add the command `generate` and its options."""
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
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="multiplies the log-probability of every token seen before (default: 1)",
    )
    generate.add_argument(
        "--strength",
        type=options.numbers,
        metavar="L",
        help="of --values: one number, or one per scorer (default: 1)",
    )
    generate.add_argument(
        "--robust",
        action="store_true",
        help="weigh --values for the worst of them at each step (RMOD)",
    )
    generate.add_argument(
        "--best-of",
        type=options.whole(1),
        metavar="K",
        help="draw K continuations and keep the best by --values or --score",
    )
    generate.add_argument(
        "--block-length",
        type=options.whole(1),
        metavar="L",
        help="choose after every L tokens (default: once, among whole responses)",
    )
    generate.add_argument(
        "--score",
        type=options.names,
        metavar="A,B",
        help="choose by the sum of these rewards of the embedded world",
    )
    generate.add_argument(
        "--num-candidates",
        type=options.whole(1),
        metavar="N",
        help="draw N responses and choose one by its probability under the optimum over whole"
        " responses",
    )
    generate.add_argument(
        "--resample-below",
        type=float,
        metavar="SHARE",
        help="resample the candidates as soon as they are worth less than this share of N draws",
    )
    generate.add_argument("--greedy", action="store_true", help="the most likely token each time")
    generate.add_argument(
        "--num-beams",
        type=options.whole(1),
        default=1,
        metavar="K",
        help="search for the most likely answer with K beams; nothing is drawn",
    )
    generate.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="of --num-beams: answers are compared by log-probability / length^P (default: 1)",
    )
    generate.add_argument(
        "--one-head",
        action="store_true",
        help="multiply by the LM head once, with mixed hidden states: for policies that share it,"
        " under reverse KL",
    )
    generate.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line and prompt; infinite and undefined numbers are null",
    )
    generate.set_defaults(run=run_generate)
