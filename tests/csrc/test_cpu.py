"""What is particular to the C++ backend: the torch backend's tokens, and results that depend on
neither threads nor the instruction set (up to rounding) nor the layout of the inputs.

Everything else is in the tests of the op, which run on every backend. All 1e6 draws of the first
test: `MOD_FUSED_DRAWS=1000000 pytest tests/csrc/test_cpu.py -k same_tokens` (an hour: the torch
backend takes 1 to 5 ms a draw).
"""

from __future__ import annotations

import locale
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import logits, normal

import mod_fused
from mod_fused import reference as oracle
from mod_fused.dispatch.backends import instruction_set
from mod_fused.divergence import alpha_of, get_divergence, number_of

ROOT = Path(__file__).resolve().parents[2]
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "alpha:0.25", "jeffrey")
DRAWS = int(os.environ.get("MOD_FUSED_DRAWS", "6000"))
FILTERS = (
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.4, "top_k": 100},
    {"min_p": 0.01},
)


@pytest.fixture(autouse=True)
def thread_count():
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def log_probs(*args, **kwargs):
    return mod_fused.log_probs(*args, **kwargs, backend="cpu")


def sample(*args, **kwargs):
    kwargs |= {"return_model_logprobs": True, "return_proposal_logprobs": True}
    return mod_fused.sample(*args, **kwargs, backend="cpu")


