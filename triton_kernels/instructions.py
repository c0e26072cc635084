"""Counts registers and instructions in the kernels' machine code, without a GPU. The instructions
are those that each phase issues per token, on the shortest path through its loop over tiles.

    python -m mod_fused.triton_kernels.instructions --out bench/results
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx
import torch
import triton
import triton.language as tl

from ..call.checks import check_draw, check_mixture
from ..call.outputs import new_outputs
from ..divergence import DIVERGENCES
from .ahead_of_time import TARGETS, compile_launch, disassembled, machine_code
from .compiled import Launch
from .constants import TILE
from .launch import sample_launches
from .mixture import run_task

VOCAB, ROWS = 128256, 64
PHASES = ("sums", "deficits", "evaluation", "keys")
#: An H100 or H200 (SXM) at its highest clock; other clocks scale.
PROCESSORS, LANES, GHZ = 132, 128, 1.98
_LINE = re.compile(
    r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;(?:\s*/\* 0x[0-9a-f]+ \*/\s*/\* (0x[0-9a-f]+) \*/)?"
)
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


class Instruction(NamedTuple):
    """An instruction of an NVIDIA kernel."""

    text: str
    target: int | None  # of a branch: the index of an instruction
    always: bool  # a branch that is always taken
    word: int  # the upper half of its 16 bytes; 0 where the assembly does not show it


class Loop(NamedTuple):
    """The shortest path through an innermost loop."""

    instructions: int
    special: int  # those of the special function unit: exponentials and roots
    wide_loads: int  # loads of 16 bytes


def decoded(assembly: str) -> list[Instruction]:
    """The instructions in `cuobjdump -sass` of an NVIDIA kernel."""
    lines = _LINE.findall(assembly)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    code = []
    for _, text, word in lines:
        branch = _BRANCH.search(text)
        target = at.get(int(branch[1], 16)) if branch else None
        code.append(Instruction(text, target, text.startswith("BRA 0x"), int(word or "0", 16)))
    return code


def _shortest(code: Sequence[Instruction], first: int, last: int) -> Loop:
    """The shortest path from a loop's first instruction to the jump back."""
    edges = [(i, x.target) for i, x in enumerate(code) if x.target is not None]
    edges += [(i, i + 1) for i in range(first, last) if not code[i].always]
    inside = networkx.DiGraph(edges).subgraph(range(first, last + 1))
    text = [code[i].text for i in networkx.shortest_path(inside, first, last)]
    special, wide = (sum(name in x for x in text) for name in ("MUFU", "LDG.E.128"))
    return Loop(len(text), special, wide)


def loops(assembly: str) -> list[Loop]:
    """The innermost loops of an NVIDIA kernel's assembly, in their order."""
    code = decoded(assembly)
    spans = [(x.target, i) for i, x in enumerate(code) if x.target is not None and x.target < i]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_shortest(code, *span) for span in inner]


@triton.jit(do_not_specialize=["seed", "position"])
def phase_kernel(
    mixing,
    drawing,
    work,
    seed: tl.int64,
    position: tl.int64,
    # Meta-parameters
    PHASE: tl.constexpr,
    variant: tl.constexpr,
):
    """One phase of the shipped kernel alone, so that its loop can be told from the others."""
    phase = tl.full([], PHASE, tl.int32)  # a constant: the compiler still folds it
    tiles = tl.cdiv(mixing.vocab, TILE)
    chunks = tl.cdiv(tiles, variant.chunk)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    run_task(mixing, drawing, work, row, chunk, phase, 0, tiles, chunks, seed, position, variant)


def launched(divergence: str, rows: int = ROWS, vocab: int = VOCAB, **filters: Any) -> list[Launch]:
    """The launches of a call with two policies in bfloat16; more than one with `filters`, the
    arguments of `mod_fused.sample`."""
    logits = torch.empty((rows, vocab), dtype=torch.bfloat16, device="meta")
    mixing = check_mixture(logits, [logits] * 2, [0.6, 0.3], divergence=divergence)
    drawing = check_draw(mixing, seed=1, **filters)
    return sample_launches(mixing, drawing, new_outputs(mixing, drawing))


