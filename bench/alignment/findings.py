"""What the results say, in sentences whose every number and verdict comes from the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mod_fused import world

from . import plan
from .report import Record, Tables, mean

PAPER = 12.8  # per cent: abstract of arXiv 2406.18853, MOD over parameter merging, 3 objectives


def _percent(x: Record) -> str:
    return f"{100 * x['value']:+.1f}% ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})"


def _each(names: list[str], text: Callable[[str], str]) -> str:
    return "; ".join(f"{name} {text(name)}" for name in names)


def _against(t: Tables, other: str) -> str:
    """MOD's relative overall reward over another method at equal weights, by divergence."""
    main = [r for r in t.result["equal_weights"] if r["seed"] == 0]
    return _each(
        [r["tuned"] for r in main],
        lambda d: _percent(next(r for r in main if r["tuned"] == d)[other]["relative"]),
    )


def _over_seeds(t: Tables, what: str, sign: str = "") -> str:
    """The mean of a percentage over trainings with its interval, by divergence."""
    found = {r["tuned"]: r["mean"] for r in t.result["over_seeds"] if r["what"] == what}
    form = "{value:S.1f}% ({low:S.1f} to {high:S.1f})".replace("S", sign)
    each = _each(list(found), lambda d: form.format(**found[d]))
    return f"as a mean over {t.result['sizes']['train_seeds']} trainings: {each}"


def _headline(t: Tables) -> Iterator[str]:
    yield (
        f"Equal weights on three objectives, overall reward of MOD over Rewarded Soups: "
        f"{_against(t, 'soup')}. The paper reports {PAPER}% over parameter merging, on its models."
    )
    yield f"The same figure {_over_seeds(t, 'overall reward, mod over soup, %', '+')}."
    kl = _each(
        t.divergences,
        lambda d: " / ".join(
            f"{t.one(plan.CENTRE, method=m, tuned=d)['kl']['value']:.2f}"
            for m in ("mod", "soup", "retrained")
        ),
    )
    yield f"KL to the reference there, in nats, MOD / soup / retrained: {kl}."
    same = {r["tuned"]: r["soup"] for r in t.result["equal_kl"] if r.get("soup")}
    if same:
        each = _each(list(same), lambda d: _percent(same[d]))
        yield f"With the sum of MOD's equal weights scaled to the soup's KL: {each}."
    yield f"Over policies retrained for equal weights: {_against(t, 'retrained')}."
    yield f"Over best-of-16 of the reference: {_against(t, 'best of 16')}."


def _objective(t: Tables) -> Iterator[str]:
    def shares(d: str) -> str:
        found = [mean(t.key(method=m, tuned=d), "lost") for m in ("mod", "soup", "retrained")]
        return " / ".join("-" if x is None else f"{100 * x:.0f}%" for x in found)

    yield (
        "Share of the optimum's J lost, mean over the key weights, MOD / soup / retrained: "
        f"{_each(t.divergences, shares)}."
    )
    for name in ("mod", "soup"):
        what = f"J lost over the key weights, {name}, %"
        yield f"The same for {'MOD' if name == 'mod' else 'the soup'} {_over_seeds(t, what)}."


def _grid(t: Tables) -> Iterator[str]:
    def counts(d: str) -> str:
        r = next(r for r in t.result["grid"] if r["tuned"] == d)
        return f"{r['mod above soup']} and {r['mod below soup']} of {r['weights']}"

    yield (
        "Weights off the corners where MOD's weighted reward is above the soup's, and where it is "
        f"below (95% intervals): {_each(t.divergences, counts)}."
    )


def _variants(t: Tables) -> Iterator[str]:
    for d in t.divergences:
        found: dict[str, tuple[float | None, ...]] = {}
        for z, history in plan.VARIANTS if d != "reverse_kl" else ():
            cells = t.key(method="mod", tuned=d, normalizer=z, history=history)
            name = (
                f"{'history' if history else 'token by token'}, {'Z = 0' if z == 'zero' else 'Z'}"
            )
            if not any(c.get("invalid") for c in cells):
                found[name] = tuple(mean(cells, k) for k in ("weighted", "kl", "length", "ended"))
        words = [
            f"{name}: {w:.3f}, {kl:.2f} nats, {length:.1f} tokens, {100 * ended:.1f}% ended"
            for name, (w, kl, length, ended) in found.items()
            if w is not None and kl is not None and length is not None and ended is not None
        ]
        if words:
            yield f"Variants with {d} (weighted reward, KL, length): {'; '.join(words)}."


