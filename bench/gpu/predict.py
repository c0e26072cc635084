"""`python -m bench.gpu.predict --out DIR`: predicts the times of calls on an H200 from the machine
code of the Triton kernels, without a GPU. It compiles for sm_90 and measures nothing.

    python -m bench.gpu.predict --out bench/results            # predicted.json, predicted.md
    python -m bench.gpu.predict --only jsd --vocab 128256 --baseline FILE    # less, beside FILE

What is assumed; ratios can be trusted more than times, which are right to about 30%:

- Latencies are nominal (predict_walk.py): L2 300, HBM 800, atomic 350, fence 500, barrier 30,
  shuffle 24 cycles at 1.98 GHz. Only the issue of instructions and fixed latencies are the
  compiler's own. Logits come from HBM in the first phase from B = 64 on, else from the L2 cache.
- A phase costs the cheapest path: all rows are valid, their tiles whole, their logits finite. The
  warps of a program run side by side. Caches of instructions never miss, banks never conflict.
- On a full GPU a phase takes the longest of: the latency of its tasks over the programs that a
  multiprocessor holds, the issue of its instructions, and, for the first one, the HBM. The phases'
  times add up, and so do the ends of all rows. Half of the time of one row alone is added for
  filling and draining; the whole is at least that time.
- One row alone takes its phases one after the other: a task, the end of the phase by the program
  that arrives last, a handoff. Claims, handoffs and tasks that are skipped are sums of nominal
  latencies (predict_model.py).
- Forward KL and Jensen-Shannon need no evaluation, as near the reference (moments.py); alpha needs
  one, Jeffrey two. The others are skipped.
- The launch of the filters begins 1 µs after the mixture's end; one of its programs does a row, or
  a slice of one that is flat. Usually a row makes no sweep over its keys that the kernel can
  avoid; the report's last column is with all of them. A search has the passes that its code shows,
  else `--search`: 11, for 32 bits at three a pass. That is too many where a kernel stops early.
- The time in front of the kernel is not counted: host and launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mod_fused.triton_kernels.ahead_of_time import (
    TARGETS,
    MachineCode,
    compile_launch,
    disassembled,
    machine_code,
)
from mod_fused.triton_kernels.compiled import Launch
from mod_fused.triton_kernels.configurations import TABLE, processors
from mod_fused.triton_kernels.filters import filter_kernel
from mod_fused.triton_kernels.instructions import launch_per_phase, launched, phase_names
from mod_fused.triton_kernels.launch import row_slices

from mod_fused.divergence import DIVERGENCES

from .. import report
from ..problem import FILTERS
from .benchmark import COLD_FROM
from .predict_model import (
    GHZ,
    PROCESSORS,
    Kernel,
    Selection,
    microseconds,
    predicted,
    resident,
)
from .predict_report import markdown
from .predict_walk import HBM, L2, SEARCH, Cost, Phase, Program

VOCAB = 128256
VOCABULARIES = (VOCAB, 32000, 262144)
SHAPES = [(VOCAB, rows) for rows in (1, 8, 64, 256)]
SHAPES += [(vocab, rows) for vocab in VOCABULARIES[1:] for rows in (1, 256)]
#: The shapes whose phases the report shows: few rows and many.
SHOWN = ((VOCAB, 1), (VOCAB, 256))
EVALUATIONS = {"jeffrey": 2, "forward_kl": 0, "jsd": 0}  # that solve a row; else 1
ROW_BYTES = 3 * 2  # of a token: bfloat16 logits of a reference and two policies
_FILTERS = {name: FILTERS[name] for name in ("top_k=50", "top_p=0.9", "min_p=0.05")}
_FILTERS["top_k=50, top_p=0.9"] = FILTERS["top_k=50"] | FILTERS["top_p=0.9"]
#: By name: the divergence and the filters of a call.
CALLS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in DIVERGENCES}
CALLS |= {f"reverse_kl, {name}": ("reverse_kl", x) for name, x in _FILTERS.items()}

_compiled: dict[Any, tuple[Program, MachineCode]] = {}


def compiled(launch: Launch) -> tuple[Program, MachineCode]:
    """The machine code of a launch; shapes that share it are compiled once."""
    parameters = zip(launch.arguments, launch.kernel.params, strict=False)
    constants = tuple(x for x, parameter in parameters if parameter.is_constexpr)
    key = (launch.kernel, launch.variant.cache_key, launch.threads, constants)
    if key not in _compiled:
        made = compile_launch(launch, TARGETS["sm_90"])
        assembly = disassembled(made.asm["cubin"])[1]
        _compiled[key] = Program(assembly), machine_code(made)
    return _compiled[key]


def _programs(launch: Launch, code: MachineCode) -> int:
    """How many programs a multiprocessor holds."""
    most = resident(launch.threads, code.registers, code.shared)
    if launch.variant.phases > 1:  # persistent: the launch says how many there are
        device = launch.arguments[0].logits[0].device
        most = min(most, max(1, launch.grid[0] // processors(device)))
    return most


def _mixture(launch: Launch, divergence: str, rows: int) -> tuple[Kernel, list[dict[str, Any]]]:
    """The mixture's kernel, and what the report shows of its phases."""
    whole, code = compiled(launch)
    names, parts = phase_names(launch.variant), launch_per_phase(launch)
    left = {"evaluation": EVALUATIONS.get(divergence, 1)}
    phases: list[Phase] = []
    records: list[dict[str, Any]] = []
    skipped = 0
    programs = _programs(launch, code)
    for n, (name, part) in enumerate(zip(names, parts, strict=True)):
        again = name in names[:n]
        if left.get(name, 1) < 1:
            skipped += 1
            continue
        if name in left:
            left[name] -= 1
        if again:
            phases.append(phases[names[:n].index(name)])
            continue
        program, own = compiled(part)
        cold = n == 0 and rows >= COLD_FROM
        phases.append(program.phase(launch.threads, HBM if cold else L2))
        about = {"phase": name, "registers": own.registers, "kernel_registers": code.registers}
        about |= {"threads": launch.threads, "programs": programs}
        records.append(about | _shown(phases[-1]))
    idle = whole.idle(launch.threads) if launch.variant.phases > 1 else None
    chunk = launch.variant.chunk
    return Kernel(launch.threads, chunk, programs, phases, skipped, idle), records


