"""Value guidance as Markdown: findings whose every number and verdict comes from the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import hypot
from typing import Any

from mod_fused import world

from ..report import markdown_table
from .guided import ONE_STRENGTH, PAIR, PANELS
from .report import Record, _bounds, _weights


def verdict(x: Record) -> str:
    """Whether a difference is above 0, below it, or neither by its 95% interval."""
    return "above" if x["low"] > 0 else "below" if x["high"] < 0 else "not told apart"


def trend(history: list[Record]) -> str:
    """Whether an objective rises: each step against twice the standard error of a difference."""
    steps = []
    for a, b in zip(history, history[1:], strict=False):
        change, error = b["objective"] - a["objective"], 2 * hypot(a["error"], b["error"])
        steps.append(
            f"{change:+.3f} ({'rises' if change > error else 'falls' if change < -error else '='})"
        )
    fell = any("falls" in step for step in steps)
    numeric = not any(step.startswith("-") for step in steps)
    said = "monotone" if numeric else "not monotone" if fell else "monotone within its errors"
    return f"{said}: " + ", ".join(steps)


def _setting(x: Any) -> str:
    return _weights(x) if isinstance(x, list) else f"{x:g}"


def _leads(result: Record, method: str, against: str) -> Iterator[str]:
    """A sentence for each objective on one method against a curve at its KL."""
    for objective in PANELS:
        rows = [
            r
            for r in result["leads"]
            if (r["objective"], r["method"], r["against"]) == (objective, method, against)
        ]
        inside = [
            f"at {_setting(r['setting'])}: {_bounds(r['lead'], sign='+')}, {verdict(r['lead'])}"
            for r in rows
            if r["lead"]
        ]
        outside = [_setting(r["setting"]) for r in rows if not r["lead"]]
        words = "; ".join(inside) or "nowhere comparable"
        beyond = f"; KL beyond the curve at {', '.join(outside)}" if outside else ""
        yield f"{objective}: {words}{beyond}."


def _ordering(result: Record, method: str, against: str, claim: str) -> str:
    """Whether a paper's claim that `method` is above the curve reproduces, counted over points."""
    found = [
        verdict(r["lead"])
        for r in result["leads"]
        if r["method"] == method and r["against"] == against and r["lead"]
    ]
    above, below = found.count("above"), found.count("below")
    said = "is undecided here"
    if above and not below:
        said = "reproduces"
    elif below and not above:
        said = "does not reproduce, it is the other way round"
        if any(r["bound"] for r in result["leads"] if r["method"] == method):
            said = "is not shown; the bound on KL, which is above KL, leaves it open"
    elif above and below:
        said = "reproduces at some points and not at others"
    same = len(found) - above - below
    return f"{claim}: {said} ({above} points above, {below} below, {same} not told apart)."


def findings(result: Record) -> Iterator[str]:
    """The sentences, in the order of the tables."""
    main = "CD-FUDGE"
    yield _ordering(
        result, "blockwise", main,
        "CD (arXiv 2310.17022): blockwise control above tokenwise control at equal KL",
    )  # fmt: skip
    for line in _leads(result, "blockwise", main):
        yield f"Blockwise less tokenwise at the KL bound of K, {line}"
    yield (
        "The bound is at least the KL of blockwise and best-of-N, tokenwise KL is measured: "
        "the comparison errs against the block methods."
    )
    equal = "CD-FUDGE, as CD-Q"
    yield _ordering(
        result, "CD-Q", equal,
        "CD: CD-Q above CD-FUDGE in tokenwise control, on the same answers with the same steps",
    )  # fmt: skip
    sizes = result["sizes"]
    yield (
        f"CD-Q had {sizes['steps']} steps here, and its targets pass the reward on backwards, step "
        "by step: this is the ordering at equal training, not that of trained-out scorers. MAVIS "
        f"had {sizes['iterations']} times {sizes['mavis_steps']} steps on {sizes['mavis_prompts']} "
        "answers each, less than the shipped scorers and policies that it is compared with."
    )
    for method, against, words in (
        ("CD-Q", equal, "CD-Q less CD-FUDGE of the same training"),
        ("FUDGE", main, "FUDGE with a classifier less the shipped CD-FUDGE scorer"),
        ("MOD", main, "MOD with one DPO policy less tokenwise control"),
        ("best of N, reward", main, "Best-of-N by the true reward less tokenwise control"),
        ("best of N, scorer", main, "Best-of-N by the scorer less tokenwise control"),
    ):
        for line in _leads(result, method, against):
            yield f"{words}, by strength, weight or N, {line}"
    for name, history in result["mavis"].items():
        yield f"MAVIS (arXiv 2508.13415): the objective of {name} is {trend(history)}."
    for r in result["differences"]:
        yield (
            f"MAVIS less {r['against']}, J over {r['weights']} weights: "
            f"{_bounds(r['worth'], sign='+')}, {verdict(r['worth'])}; weighted reward "
            f"{_bounds(r['weighted'], sign='+')}; KL {_bounds(r['kl'], digits=2, sign='+')} nats."
        )