def _mismatched(t: Tables) -> Iterator[str]:
    for field, better in (("weighted", "most weighted reward"), ("lost", "least J lost")):

        def best(d: str, field: str = field) -> str:
            found: dict[str, Any] = {
                by: mean(t.key(method="mod", tuned=d, mixed_by=by), field) for by in t.divergences
            }
            known = {by: x for by, x in found.items() if x is not None}
            if d not in known:
                return "unknown"
            choose = min if field == "lost" else max
            winner = choose(known, key=lambda by: known[by])
            return f"by {winner}, {known[winner]:.3f} (by its own {known[d]:.3f})"

        yield f"Tuned with each divergence, mixed with {better}: {_each(t.divergences, best)}."


def _outside(t: Tables) -> Iterator[str]:
    def broken(d: str) -> str:
        words = []
        for name, fields in (("exact Z", {}), ("Z = 0", {"normalizer": "zero"})):
            at = [t.one(w, method="mod", tuned=d, **fields) for w in t.outside_weights]
            at = [c for c in at if c]
            solved = [c for c in at if not c["invalid"]]
            if at:
                words.append(f"{name} solved at {len(solved)} of {len(at)}")
            if solved:
                words[-1] += f" (KL up to {max(c['kl']['value'] for c in solved):.1f} nats)"
        return ", ".join(words)

    yield f"Weights outside the simplex: {_each(t.divergences, broken)}."


def _greedy(t: Tables) -> Iterator[str]:
    def change(d: str) -> str:
        words = []
        for m in ("mod", "soup"):
            pair = [mean(t.key(method=m, tuned=d, greedy=g), "weighted") for g in (False, True)]
            words.append(" to ".join("-" if x is None else f"{x:.3f}" for x in pair))
        return f"MOD {words[0]}, soup {words[1]}"

    words = "From drawn to greedy, weighted reward over the key weights"
    yield f"{words}: {_each(t.divergences, change)}."


def _singles(t: Tables) -> Iterator[str]:
    def reached(d: str) -> str:
        words = []
        for w in plan.CORNERS:
            got, best = t.one(w, method="mod", tuned=d), t.pooled("optimum", w, d)
            if got and best:
                pair = got["weighted"]["value"], best["weighted"]["value"]
                words.append(f"{world.OBJECTIVES[w.index(1.0)]} {pair[0]:.2f} of {pair[1]:.2f}")
        return ", ".join(words)

    yield f"What f-DPO reached of each reward's optimum: {_each(t.divergences, reached)}."


def _tabular(t: Tables) -> Iterator[str]:
    records = t.result["tabular"]

    def lost(kind: str, mix: str) -> str:
        found = {r["divergence"]: r for r in records if (r["world"], r["mix"]) == (kind, mix)}
        return _each(list(found), lambda d: f"{100 * found[d].get('lost', float('nan')):.2g}%")

    exact = [
        r for r in records if (r["world"], r["mix"]) == ("one token", "token by token, exact Z")
    ]
    worst = max(r["total_variation_max"] for r in exact)
    yield (
        "Policies that are exact optima, whole answers as one token: mixed by the op they are the "
        f"exact optimum, total variation at most {worst:.1e} over {exact[0]['worlds']} worlds a "
        f"divergence. With Z = 0 they lose {lost('one token', 'token by token, Z = 0')}."
    )
    yield (
        "The same policies on a tree, token by token with exact Z, lose "
        f"{lost('tree', 'token by token, exact Z')}; with history and exact Z "
        f"{lost('tree', 'with history, exact Z')}; with history and Z = 0 "
        f"{lost('tree', 'with history, Z = 0')}; a mean of the policies' probabilities "
        f"{lost('tree', 'mean of probabilities')}."
    )


def findings(result: Record) -> list[str]:
    """The sentences, in the order of the tables."""
    t = Tables(result)
    parts = (_headline, _objective, _grid, _singles, _variants, _mismatched, _outside, _greedy)
    return [sentence for part in (*parts, _tabular) for sentence in part(t)]
