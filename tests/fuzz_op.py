"""Fuzzing of the C++ backend: random calls against the torch backend, and against the float64
oracle where the two differ or the numbers are extreme.

    python tests/fuzz_op.py --minutes 60        # `make fuzz`; --examples 500 --seed 3 for less

With TRITON_INTERPRET=1 the Triton backend is compared as well, slowly.

A case is plain data (`Case`), so that what hypothesis prints on a failure can be pasted into
`CORPUS`. `fuzz_check.py` says what is checked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for a run as a script

import fuzz_check  # noqa: E402

INF, NAN = float("inf"), float("nan")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Parameter = tuple[str, tuple[float, ...]]  # form (number, list or a dtype's name), values by row


@dataclass(frozen=True)
class Case:
    """One call of the op. Tuples that are too short are repeated; numbers beyond a range wrap."""

    data_seed: int = 0
    wild: bool = False  # numbers near the ends of float32, judged by the oracle alone
    batch: int = 1
    vocab: int = 5
    policies: int = 1
    reference: bool = True
    divergence: str = "reverse_kl"
    normalizer: str = "exact"
    layout: str = "plain"
    dtypes: tuple[str, ...] = ("float32",)
    extra_columns: tuple[int, ...] = (0,)
    spread: float = 1.0  # of the reference's logits
    apart: float = 1.0  # of each policy's difference from them
    level: float = 0.0
    quantum: float = 0.0  # logits and values are rounded to multiples: ties
    excluded: float = 0.0  # fraction of -inf
    specials: tuple[tuple[int, int, int, float], ...] = ()  # (tensor, row, column, logit)
    weights: tuple[float, ...] = (0.5,)
    weights_form: str = "numbers"
    values: int = 0
    candidates: int = 0  # 0: dense
    value_scale: float = 1.0
    value_specials: tuple[tuple[int, int, int, float], ...] = ()
    bad_id: int = 0  # added to one candidate's id
    value_weights: tuple[float, ...] = ()
    prefix: str = ""  # dtype, "" for none
    prefix_scale: float = 1.0
    scales: tuple[float, ...] = ()
    own_mass: bool = False  # with a prefix and the exact normalizer
    plausibility: Parameter = ("number", (0.0,))
    plausibility_tensor: int = 0
    temperature: Parameter = ("number", (1.0,))
    top_k: Parameter = ("number", (0,))
    top_p: Parameter = ("number", (1.0,))
    min_p: Parameter = ("number", (0.0,))
    mask: str = "none"
    bias: str = "none"
    bias_scale: float = 1.0
    bias_specials: tuple[tuple[int, int, float], ...] = ()  # (row, column, bias)
    bias_bad_id: int = 0  # added to one id
    seed: int = 0
    per_row_seeds: bool = False
    position: int = 0


# Cases that failed once, or that nothing else reaches; always run first.
CORPUS = (
    Case(),
    # The largest bias is that of a token off the support.
    Case(
        vocab=50, specials=((0, 0, 7, -INF),), bias="dense float32", bias_specials=((0, 7, 1e30),)
    ),
    Case(vocab=1, policies=0, values=1, weights=()),
    # No term at all: no reference, all weights zero.
    Case(reference=False, weights=(0.0,), weights_form="tensor"),
    # JSD is linear: tokens hundreds of nats down are told apart, and a mask may leave only them.
    Case(divergence="jsd", vocab=50, spread=0.0, apart=300.0, weights=(1.0,), mask="bool"),
    # An exponent 1/alpha that float32 does not hold.
    Case(divergence="alpha:0.02", vocab=50),
    # 1 / temperature overflows.
    Case(temperature=("number", (1e-40,)), vocab=50),
    # Logits that differ by more than e^88 between tiles.
    Case(batch=3, vocab=2047, spread=3000.0),
    Case(batch=3, vocab=2047, spread=3000.0, divergence="jsd"),
    # A negative weight on a policy that gave up tokens, and candidates.
    Case(
        divergence="forward_kl",
        vocab=31,
        spread=3.0,
        apart=30.0,
        weights=(-0.5,),
        values=1,
        candidates=1,
    ),
    # Jeffrey at Z = 0 with a u far beyond e^88.
    Case(divergence="jeffrey", normalizer="zero", vocab=50, apart=30.0, weights=(-0.5,)),
    # Q of 1e27: what is left of E[D] after the cancellation is rounding.
    Case(
        divergence="jeffrey",
        batch=2,
        vocab=161,
        policies=1,
        spread=100.0,
        excluded=0.9,
        scales=(0.5, 1.0),
    ),
    # e^Q of Q below -87.
    Case(divergence="jsd", policies=1, weights=(-50.0,)),
    # Z = 0 where all of Q is below what float32 holds.
    Case(
        data_seed=1024,
        batch=3,
        vocab=33,
        divergence="forward_kl",
        normalizer="zero",
        layout="far",
        dtypes=("float16",),
        spread=3000.0,
        apart=0.0,
        level=9000.0,
        quantum=0.5,
        excluded=0.1,
        weights=(-50.0, 1.949059009552002, -0.38449913263320923, 2.0, 1.8642196655273438, -2.0),
        weights_form="rows",
        prefix="float64",
        prefix_scale=300.0,
        scales=(0.5, 1.0, 0.5),
    ),
    # A temperature at which differences vanish beside a normaliser, but not beside the peak.
    Case(
        data_seed=3,
        batch=4,
        vocab=1025,
        policies=4,
        divergence="forward_kl",
        apart=30.0,
        weights=(0.5, 0.5, 0.5, -1.8125),
        temperature=("number", (1e30,)),
        min_p=("list", (0.0, 0.0, 0.0, 1.0)),
    ),
    # Logits whose level is rounded to 1e-3 in float32.
    Case(
        data_seed=1,
        batch=4,
        vocab=1025,
        policies=2,
        divergence="alpha:0.5",
        dtypes=("bfloat16", "float32"),
        spread=3.0,
        level=9000.0,
        values=1,
        candidates=9,
        plausibility=("number", (1.0,)),
    ),
)


def tensors(case: Case) -> tuple[list[torch.Tensor], np.random.Generator]:
    """The logits, reference first, as views with NaN around them; the generator for the rest."""
    rng = np.random.default_rng([77, case.data_seed])
    count = case.policies + case.reference
    base = rng.normal(size=(case.batch, case.vocab)) * case.spread + case.level
    out: list[torch.Tensor] = []
    stack = None
    for i in range(count):
        data = base + (rng.normal(size=base.shape) * case.apart if i else 0.0)
        if case.quantum:
            data = np.round(data / case.quantum) * case.quantum
        if not case.wild:
            data = np.clip(data, -1e4, 1e4)
        data[rng.random(data.shape) < case.excluded] = -INF
        for tensor, row, column, x in case.specials:
            if tensor % count == i and case.batch:
                data[row % case.batch, column % case.vocab] = x
        stacked = case.layout == "stacked"
        dtype = DTYPES[case.dtypes[0 if stacked else i % len(case.dtypes)]]
        extra = case.extra_columns[0 if stacked else i % len(case.extra_columns)]
        values = torch.from_numpy(data).to(dtype)
        if stacked:
            if stack is None:
                stack = torch.full((count, case.batch, case.vocab + extra), NAN, dtype=dtype)
            stack[i, :, : case.vocab] = values
            out.append(stack[i])
            continue
        before = {"plain": 0, "expanded": 0, "offset": 1, "far": 13}[case.layout]
        buffer = torch.full((case.batch, before + case.vocab + extra + before), NAN, dtype=dtype)
        buffer[:, before : before + case.vocab] = values
        view = buffer[:, before : before + case.vocab + extra]
        if case.layout == "expanded" and case.batch:
            view = view[:1].expand(case.batch, -1)
        out.append(view)
    return out, rng


def by_row(values: tuple[float, ...], rows: int, width: int | None = None) -> Any:
    """The numbers of a case, repeated to [rows] or [rows, width]."""
    count = rows * (1 if width is None else width)
    flat = [values[i % len(values)] for i in range(count)]
    return flat if width is None else [flat[b * width : (b + 1) * width] for b in range(rows)]


def weights_of(values: tuple[float, ...], form: str, rows: int, width: int) -> Any:
    values = values or (1.0,)
    if form == "numbers":
        return [values[i % len(values)] for i in range(width)]
    if form == "rows" and rows and width:
        return by_row(values, rows, width)
    if form == "tensor":
        return torch.tensor([values[i % len(values)] for i in range(width)], dtype=torch.float64)
    matrix = torch.tensor(by_row(values, rows, width), dtype=torch.float32).view(rows, width)
    return matrix.t().contiguous().t()  # column-major


def parameter(given: Parameter, rows: int, kind: type) -> Any:
    form, values = given
    if form == "number":
        return kind(values[0])
    numbers = [kind(x) for x in by_row(values, rows)]
    if form == "list":
        return numbers
    spaced = torch.zeros(rows, 3, dtype=getattr(torch, form))
    spaced[:, 1] = torch.tensor(numbers, dtype=spaced.dtype)
    return spaced[:, 1]


def mask_of(case: Case, rng: np.random.Generator) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    allowed = rng.random((case.batch, case.vocab)) < 0.6
    if case.mask == "empty_row" and case.batch:
        allowed[0] = False
    mask = torch.from_numpy(allowed)
    if case.mask == "strided":
        return mask.t().contiguous().t()
    if case.mask.startswith("packed"):
        words = -(-case.vocab // 32)
        bits = np.ones((case.batch, words * 32), dtype=bool)  # beyond V: allowed, to tempt
        bits[:, : case.vocab] = allowed
        powers = bits.reshape(case.batch, words, 32) @ (1 << np.arange(32, dtype=np.int64))
        packed = torch.from_numpy(powers.astype(np.uint32).view(np.int32))
        return packed.t().contiguous().t() if case.mask == "packed_strided" else packed
    return mask


def bias_of(case: Case, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    if case.bias == "none":
        return {}
    form, _, dtype = case.bias.partition(" ")
    width = min(9, case.vocab) if form == "sparse" else case.vocab
    bias = rng.normal(size=(case.batch, width)) * case.bias_scale
    if case.quantum:
        bias = np.round(bias / case.quantum) * case.quantum
    for row, column, x in case.bias_specials:
        if case.batch:
            bias[row % case.batch, column % width] = x
    padded = torch.full((case.batch, width + 3), NAN, dtype=DTYPES[dtype])
    padded[:, 1 : width + 1] = torch.from_numpy(bias)
    made = {"bias": padded[:, 1 : width + 1]}
    if form == "shared" and case.batch:
        made["bias"] = made["bias"][0]
    if form == "sparse":
        rows = [rng.permutation(case.vocab)[:width] for _ in range(case.batch)]
        ids = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(case.batch, width))
        ids[:, 1::4] = -1
        if case.bias_bad_id and case.batch:
            ids[-1, -1] += case.bias_bad_id
        made["bias_ids"] = ids.t().contiguous().t()
    return made


def _near(logits: list[torch.Tensor], case: Case) -> bool:
    """Whether log-ratios stay inside the range of float32, which the oracle's own mass lacks."""
    scales = case.scales or (1.0,)
    rows = [
        (x[:, : case.vocab].double() * scales[i % len(scales)]).log_softmax(-1)
        for i, x in enumerate(logits)
    ]
    ratios = torch.stack([row - rows[0] for row in rows])
    return bool((ratios.nan_to_num(0.0, 0.0, 0.0).abs() < 60.0).all())