def _panel(result: Record, objective: str) -> str:
    rows = [
        [
            p["method"],
            _setting(p["setting"]),
            _bounds(p[objective]),
            _bounds(p["kl"], digits=2) + (" (bound)" if p["bound"] else ""),
            *(f"{p[name]['value']:.3f}" for name in world.OBJECTIVES if name != objective),
        ]
        for p in result["points"]
        if p["objective"] == objective and not p["method"].startswith("under")
    ]
    others = [name for name in world.OBJECTIVES if name != objective]
    return markdown_table(["method", "strength, K, N or weight", objective, "KL", *others], rows)


def _divergences(result: Record) -> str:
    rows = [
        [p["method"].removeprefix("under "), p["objective"], _bounds(p[p["objective"]]),
         _bounds(p["kl"], digits=2)]
        for p in result["points"]
        if p["method"].startswith("under")
    ]  # fmt: skip
    return markdown_table(["divergence", "reward", "mean", "KL"], rows)


def _iterations(result: Record) -> str:
    rows = [
        [name, str(i), f"{it['reward']:.3f}", f"{it['kl']:.2f}",
         f"{it['objective']:.3f} ± {it['error']:.3f}"]
        for name, history in result["mavis"].items()
        for i, it in enumerate(history)
    ]  # fmt: skip
    return markdown_table(["objective", "iteration", "reward", "KL", "J"], rows)


def _pair(result: Record) -> str:
    rows = [
        [p["method"], _setting(p["setting"]), *(f"{p[name]['value']:.3f}" for name in PAIR),
         _bounds(p["weighted"]), _bounds(p["kl"], digits=2), _bounds(p["worth"])]
        for p in sorted(result["two"], key=lambda p: (p["method"], p["setting"]))
    ]  # fmt: skip
    return markdown_table(["method", "weights", *PAIR, "w r", "KL", "J"], rows)


def markdown(result: Record) -> str:
    """The whole report."""
    s = result["sizes"]
    intro = (
        f"{s['prompts']} held-out prompts, one answer each; in brackets 95% intervals of a "
        "bootstrap over prompts. KL to the reference in nats per answer, of what was drawn; for "
        f"blockwise control (blocks of {s['block_length']} tokens, scored by the shipped scorer) "
        "and best-of-N the bound log K - (K - 1) / K per block. CD-FUDGE is the shipped scorer; "
        f"'CD-FUDGE, as CD-Q' and CD-Q are trained here, {s['steps']} steps of {s['batch']} of the "
        f"same {4 * s['train_prompts']} answers; FUDGE's classifier learns 'reward above 0.5' in "
        f"{s['fudge_steps']} steps and scores the top {s['candidates']} tokens. Two objectives: J "
        f"= w r - KL / {result['beta']:g}; MAVIS with {s['mavis_steps']} steps an iteration on "
        f"{s['mavis_prompts']} answers, policies retrained for the mix with {s['policy_steps']}."
    )
    machine = "\n".join(f"- {name}: {value}" for name, value in result["machine"].items())
    head: Iterable[str] = (
        "# Value guidance: reward against KL",
        f"`{result['command']}`, {result['seconds']} s",
        machine,
        intro,
    )
    sections = [
        ("Findings", "\n".join(f"- {line}" for line in findings(result))),
        *((f"For {name}", _panel(result, name)) for name in PANELS),
        (f"Tokenwise control at strength {ONE_STRENGTH:g}, by divergence", _divergences(result)),
        ("MAVIS: its policies, iteration by iteration (0: the reference)", _iterations(result)),
        (f"Two objectives, weights of {' and '.join(PAIR)}", _pair(result)),
    ]
    return "\n\n".join([*head, *(f"## {title}\n\n{body}" for title, body in sections)]) + "\n"