def _shown(phase: Phase) -> dict[str, Any]:
    """The figures of a phase."""
    out: dict[str, Any] = {"task_us": microseconds(phase.task.cycles)}
    out |= {f"tile_{name}": x for name, x in phase.tile._asdict().items()}
    return out | _ending(phase.end)


def _ending(end: Cost) -> dict[str, Any]:
    figures = {f"end_{name}": x for name, x in end._asdict().items() if name != "wide_loads"}
    return figures | {"end_us": microseconds(end.cycles)}


def _selections(
    launches: Sequence[Launch], vocab: int, batch: int, search: int
) -> tuple[list[Selection], list[Selection], list[dict[str, Any]]]:
    """The launches of the filters as they usually run, as they run where all loops do, and what the
    report shows of the former."""
    usual, sweeping, records = [], [], []
    for launch in launches:
        program, code = compiled(launch)
        programs = resident(launch.threads, code.registers, code.shared)
        slices = 1
        if launch.kernel is filter_kernel:
            slices = row_slices(vocab, batch, TABLE["log_linear, few rows"], PROCESSORS)
        tokens = -(-vocab // (1024 * slices)) * 1024 if slices > 1 else vocab  # of a program
        rows = program.rows(launch.threads, tokens, search)
        for out, row in zip((usual, sweeping), rows, strict=True):
            out.append(Selection(launch.threads, programs, row))
        about = {"phase": launch.kernel.fn.__name__, "registers": code.registers}
        about |= {"kernel_registers": code.registers, "threads": launch.threads}
        records.append(about | {"programs": programs} | _ending(rows[0]))
    return usual, sweeping, records


def predict(
    call: str, vocab: int, rows: int, search: int = SEARCH
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report's row of a call, and its records of the call's phases."""
    divergence, filters = CALLS[call]
    mixture, *others = launched(divergence, rows, vocab, **filters)
    kernel, records = _mixture(mixture, divergence, rows)
    usual, sweeping, more = _selections(others, vocab, rows, search)
    found = predicted(kernel, usual, rows, vocab, ROW_BYTES * vocab)
    out = {"call": call, "vocab": vocab, "batch": rows, **found._asdict()}
    if others:
        out["sweeping_us"] = predicted(kernel, sweeping, rows, vocab, ROW_BYTES * vocab).us
    label = {"call": call, "vocab": vocab, "batch": rows}
    return out, [label | x for x in (*records, *more)]


def beside(rows: Sequence[dict[str, Any]], baseline: report.Result) -> None:
    """Add `before_us`, the prediction of an earlier result for the same call and shape."""
    keys = ("call", "vocab", "batch")
    earlier = {tuple(row[k] for k in keys): row["us"] for row in baseline["rows"]}
    for row in rows:
        row["before_us"] = earlier.get(tuple(row[k] for k in keys))


def predictions(
    calls: Sequence[str],
    vocabularies: Sequence[int],
    search: int = SEARCH,
    baseline: report.Result | None = None,
) -> report.Result:
    """The result of a run."""
    rows, phases = [], []
    for call in calls:
        for vocab, batch in (shape for shape in SHAPES if shape[0] in vocabularies):
            report.note(f"{call}, V = {vocab}, B = {batch}")
            row, records = predict(call, vocab, batch, search)
            rows.append(row)
            phases += records if (vocab, batch) in SHOWN else []
    result: report.Result = {
        "case": "predicted",
        "what": "times from machine code, a prediction and no measurement",
        "command": "python -m bench.gpu.predict",
        "machine": {
            "GPU": f"none; an H200 of {PROCESSORS} multiprocessors at {GHZ} GHz is assumed",
            "triton": metadata.version("triton"),
            "commit": report.machine()["commit"],
        },
    }
    if baseline is not None:
        beside(rows, baseline)
        machine = baseline["machine"]
        result["base"] = f"commit {machine['commit']}, triton {machine['triton']}"
    return result | {"search": search, "rows": rows, "phases": phases}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.predict", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="writes predicted.json and predicted.md")
    add("--only", nargs="+", choices=CALLS, metavar="CALL", help=f"some of: {'; '.join(CALLS)}")
    add("--vocab", nargs="+", type=int, choices=VOCABULARIES, metavar="V", help="these alone")
    add("--search", type=int, default=SEARCH, metavar="N", help="passes of a search of the filters")
    add("--baseline", type=Path, metavar="FILE", help="an earlier predicted.json, shown beside")
    args = parser.parse_args(argv)
    baseline = report.load(args.baseline) if args.baseline else None
    calls, vocabularies = args.only or [*CALLS], args.vocab or VOCABULARIES
    result = report.rounded(predictions(calls, vocabularies, args.search, baseline))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report.save(result, args.out / "predicted.json")
        (args.out / "predicted.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