def phase_names(variant: Any) -> list[str]:
    """The phases of a variant in their order."""
    evaluations = ["evaluation"] * variant.evaluations
    keys = ["keys"] * (not variant.early)
    return ["sums"] * variant.sums + ["deficits"] * bool(evaluations) + evaluations + keys


def launch_per_phase(made: Launch) -> list[Launch]:
    """A launch's phases as launches of their own; the launch itself if it has one phase only."""
    if made.variant.phases == 1:
        return [made]
    *records, _, _, seed, position = made.arguments
    return [
        made._replace(kernel=phase_kernel, arguments=(*records, seed, position, phase))
        for phase in range(made.variant.phases)
    ]


def measure(divergence: str) -> dict[str, Any]:
    """Registers of the kernel, and instructions per token of each kind of phase."""
    (made,) = launched(divergence)
    whole = machine_code(compile_launch(made, TARGETS["sm_90"]))
    tokens = TILE.value // made.threads
    phases: dict[str, Any] = {}
    for name, part in zip(phase_names(made.variant), launch_per_phase(made), strict=True):
        if name in phases:
            continue
        compiled = compile_launch(part, TARGETS["sm_90"])
        found = loops(disassembled(compiled.asm["cubin"])[1])
        loop = max((x for x in found if x.wide_loads), key=lambda x: x.instructions)
        cost = {"instructions": loop.instructions, "special": loop.special}
        phases[name] = {what: count / tokens for what, count in cost.items()}
    moments = made.variant.excess is not None and not made.variant.root
    about = {"registers": whole.registers, "spills": whole.spills, "moments": moments}
    return about | {"phases": phases}


def microseconds(found: dict[str, Any], evaluations: int) -> float:
    """Microseconds to issue a row's instructions on a full GPU."""
    count = {"evaluation": evaluations}
    each = sum(x["instructions"] * count.get(n, 1) for n, x in found["phases"].items())
    return each * VOCAB / (PROCESSORS * LANES * GHZ * 1e3)


def markdown(data: dict[str, Any]) -> str:
    """The table."""
    text = f"""# Instructions a token

sm_90 machine code of Triton {data["triton"]}, two policies in bfloat16, V = {VOCAB}, many rows:
instructions issued for a token (special functions among them) on the shortest way through a phase's
loop; registers of the whole kernel. The last columns are what issuing them takes on {PROCESSORS}
multiprocessors at {GHZ} GHz, full, by the number of evaluations that a row needs; none where
moments solve it: a prediction, no measurement.

| divergence | registers | {" | ".join(PHASES)} | µs a row, none | 1 evaluation | 2 |
|---{"|---:" * (len(PHASES) + 4)}|
"""
    for name, found in data["divergences"].items():
        cells = [name, str(found["registers"])]
        for phase in PHASES:
            own = found["phases"].get(phase)
            cells.append(f"{own['instructions']:.1f} ({own['special']:.1f})" if own else "")
        iterates = "evaluation" in found["phases"]
        cells.append(f"{microseconds(found, 0):.2f}" * (found["moments"] or not iterates))
        cells += [f"{microseconds(found, n):.2f}" * iterates for n in (1, 2)]
        text += f"| {' | '.join(cells)} |\n"
    return text + "\n`python -m mod_fused.triton_kernels.instructions`\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="writes instructions.json and .md")
    args = parser.parse_args(argv)
    found = {name: measure(name) for name in DIVERGENCES}
    data = {"triton": triton.__version__, "divergences": found}
    print(markdown(data))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "instructions.json").write_text(json.dumps(data, indent=1) + "\n")
        (args.out / "instructions.md").write_text(markdown(data))


if __name__ == "__main__":
    main()
