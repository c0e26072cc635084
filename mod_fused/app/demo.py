"""`mod-fused demo`: four small models that ship with the package, or the caller's, steered by the
weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import recipes, world
from ..decoding.ensemble import Ensemble
from ..decoding.generate import GenerateOutput, generate
from ..divergence import DIVERGENCES
from . import options
from .models import (
    check_files,
    load_models,
    own_options,
    own_policies,
    policy_names,
    quiet_transformers,
    use_one_thread,
    with_roles,
)
from .options import UsageError
from .terminal import TextStream, table, track, write
from .trade_off import (
    Array,
    Point,
    check_valid,
    draw,
    evaluate,
    leads,
    picture_endings,
    signed,
    simplex_grid,
    table_rows,
)

MAX_NEW_TOKENS = 64
BEST_OF = 4  # as many model runs as mixing three policies with the reference
QUESTIONS = ("Tell me about a rainy Monday.", "What do you think of long meetings?",
             "Describe a lighthouse to a friend.")  # fmt: skip
OWN = ("--policy", "--adapters", "--system", "--prompt", "--max-new-tokens", "--device", "--dtype")
PAIRS = ((0, 2), (1, 2), (0, 1))  # the objectives mixed for each question

INTRODUCTION = """\
Four small language models answer everyday questions: a reference, and three policies that were
each trained from it to please one objective: helpful, harmless or humorous. mod_fused trains
nothing: at every token it mixes the next-token distributions of the four into the one that is
optimal for the weighted sum of the objectives. You choose the weights while decoding."""

CURVE = """\
Now many held-out questions at each weight. Rewards are plain functions of question and answer,
from 0 to 1; KL says how far the mixture has moved from the reference, in nats per answer.
All-zero weights are the reference itself."""

LEAD = """\
The simple alternative is to answer each question with one policy, picked at random: its rewards
lie on the straight line between the two. Mixing gets this far beyond that line (negative: short
of it), where each reward is scaled to go from 0 to 1 between the two policies:"""

NEXT = """\
Next:
  mod-fused generate --weights 0.5 0.5 0 --prompt "How do I bake bread?"
  mod-fused sweep --divergence jsd     rewards over all weights, as CSV and picture
    (the embedded policies were tuned with reverse KL: others are for looking, not for the best
    trade-off)
  mod-fused doctor                     does every backend of this machine agree with the oracle"""


def label(weights: Sequence[float], names: Sequence[str]) -> str:
    """Weights in words: "0.5 helpful + 0.5 humorous"."""
    parts = [f"{w:.2g} {name}" for w, name in zip(weights, names, strict=True) if w]
    return " + ".join(parts) or "the reference alone"


def show_answer(
    ensemble: Ensemble, prompt: Any, weights: Sequence[float], names: Sequence[str], **how: Any
) -> GenerateOutput:
    """Stream the answer at some weights under a line that says them; `how` is for `generate`."""
    write(f"\n[{label(weights, names)}]", style="bold cyan")
    streamer = TextStream(ensemble.tokenizer)
    out = generate(ensemble, [prompt], weights=weights, streamer=streamer, **how)
    check_valid(out.valid, [weights])
    return out


def show_answers(
    ensemble: Ensemble, prompt: str, pair: tuple[int, int], seed: int, divergence: str
) -> None:
    """Stream answers of the reference, two policies and their mixture, each with its rewards."""
    write(f"\n{prompt}", style="bold")
    for i_weight, j_weight in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]:
        weights = [0.0] * len(world.OBJECTIVES)
        weights[pair[0]], weights[pair[1]] = i_weight, j_weight
        how = {"divergence": divergence, "max_new_tokens": MAX_NEW_TOKENS, "seed": seed}
        (answer,) = show_answer(ensemble, prompt, weights, world.OBJECTIVES, **how).texts or [""]
        rewards = (f"{name} {world.reward(name, prompt, answer):.2f}" for name in world.OBJECTIVES)
        write(f"\n   rewards: {', '.join(rewards)}", style="dim")


def measure(
    ensemble: Ensemble, n_prompts: int, points: int, seed: int, divergence: str
) -> list[Point]:
    """The reference, the edges of the simplex, and the centre, on held-out prompts."""
    policies = len(world.OBJECTIVES)
    edges = [w for w in simplex_grid(policies, points) if sum(x > 0 for x in w) <= 2]
    grid = [(0.0,) * policies, *edges, (1 / policies,) * policies]
    return evaluate(
        ensemble,
        world.prompts(n_prompts, seed),
        grid,
        [world.REWARDS[name] for name in world.OBJECTIVES],
        seed=seed,
        divergence=divergence,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _rewards(
    model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, copies: int = 1
) -> Array:
    """[R, N, copies], all rewards of a single model's answers."""
    out = generate(
        Ensemble([None, model], tokenizer),
        prompts,
        weights=[1.0],
        seed=seed,
        num_return_sequences=copies,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    asked = [prompt for prompt in prompts for _ in range(copies)]
    texts = list(zip(asked, out.texts or (), strict=True))
    found = [[world.reward(name, *pair) for pair in texts] for name in world.OBJECTIVES]
    return np.array(found).reshape(len(found), len(prompts), copies)


def alternatives(
    ensemble: Ensemble, points: Sequence[Point], n_prompts: int, seed: int
) -> dict[str, list[Point]]:
    """What else gives rewards between those of two policies, at the weights of the edges: the
    policies' parameters averaged, and the best of the reference's answers. A corner of the soup is
    a policy, which `points` hold."""
    prompts, tokenizer = world.prompts(n_prompts, seed), ensemble.tokenizer
    edges = [p for p in points if 1 <= sum(w > 0 for w in p.weights) <= 2]
    soups = []
    for point in track(edges, "soups", len(edges)):
        if 1.0 not in point.weights:
            merged = recipes.soup(ensemble.models, point.weights)
            point = replace(point, rewards=_rewards(merged, tokenizer, prompts, seed)[..., 0])
        soups.append(point)
    pool = _rewards(ensemble.models[0], tokenizer, prompts, seed, BEST_OF)
    best = []
    for point in edges:
        chosen = np.tensordot(point.weights, pool, 1).argmax(1)  # [N]
        rewards = np.take_along_axis(pool, chosen[None, :, None], 2)[..., 0]
        best.append(replace(point, rewards=rewards))
    return {
        "soup: parameters averaged": soups,
        f"best of {BEST_OF} answers of the reference": best,
    }


def run(out: Path, *, seed: int = 0, quick: bool = False, divergence: str = "reverse_kl") -> None:
    """Stream answers, print a table of rewards, and draw the trade-off curve into `out`.

    Raises:
        ImportError: without transformers.
        OSError: if `out` cannot be written.
    """
    ensemble = Ensemble.embedded()
    write(INTRODUCTION)
    pairs = PAIRS[:1] if quick else PAIRS
    for prompt, pair in zip(world.prompts(len(pairs), seed), pairs, strict=True):
        show_answers(ensemble, prompt, pair, seed, divergence)

    write(f"\n{CURVE}\n")
    count = 16 if quick else 100
    points = measure(ensemble, count, 3 if quick else 5, seed, divergence)
    table(*table_rows(points, world.OBJECTIVES))

    write(f"\n{LEAD}")
    for names, (lead, spread) in leads(points, world.OBJECTIVES).items():
        write(f"  {names}: {signed(lead, spread)}")
    try:
        title = f"trade-off of the embedded policies ({divergence})"
        others = alternatives(ensemble, points, count, seed) if picture_endings() else None
        draw(out, points, world.OBJECTIVES, title, others)
        write(f"\nThe curves are in {out}", style="bold")
    except ImportError as error:
        write(f"\nNo picture: {error}")
    write(f"\n{NEXT}")


def run_own(args: argparse.Namespace) -> None:
    """Stream answers of the caller's reference, of each of its policies, and of all at equal
    weights, as conversations where all tokenizers have a chat template."""
    names = [Path(name).name for name in own_policies(args)]
    if len(set(names)) < len(names):
        names = policy_names(args)
    ensemble = load_models(args)
    templates = [getattr(t, "chat_template", None) for t in ensemble.tokenizers if t is not None]
    args.chat = bool(templates) and None not in templates
    if args.system is not None and not args.chat:
        raise UsageError("--system needs a chat template in every model's tokenizer")
    count = len(names)
    corners = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    mixes = [(0.0,) * count, *corners, *[(1 / count,) * count] * (count > 1)]
    asked = args.prompt or QUESTIONS[: 1 if args.quick else None]
    for text, prompt in zip(asked, with_roles(args, asked), strict=True):
        write(f"\n{text}", style="bold")
        for weights in mixes:
            out = show_answer(
                ensemble, prompt, weights, names, divergence=args.divergence, seed=args.seed,
                max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS, return_model_logprobs=True,
            )  # fmt: skip
            assert out.model_logprobs is not None
            away = float((out.logprobs - out.model_logprobs[..., 0]).sum())
            write(f"\n   log pi*/pi_ref: {away:.1f} nats", style="dim")


def add_options(commands: Any) -> None:
    """Add the command `demo` and its options."""
    demo = commands.add_parser("demo", help="steer the embedded models, draw their trade-off")
    group = demo.add_argument_group("models of your own: their answers at several weights")
    own_options(group)
    group.add_argument("--system", metavar="TEXT", help="a system message in front")
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a question; repeat it for several"
    )
    group.add_argument(
        "--max-new-tokens",
        type=options.whole(1),
        metavar="N",
        help=f"the most tokens of an answer (default: {MAX_NEW_TOKENS})",
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the picture (default: mod_fused_demo.png)",
    )
    demo.add_argument("--seed", type=options.whole(0), default=0, help="(default: 0)")
    demo.add_argument(
        "--divergence",
        type=options.divergence,
        default="reverse_kl",
        metavar="NAME",
        help=f"{', '.join(DIVERGENCES)} (default: reverse_kl)",
    )
    demo.add_argument("--quick", action="store_true", help="fewer questions and weights")
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    args.objectives = None  # the demo has all embedded ones
    own = own_policies(args)
    if args.reference:
        if not own:
            raise UsageError("--model needs at least one of --policy and --adapters")
        if args.out:
            raise UsageError("--out is the picture of the embedded models: leave it out")
        run_own(args)
        return 0
    given = args.prompt or args.device or args.dtype or args.max_new_tokens
    if own or args.system is not None or given:
        raise UsageError(f"{', '.join(OWN)} go with --model")
    out = args.out or Path("mod_fused_demo.png")
    check_files(out, picture=out)
    quiet_transformers()
    use_one_thread()
    run(out, seed=args.seed, quick=args.quick, divergence=args.divergence)
    return 0
