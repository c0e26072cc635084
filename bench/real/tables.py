"""The tables and the picture of the study, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..alignment.plots import METHODS, finish, method
from ..alignment.tables import Record, Section, document
from ..report import rounded
from .jobs import CORNERS, REVERSE_KL
from .rewards import OBJECTIVES


def _named(records: Sequence[Record]) -> Iterator[Record]:
    """With names for the tables, by weights; the corners of MOD are the policies."""
    for r in sorted(records, key=lambda r: r["weights"]):
        name = r["method"]
        if name == "mod":
            corner = r["weights"] in map(rounded, CORNERS)
            name = "the policy alone" if corner else f"MOD, {r['rule']}"
        elif name.startswith("best of"):
            name += ", KL at most"
        if not any(r["weights"]):  # the reference has no weighted reward
            r = {k: x for k, x in r.items() if not k.startswith(("weighted", "objective"))}
        if name == "guided":
            name += f", strength {r['strength']:g}"
        yield r | {"name": name}


def report(result: Record) -> str:
    """All tables of the study."""
    records = list(_named(result["methods"]))
    first = [r for r in records if r["tuned"] in (REVERSE_KL, "")]
    second = [r for r in records if r["tuned"] not in (REVERSE_KL, "")]
    rewards = " | ".join(f"{name} = {name} (3)" for name in OBJECTIVES)
    columns = (
        f"method = name | weights | {rewards} | w r = weighted (3) | KL = kl (2) | "
        "J = objective (2) | J over trainings = objective_over (2) | tokens = tokens 1 | "
        "ended, % = ended 0% | log pi_ref a token = ref_logprob 2 | distinct words = distinct 2 | "
        "questions = asked | trainings = seeds"
    )
    shown = " | ".join(f"{name} = {name} 2" for name in OBJECTIVES)
    quarters = " | ".join(f"{i} = quarter {i} 2" for i in range(1, 5))
    sections: list[Section] = [
        ("Equal weights of three: the paper's figure", result["paper"], "what | % = x (+1%)"),
        ("One method less another, in pairs", result["leads"],
         "of = method | rule | less | its rule = less_rule | tuned with = tuned | weights | "
         "w r = weighted (+3) | KL = kl (+2) | J = objective (+2) | "
         "J over trainings = objective_over (+2) | questions = asked | trainings = seeds"),
        ("MOD less the soup at the soup's KL, first training", result["at_kl"],
         "weights | KL of the soup = soup (2) | KL of MOD = mod (2) | w r = lead (+3) | "
         "questions = asked"),
        ("Reverse KL", first, columns),
        (f"Tuned and mixed with {result['sizes']['other']}", second, columns),
        ("Area beyond the reference that a line of weights dominates, first two rewards",
         result["areas"], "method | area = area (4) | over trainings = over (4)"),
        ("Checkpoints, on validation questions (those of a pruned policy: KL to the pruned model)",
         result["trainings"],
         f"policy | steps | {shown} | w r = weighted 3 | KL = kl 2 | J = objective 2 | kept"),
        ("The pruned model: KL of the reference to it, a token", [result["pruned"]],
         "parameters | first step = first 2 | last steps = last 2"),
        ("Scorers: correlation with held-out rewards by quarter of the answer", result["scorers"],
         f"objective | steps | {quarters}"),
        ("Answers of the first training: to the first questions, and the one with the most reward",
         [r | {"answer": " ".join(r["answer"].split()).replace("|", "\\|")}
          for r in result["samples"]],
         f"method | question | answer | {shown} | most reward"),
    ]  # fmt: skip
    return document("A real language model: mixing, merging, retraining, choosing, guiding",
                    result, sections)  # fmt: skip


def _points(result: Record, name: str, line: Sequence[Any]) -> list[Record]:
    at = [rounded(w) for w in line]
    found = [r for r in result["methods"]
             if r["method"] == name and r["weights"] in at and r["tuned"] in (REVERSE_KL, "")
             and r["rule"] in ("token by token", "")]  # fmt: skip
    return sorted(found, key=lambda r: at.index(r["weights"]))


def trade_off(figure: Any, result: Record) -> None:
    """Plot the two rewards of the line, with 95% intervals over questions, and each training."""
    x, y = OBJECTIVES[:2]
    figure.set_size_inches(8.5, 5.2)
    axes = figure.subplots()
    line = [CORNERS[0], *result["sizes"]["line"], CORNERS[1]]
    for name in ("mod", "soup", "retrained", f"best of {result['sizes']['pool']}", "reference"):
        found = _points(result, name, [*line, (0.0, 0.0, 0.0)])
        if name == "soup":  # at a corner it is the policy
            mod = _points(result, "mod", line)
            found = [mod[0], *found, mod[-1]]
        label, colour, style = METHODS.get(name, (name, "#009E73", "v:"))
        form = {"linewidth": 0} if name == "reference" else {}
        method(axes, name if name in METHODS else "best of 4", found, x, y, label=label, **form)
        for r in found:
            bars = [[[max(0.0, m - low)], [max(0.0, high - m)]] for m, low, high in (r[x], r[y])]
            form = {"color": colour, "linewidth": 1, "alpha": 0.6, "zorder": 2}
            axes.errorbar([r[x][0]], [r[y][0]], xerr=bars[0], yerr=bars[1], **form)
            if len(r.get("trainings") or ()) > 1 and name in ("mod", "soup"):
                points = [run[:2] for run in r["trainings"]]
                form = {"color": colour, "alpha": 0.3, "markersize": 4}
                axes.plot(*zip(*points, strict=True), style[0], **form)
    for corner, name in zip((mod[0], mod[-1]), (x, y), strict=True):
        axes.annotate(f"policy: {name}", (corner[x][0], corner[y][0]), (6, -12),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    axes.legend(fontsize=9)
    name, seeds = result["sizes"]["model"] or "SmolLM2-135M-Instruct", result["sizes"]["seeds"]
    finish(axes, f"reward: {x}", f"reward: {y}", f"{name}, {seeds} trainings")


PICTURES = {"real_trade_off": trade_off}