def build(case: Case) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Positional arguments, keywords of the mixture, keywords of the draw."""
    logits, rng = tensors(case)
    models = len(logits)
    ref = logits[0] if case.reference else None
    policies: Any = logits[case.reference :]
    if case.layout == "stacked" and len(policies):
        stack = policies[0].as_strided(
            (len(policies), *policies[0].shape),
            (case.batch * policies[0].shape[1], *policies[0].stride()),
        )
        policies = stack
    weights = weights_of(case.weights, case.weights_form, case.batch, case.policies)
    mixture: dict[str, Any] = {"divergence": case.divergence, "normalizer": case.normalizer}
    mixture["vocab_size"] = case.vocab
    if case.values:
        width = min(case.candidates, case.vocab) or case.vocab
        scores = rng.normal(size=(case.values, case.batch, width)) * case.value_scale
        if case.quantum:
            scores = np.round(scores / case.quantum) * case.quantum
        for tensor, row, column, x in case.value_specials:
            if case.batch:
                scores[tensor % case.values, row % case.batch, column % width] = x
        dtype = DTYPES[case.dtypes[-1]]
        padded = torch.full((case.values, case.batch, width + 3), NAN, dtype=dtype)
        padded[:, :, 1 : width + 1] = torch.from_numpy(scores)
        mixture["values"] = padded[:, :, 1 : width + 1]
        if case.candidates:
            rows = [rng.permutation(case.vocab)[:width] for _ in range(case.batch)]
            ids = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(case.batch, width))
            ids[:, 1::4] = -1
            if case.bad_id and case.batch:
                ids[-1, -1] += case.bad_id
            mixture["value_ids"] = ids.t().contiguous().t()
        if case.value_weights:
            mixture["value_weights"] = weights_of(
                case.value_weights, case.weights_form, case.batch, case.values
            )
    if case.prefix:
        prefix = rng.normal(size=(models, case.batch)) * case.prefix_scale
        mixture["prefix_logprobs"] = torch.from_numpy(prefix).to(getattr(torch, case.prefix)).t()
        if case.own_mass and case.normalizer == "exact" and _near(logits, case):
            own = prefix.max(axis=0) + rng.normal(size=case.batch)
            mixture["mixture_prefix_logprobs"] = torch.from_numpy(own)
    if case.scales:
        mixture["logit_scales"] = [case.scales[i % len(case.scales)] for i in range(models)]
    if case.plausibility[1] != (0.0,):
        mixture["plausibility"] = parameter(case.plausibility, case.batch, float)
        first = 0 if case.reference else 1
        mixture["plausibility_tensor"] = first + case.plausibility_tensor % models
    draw: dict[str, Any] = {
        "temperature": parameter(case.temperature, case.batch, float),
        "top_k": parameter(case.top_k, case.batch, int),
        "top_p": parameter(case.top_p, case.batch, float),
        "min_p": parameter(case.min_p, case.batch, float),
        "mask": mask_of(case, rng),
        **bias_of(case, rng),
        "seed": case.seed,
        "position": case.position,
    }
    if case.per_row_seeds:
        draw["seed"] = torch.arange(2 * case.batch)[::2] * 7919 + case.seed % 2**40
        draw["position"] = torch.arange(case.batch) + case.position % 2**62
    return (ref, policies, weights), mixture, draw


def pick(*xs: Any) -> st.SearchStrategy:
    return st.sampled_from(xs)


@st.composite
def cases(draw: Any, wild: bool | None = None) -> Case:
    """Calls that the public functions accept; one in five is wild, or all are, small ones."""
    one, small = draw, wild is True
    wild = wild if wild is not None else one(st.integers(0, 4)) == 4
    policies = one(st.integers(0, 4))
    reference = policies == 0 or one(st.integers(0, 3)) > 0
    divergence = one(
        pick("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "alpha:0.25", "alpha:0.9",
             "alpha:0.05", "alpha:0.02", "alpha:0.001", "jeffrey")
    ) if reference else "reverse_kl"  # fmt: skip
    values = one(st.integers(0 if policies else 1, 2))
    magnitudes = [1e-40, 1e30, -1e38, 1e300] if wild else []
    extreme = [150.0, 1e3, 1e36, -1e36, 3e38, 1e-37, 1e-39, 1e-300] if wild else []
    weight = st.one_of(
        pick(0.5, 1.0, 0.0, 0.25, -0.5, -1.0, 2.0, 50.0, -50.0, 1e-3, *magnitudes, *extreme),
        st.floats(-2.0, 2.0, width=32),
    )
    # Numbers are checked on the host; a tensor may hold what only the device sees.
    form = one(pick("numbers", "rows", "tensor", "tensor_rows"))
    rarely_bad = pick(*[0.5] * 20, NAN, INF) if form.startswith("tensor") else weight
    weights = one(st.lists(st.one_of(weight, weight, rarely_bad), min_size=1, max_size=8))
    special = st.tuples(
        st.integers(0, 4), st.integers(0, 4), st.integers(0, 2999),
        pick(*[0.0, -0.0, 1e-45, 1e-38, -INF, 1e4, -1e4, 60.0] * 4, NAN, INF,
             *([3e38, -3e38, -3.4028234663852886e38, 1e37, -1e36] * 2 if wild else [])),
    )  # fmt: skip
    scale = pick(1.0, 0.5, 1.7, 0.01, *([2e-38, 1e-30, 1e30, 3e38] if wild else []))
    often_few = st.one_of(st.just(()), st.lists(special, max_size=5).map(tuple))

    bias_special = st.tuples(
        st.integers(0, 4), st.integers(0, 2999),
        pick(*[100.0, -100.0, 1e4, -1e4, 1e30, -1e30, 3e38, -3e38, -INF] * 4, NAN, INF),
    )  # fmt: skip

    def option(good: list[float], bad: list[float], dtypes: tuple[str, ...]) -> Parameter:
        chosen = one(pick("off", "off", "number", "list", *dtypes))
        if chosen == "off":
            return ("number", (good[0],))
        allowed = good * 4 + bad if chosen in dtypes else good
        size = 1 if chosen == "number" else 5
        return (chosen, tuple(one(st.lists(pick(*allowed), min_size=size, max_size=size))))

    floats, ints = ("float32", "float64"), ("int32", "int64")
    sizes = st.integers(1, 9) if small else st.one_of(
        pick(1, 2, 31, 32, 33, 1023, 1024, 1025, 2047, 2048, 2049, 3000), st.integers(1, 3000)
    )  # fmt: skip
    return Case(
        data_seed=one(st.integers(0, 2**32)),
        wild=wild,
        batch=one(st.integers(0, 5)),
        vocab=one(sizes),
        policies=policies,
        reference=reference,
        divergence=divergence,
        normalizer=one(pick("exact", "exact", "zero")),
        layout=one(pick("plain", "stacked", "offset", "far", "expanded")),
        dtypes=tuple(one(st.lists(pick(*DTYPES), min_size=1, max_size=3))),
        extra_columns=tuple(one(st.lists(st.integers(0, 3), min_size=1, max_size=3))),
        spread=one(pick(3.0, 1.0, 0.0, 1e-3, 10.0, 100.0, 3000.0, *magnitudes)),
        apart=one(pick(1.0, 3.0, 0.0, 1e-3, 30.0, 300.0, *magnitudes)),
        level=one(pick(0.0, 0.0, 0.0, 7.0, -1000.0, 9000.0)),
        quantum=one(pick(0.0, 0.0, 0.5, 0.0625)),
        excluded=one(pick(*[0.0] * 8, *[0.01, 0.1, 0.5] * 3, 0.9, 1.0)),
        specials=one(often_few),
        weights=tuple(weights),
        weights_form=form,
        values=values,
        candidates=one(st.one_of(st.just(0), st.integers(1, 40))) if values else 0,
        value_scale=one(pick(1.0, 0.0, 0.1, 10.0, 1000.0, *magnitudes)),
        value_specials=one(often_few) if values else (),
        bad_id=one(pick(0, 0, 0, 0, -5, 3000, 2**62, -(2**63))) if wild else 0,
        value_weights=tuple(one(st.lists(weight, max_size=3))) if values else (),
        prefix=one(pick("", "float32", "float64")),
        prefix_scale=one(pick(1.0, 10.0, 80.0, 300.0, *magnitudes)),
        scales=tuple(one(st.one_of(st.just([]), st.lists(scale, min_size=1)))),
        own_mass=one(st.booleans()),
        plausibility=option([0.0, 1.0, 0.1, 1e-5, 1e-30], [-0.1, 1.1, NAN], floats),
        plausibility_tensor=one(st.integers(0, 4)),
        temperature=option(
            [1.0, 0.0, 0.7, 0.3, 1.5, 10.0, 0.01, 1e30, 1e-30, 1e-40], [-1.0, NAN, INF], floats
        ),
        top_k=option([0, 1, 2, 10, 1000, 2**31 - 1], [-1], ints),
        top_p=option([1.0, 0.9, 0.5, 0.1, 1e-6, 0.999999], [0.0, -1.0, 1.5, NAN], floats),
        min_p=option([0.0, 0.05, 0.5, 1.0, 1e-6, 1e-30], [-0.1, 1.1, NAN], floats),
        mask=one(pick("none", "none", "bool", "strided", "packed", "packed_strided", "empty_row")),
        bias=one(
            pick(
                *["none"] * 4, *(f"{f} {d}" for f in ("dense", "shared", "sparse") for d in DTYPES)
            )
        ),
        bias_scale=one(pick(1.0, 0.0, 0.1, 10.0, 1000.0, *magnitudes)),
        bias_specials=one(st.one_of(st.just(()), st.lists(bias_special, max_size=4).map(tuple))),
        bias_bad_id=one(pick(*[0] * 8, -5, 3000, 2**62)),
        seed=one(st.one_of(st.integers(0, 100), st.integers(-(2**63), 2**64 - 1))),
        per_row_seeds=one(st.booleans()),
        position=one(st.one_of(st.integers(0, 10), st.integers(0, 2**63 - 1))),
    )


tally: Counter[str] = Counter()


def check(case: Case) -> None:
    args, mixture, draw = build(case)
    tally.update(fuzz_check.check(args, mixture, draw, wild=case.wild))


def run(examples: int, seed: int, record: Path | None = None, wild: bool | None = None) -> None:
    """`examples` random cases; raises what the first bad one raises, after shrinking it."""

    def body(case: Case) -> None:
        if record is not None:  # what ran last, should the process die
            record.write_text(f"{case!r}\n")
        check(case)

    test = hypothesis.given(cases(wild))(body)
    test = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )(test)
    hypothesis.seed(seed)(test)()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="how long; 0: by --examples")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wild", action="store_true", help="extreme numbers only, small rows")
    options = parser.parse_args()
    record = Path(tempfile.mkdtemp(prefix="fuzz_op_")) / "last_case.txt"
    print(f"the case being run is in {record}", flush=True)
    failures = 0
    for case in CORPUS:
        record.write_text(f"{case!r}\n")
        try:
            check(case)
        except Exception:  # report, and go on with the next
            print(case)
            traceback.print_exc()
            failures += 1
    end, seed = time.monotonic() + 60.0 * options.minutes, options.seed
    while True:
        try:
            run(500 if options.minutes else options.examples, seed, record, options.wild or None)
        except Exception:  # report, and go on with another seed
            traceback.print_exc()
            failures += 1
        seed += 1
        print(f"{failures} failures up to seed {seed - 1}, {dict(tally)}", flush=True)
        if time.monotonic() >= end:
            return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