def assert_identical(x, y):
    """Same bits, NaN included."""
    for a, b in zip(x, y, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_same_tokens_as_the_torch_backend_for_the_same_seeds():
    cells = [(d, f) for d in DIVERGENCES for f in FILTERS]
    rows, other = -(-DRAWS // len(cells)), 0
    for i, (divergence, filters) in enumerate(cells):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        ref, policies = logits(100 + i, 1, 2100, 2, kind="typical", dtype=dtype)
        for start in range(0, rows, 500):
            count = min(500, rows - start)
            args = ref.expand(count, -1), [p.expand(count, -1) for p in policies], [0.5, 0.4]
            position = torch.arange(start, start + count)
            tokens = [
                mod_fused.sample(
                    *args, divergence=divergence, seed=i, position=position, backend=b, **filters
                ).tokens
                for b in ("cpu", "torch")
            ]
            other += int((tokens[0] != tokens[1]).sum())
    total = rows * len(cells)
    print(f"{total - other} of {total} tokens equal")
    # Two distributions TV e apart differ in at most 2 e of the draws (design §3), e about 1e-6.
    assert other <= max(1, total // 10_000)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("vocab", [1025, 40000])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_number_of_threads_changes_no_bit(batch, vocab, divergence):
    ref, policies = logits(120, batch, vocab, 2, dtype=torch.bfloat16)
    args, results = (ref, policies, [0.5, 0.25]), []
    ids = torch.arange(batch * 50).view(batch, 50) % vocab
    values = normal(121, 1, batch, 50)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                log_probs(*args, divergence=divergence),
                *sample(*args, divergence=divergence, seed=1),
                *sample(*args, divergence=divergence, seed=2, temperature=0.7, top_p=0.9),
                *sample(*args, divergence=divergence, seed=3, values=values, value_ids=ids),
                *sample(*args, divergence=divergence, seed=4, plausibility=0.01, temperature=0),
            ]
        )
    assert_identical(results[0], results[1])
    assert_identical(results[0], results[2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_is_the_same_bit_for_bit_alone_and_in_a_batch(divergence):
    torch.set_num_threads(2)
    ref, policies = logits(122, 7, 2600, 2)
    ref[2, 5], policies[1][4] = torch.nan, -torch.inf  # broken neighbours
    seeds, positions = torch.arange(7) + 5, torch.arange(7) % 3
    weights = normal(123, 7, 2).abs()
    batch = sample(
        ref, policies, weights, divergence=divergence, seed=seeds, position=positions, top_k=500
    )
    batch_log_p = log_probs(ref, policies, weights, divergence=divergence)
    assert batch.valid.tolist() == [b not in (2, 4) for b in range(7)]
    for b in range(7):
        row = slice(b, b + 1)
        args = ref[row], [p[row] for p in policies], weights[row]
        alone = sample(
            *args, divergence=divergence, seed=seeds[row], position=positions[row], top_k=500
        )
        assert_identical(alone, [x[row] for x in batch])
        assert_identical([log_probs(*args, divergence=divergence)], [batch_log_p[row]])


def odd_view(x: torch.Tensor) -> torch.Tensor:
    """The same rows as a view at an odd offset, with an odd stride, NaN in between."""
    buffer = torch.full((x.shape[0] * (x.shape[1] + 13) + 7,), torch.nan, dtype=x.dtype)
    view = buffer.as_strided(x.shape, (x.shape[1] + 13, 1), 3)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_views_at_odd_offsets_and_strides_give_the_same_bits(dtype, divergence):
    ref, policies = logits(124, 3, 50257, 2, dtype=dtype)
    plain, odd = (ref, policies), (odd_view(ref), [odd_view(p) for p in policies])
    results = [
        [
            log_probs(*x, [0.5, 0.25], divergence=divergence),
            *sample(*x, [0.5, 0.25], divergence=divergence, seed=1),
        ]
        for x in (plain, odd)
    ]
    assert_identical(*results)
    assert results[0][2].isfinite().all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_strided_masks_values_and_parameters_give_the_same_bits(divergence):
    batch, vocab = 4, 1501
    ref, policies = logits(125, batch, vocab, 1)
    rng = np.random.default_rng(125)
    allowed = torch.from_numpy(rng.random((batch, vocab)) < 0.5)
    bits = torch.nn.functional.pad(allowed, (0, -vocab % 32)).view(batch, -1, 32).long()
    words = ((bits << torch.arange(32)).sum(-1) + 2**31) % 2**32 - 2**31
    packed = words.to(torch.int32)
    parameters = {
        "temperature": torch.tensor([0.5, 1.0, 2.0, 0.0]),
        "top_p": torch.tensor([0.5, 1.0, 0.9, 0.9], dtype=torch.float64),
        "top_k": torch.tensor([0, 5, 1000, 2**40]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.0]),
        "seed": torch.arange(batch) * 7,
        "position": torch.arange(batch),
    }
    mixture = {
        "values": normal(126, 2, batch, 40),
        "value_ids": torch.from_numpy(np.argsort(rng.random((batch, vocab)))[:, :40].copy()),
        "value_weights": normal(127, batch, 2),
        "prefix_logprobs": normal(128, batch, 2).double(),
    }
    weights = normal(129, batch, 1)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 1:
            return torch.stack([x, x, x], dim=1)[:, 1]
        return x.t().contiguous().t()

    values = torch.stack([mixture["values"]] * 3, dim=2)[:, :, 1]  # a stride of 3 rows
    plain = sample(ref, policies, weights, divergence=divergence, mask=allowed, **mixture,
                   **parameters)  # fmt: skip
    assert plain.valid.all()
    for mask in (allowed.t().contiguous().t(), packed, packed.t().contiguous().t()):
        moved = {name: strided(x) for name, x in mixture.items() if name != "values"}
        drawn = sample(
            ref, policies, strided(weights), divergence=divergence, mask=mask, values=values,
            **moved, **{name: strided(x) for name, x in parameters.items()},
        )  # fmt: skip
        assert_identical(plain, drawn)


def test_early_arrivals_are_told_apart_as_in_float64():
    """Two tokens whose arrivals differ by 3e-6. What float32 holds of late ones is less exact."""
    noise = [oracle.exponentials(seed, 0, np.arange(2), stream=1) for seed in range(3000)]
    early = torch.from_numpy(np.array(noise).max(axis=1) < 3.0)
    seeds, even = early.nonzero()[:, 0], torch.from_numpy(np.log(noise))[early]
    for lead in (3e-6, -3e-6):
        ref = (even + torch.tensor([lead, 0.0])).float()  # `even` would be a tie
        drawn = sample(ref, [ref], [0.5], seed=seeds)
        assert torch.equal(drawn.tokens, (ref.double() - even).argmax(dim=1))


def test_top_p_just_above_a_token_keeps_those_tied_behind_it_and_no_other():
    mass = torch.full((1, 1000), 1.0 / 998.0)
    mass[0, 0], mass[0, -1] = 1.0, 0.5 / 998.0
    top_p = 1.0 / mass.double().sum().item() + 1e-5
    rows = mass.log().repeat(4000, 1)
    tokens = sample(rows, [rows], [0.5], top_p=top_p, seed=torch.arange(4000)).tokens
    assert (tokens == 999).sum() == 0 and len(tokens.unique()) > 800


def test_model_log_probabilities_far_from_0():
    ref, policy = torch.full((1, 4), 1e17), torch.tensor([[0.0, 1.0, -1.0, 2.0]]) - 1e4
    drawn = sample(ref, [policy], [0.5], divergence="jsd", seed=1)
    expected = torch.stack([x.double().log_softmax(1)[0, drawn.tokens[0]] for x in (ref, policy)])
    assert (drawn.model_logprobs[0] - expected).abs().max() <= 1e-6


# --- what a call leaves behind, and what it does not depend on ----------------------------------

STATM = Path("/proc/self/statm")
ROWS = [torch.randn(1, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
ONE, OUT = torch.ones(1), torch.empty(1, 64)
LEAVING: dict[str, Callable[[], object]] = {
    "out": lambda: log_probs(ROWS[0], ROWS[1:], [0.5, 0.4], out=OUT),
    "fresh": lambda: log_probs(ROWS[0], ROWS[1:], [0.5, 0.4], divergence="alpha:0.5"),
    "tensors": lambda: sample(
        ROWS[0], ROWS[1:], torch.ones(1, 2), seed=ONE.long(), temperature=ONE, position=ONE.long()
    ),
}


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("call", LEAVING.values(), ids=LEAVING)
def test_calls_leave_no_memory_behind(call):
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    count, grown = 10_000, []
    for _ in range(6):
        before = resident()
        for _ in range(count):
            call()
        grown.append((resident() - before) / count)
    # The first part warms up. The allocator takes pages now and then; a leak is in every part.
    assert statistics.median(grown[1:]) < 10, grown  # bytes; a lost string takes 48


@pytest.mark.skipif(shutil.which("localedef") is None, reason="no localedef to make a locale with")
def test_a_decimal_comma_changes_nothing(tmp_path, monkeypatch):
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("localedef has no sources")
    names = ("alpha:0.25", "alpha:0.9", "jsd")
    arguments = *logits(150, 2, 300, 2, kind="typical"), [0.5, 0.4]
    expected = [log_probs(*arguments, divergence=name) for name in names]
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
        assert locale.localeconv()["decimal_point"] == ","
        found = [log_probs(*arguments, divergence=name) for name in names]
    finally:
        locale.setlocale(locale.LC_ALL, before)
    assert_identical(found, expected)
    assert all(x.isfinite().all() for x in found)


# --- divergence.h against divergence.py ---------------------------------------------------------

RATIOS = np.concatenate([-np.geomspace(1e-6, 80, 60), [0.0], np.geomspace(1e-6, 80, 60)])
SMALL_ALPHAS = ("alpha:0.001", "alpha:0.02")  # measured from f'(1) = 0
QS = np.geomspace(1e-30, 1e30, 400)  # of a bounded divergence
JEFFREY_QS = np.concatenate([-np.geomspace(1e-4, 1e3, 100), [0.0], np.geomspace(1e-4, 1e30, 300)])


@pytest.mark.parametrize("function", ["deficit", "log_ratio", "log_slope"])
@pytest.mark.parametrize(
    "name",
    ["forward_kl", "jsd", "alpha:0.1", "alpha:0.5", "alpha:0.9", *SMALL_ALPHAS, "jeffrey"],
)
def test_divergences_equal_those_of_python(name, function):
    if function == "deficit":
        inputs = RATIOS if name != "jsd" else np.concatenate([RATIOS, [-1e4, -300.0, 300.0, 1e4]])
    else:
        inputs = JEFFREY_QS if name == "jeffrey" else QS
        inputs = inputs[inputs < 1e4] if name == "jsd" else inputs
        if name in SMALL_ALPHAS:  # from just above -1/alpha
            inputs = np.concatenate([-np.geomspace(1e-4, 0.9 / float(name[6:]), 99), inputs])
    x = torch.from_numpy(inputs).float()
    divergence = get_divergence(name)
    which = ("deficit", "log_ratio", "log_slope").index(function)
    numbers = number_of(divergence), alpha_of(divergence), which
    got = torch.ops.mod_fused.divergence_cpu(*numbers, x).double()
    expected = getattr(divergence, function)(x.double())
    error = (got - expected).abs() / expected.abs().clamp(min=0.5)
    assert error.max() <= 4e-6, f"at {x[error.argmax()]}: {got[error.argmax()]}"


# --- instruction sets ---------------------------------------------------------------------------

ISA_SCRIPT = """
import sys, torch, mod_fused
status = mod_fused.backends()["cpu"]
if status != "available":
    print(status)
    raise SystemExit
inputs, results = torch.load(sys.argv[1]), []
for divergence in inputs["divergences"]:
    for name in ("float32", "bfloat16"):
        tensors = [x.to(getattr(torch, name)) for x in inputs["logits"]]
        results.append(mod_fused.log_probs(tensors[0], tensors[1:], [0.5, 0.4],
                                           divergence=divergence, backend="cpu"))
        rows = [x.repeat(500, 1) for x in tensors]
        results.append(mod_fused.sample(rows[0], rows[1:], [0.5, 0.4], divergence=divergence,
                                        backend="cpu", seed=5, temperature=0.9).tokens)
torch.save(results, sys.argv[2])
print(mod_fused.dispatch.backends.instruction_set())
"""


def run_with(isa: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, *args], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "MOD_FUSED_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_instruction_set_of_this_machine_gives_the_same_results(tmp_path):
    ref, policies = logits(130, 2, 2600, 2, kind="typical")
    inputs = {"divergences": list(DIVERGENCES), "logits": [ref, *policies]}
    torch.save(inputs, tmp_path / "inputs.pt")
    found = {}
    for isa in ("baseline", "neon", "avx2", "avx512"):
        out = tmp_path / f"{isa}.pt"
        said = run_with(isa, str(tmp_path / "inputs.pt"), str(out))
        if out.exists():
            assert said == isa
            found[isa] = torch.load(out)
        else:
            assert "MOD_FUSED_CPU_ISA" in said and isa in said
    assert instruction_set() in found and {"baseline", "neon"} & set(found)
    first, *rest = found.values()
    for results in rest:
        for x, y in zip(first[::2], results[::2], strict=True):
            tv = 0.5 * (x.double().exp() - y.double().exp()).abs().sum(1)
            assert tv.max() <= 1e-6
        x, y = torch.cat(first[1::2]), torch.cat(results[1::2])
        assert (x != y).sum() <= len(x) // 10_000


ROW = torch.zeros(1, 4)
PACKED = {
    "logits": [ROW] * 3, "tensors": [None] * 7, "integers": [1, 4, 0, 1, 2],
    "numbers": [0.0, 1.0, 0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"logits": [ROW] * 10},
        {"logits": [ROW] * 2},
        {"tensors": [], "integers": []},
        {"tensors": [None] * 15},
        {"integers": [1, 4, 0, 1, 5]},  # no such divergence
        {"integers": [1, 4, 0, 1, -1]},
        {"numbers": []},
        {"numbers": [0.0, 1.0, 0.5]},  # a weight is missing
        {"numbers": [0.0, 1.0, 0.5, 0.5, 1.0]},  # of three scales, two
    ],
)
def test_arguments_that_pack_did_not_write_are_refused(changed):
    op = torch.ops.mod_fused.log_probs_cpu
    assert op(**PACKED).isfinite().all()
    with pytest.raises(RuntimeError, match="not what mod_fused/call/arguments.py packs"):
        op(**{**PACKED, **changed})


def test_an_unknown_instruction_set_is_reported():
    said = run_with("mmx")
    assert "'mmx'" in said and "avx2" in said


# --- without the extension ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MOD_FUSED_NO_EXTENSION": "1"}, "MOD_FUSED_NO_EXTENSION=1"),
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++"),
    ],
    ids=["left_out", "no_compiler"],
)
def test_without_the_extension_the_package_works_and_says_why(tmp_path, environment, reason):
    unwanted = shutil.ignore_patterns("_cpu*", "__pycache__")
    for folder in ("mod_fused", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unwanted)
    # Where an installation has it.
    shutil.copytree(
        tmp_path / "triton_kernels", tmp_path / "mod_fused/triton_kernels", dirs_exist_ok=True
    )
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    env = {**os.environ, **environment, "PYTHONPATH": str(tmp_path)}
    code = (
        # An editable install would lend its extension to the copy.
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import torch, mod_fused, mod_fused.cli\n"
        "print(mod_fused.__file__)\n"
        "print(mod_fused.backends()['cpu'])\n"
        "x = torch.zeros(1, 5)\n"
        "print(mod_fused.sample(x, [x], [1.0], seed=1).valid.item())\n"
        "sys.exit(mod_fused.cli.main(['doctor']))"
    )
    for arguments in (["setup.py", "--quiet", "build_ext", "--inplace"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    file, status, drawn, *doctor = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert status.startswith("the C++ extension was not built") and reason in status
    assert drawn == "True"
    assert "C++ extension was not built" in " ".join(" ".join(doctor).split())


# --- several callers ----------------------------------------------------------------------------


def test_threads_that_call_at_once_get_their_own_results():
    torch.set_num_threads(1)  # each caller works in its own thread
    calls = []
    for n in range(12):
        ref, policies = logits(140 + n, 2, 9000 + 4096 * (n % 5), 2)
        kwargs = {"divergence": DIVERGENCES[n % len(DIVERGENCES)], "seed": n, "top_p": 0.9}
        calls.append(((ref, policies, [0.5, 0.25]), kwargs))
    expected = [sample(*args, **kwargs) for args, kwargs in calls]

    def call(n: int) -> tuple[torch.Tensor, ...]:
        torch.set_num_threads(1)
        args, kwargs = calls[n % len(calls)]
        return sample(*args, **kwargs)

    with ThreadPoolExecutor(4) as pool:
        for n, result in enumerate(pool.map(call, range(20 * len(calls)))):
            assert_identical(result, expected[n % len(calls)])
