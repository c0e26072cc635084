"""A sixth divergence is added to a copy of the sources by the steps of CONTRIBUTING.md: four files.

It is Neyman's chi-squared, halved: f = (x - 1)^2 / (2 x), f' = (1 - x^-2) / 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: By file: what stands there, and what takes its place.
STEPS: dict[str, list[tuple[str, str]]] = {
    "mod_fused/divergence.py": [
        (
            "def wright_omega(",
            """class Neyman(Divergence):
    name, supremum, bounded = "neyman", 0.5, True

    def deficit(self, d):
        return 0.5 * torch.exp(-2.0 * d)

    def log_ratio(self, q):
        return -0.5 * torch.log(2.0 * q)

    def log_slope(self, q):
        return -1.5 * torch.log(2.0 * q)


def wright_omega(""",
        ),
        ("JeffreyDivergence)\n_ALPHA", "JeffreyDivergence, Neyman)\n_ALPHA"),
    ],
    "mod_fused/reference/slopes.py": [
        (
            '    if name == "jeffrey":',
            """    if name == "neyman":
        return Slope(0.5, lambda d: -0.5 * np.exp(-2.0 * d), lambda y: -0.5 * np.log(-2.0 * y))
    if name == "jeffrey":""",
        ),
    ],
    "triton_kernels/divergences.py": [
        (
            "#: All divergences, by name.",
            """@triton.jit
def neyman_deficit(d, a):
    return exp(d * -2.0) * 0.5


@triton.jit
def neyman_log_ratio(q, a):
    return log_of(q * 2.0) * -0.5


@triton.jit
def neyman_log_slope(q, a):
    return log_of(q * 2.0) * -1.5


#: All divergences, by name.""",
        ),
        (
            "}  # fmt: skip\n\n\ndef device_functions",
            """    "neyman": TritonDivergence(
        neyman_deficit, neyman_log_ratio, neyman_log_slope, clamped=True, bounded=True
    ),
}  # fmt: skip


def device_functions""",
        ),
    ],
    "csrc/divergence.h": [
        (
            "// The list of them:",
            """struct Neyman : Alpha<false> {
  static constexpr int number = 5;
  explicit Neyman(double) : Alpha<false>(2.0) {}
  static bool takes(double) { return true; }
};

// The list of them:""",
        ),
        (", Jeffrey>;", ", Jeffrey, Neyman>;"),
    ],
}

SCRIPT = """
import sys
import numpy as np
import torch
import mod_fused
from mod_fused import reference
from mod_fused.app.doctor import self_check
from mod_fused.divergence import DIVERGENCES

assert DIVERGENCES[5] == "neyman" and mod_fused.__file__.startswith(sys.argv[1])
rng = np.random.default_rng(0)
ref, *policies = (torch.from_numpy(rng.normal(size=(3, 1500))).float() for _ in range(3))
values, prefix = (torch.from_numpy(rng.random(shape)).float() for shape in ((1, 3, 1500), (3, 3)))
for backend in sys.argv[2:]:
    for given in ({"values": values}, {"normalizer": "zero"}, {"prefix_logprobs": -prefix}):
        call = (ref, policies, [0.6, 0.3]), {"divergence": "neyman", **given}
        found = mod_fused.log_probs(*call[0], **call[1], backend=backend)
        expected = reference.log_probs(*call[0], **call[1])
        tv = 0.5 * np.abs(np.exp(found.double().numpy()) - np.exp(expected)).sum(1)
        assert tv.max() <= 2e-5, (backend, given, tv)
    assert mod_fused.sample(*call[0], **call[1], seed=1, backend=backend).valid.all()
    if backend != "triton":  # whose interpreter would take a minute
        checks = list(self_check(backend, "cpu"))
        assert "neyman tokens" in [c.what for c in checks] and all(c.passed for c in checks)
print("right")
"""


def copy_with_the_sixth(tree: Path) -> None:
    """As installed: the Triton kernels lie inside the package."""
    ignored = shutil.ignore_patterns("__pycache__", "_cpu*")
    for name in ("csrc", "mod_fused"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copytree(ROOT / "triton_kernels", tree / "mod_fused/triton_kernels", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name, edits in STEPS.items():
        path = tree / name.replace("triton_kernels", "mod_fused/triton_kernels")
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{name} has not one {old!r}"
            text = text.replace(old, new)
        path.write_text(text)


def run(tree: Path, *words: str, **environment: str) -> str:
    # The editable install would find this repository's sources.
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    code += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    done = subprocess.run(
        [sys.executable, "-c", code + SCRIPT, str(tree), str(tree), *words],
        env={**os.environ, **environment}, cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sixth_divergence_takes_four_files_and_runs_on_every_backend(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    copy_with_the_sixth(tmp_path)
    setup = tmp_path / "setup.py"  # one instruction set and little optimisation: built in less time
    text = setup.read_text().replace("X86 = platform", "X86 = False and platform")
    setup.write_text(text.replace('"-O3"', '"-O1"'))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    assert "right" in run(tmp_path, "torch", "cpu")
    assert "right" in run(tmp_path, "triton", TRITON_INTERPRET="1")
