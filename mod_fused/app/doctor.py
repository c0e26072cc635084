"""`mod-fused doctor`: what is installed, which backends work, do they agree with the oracle."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import __version__, backends, explain, log_probs, reference, sample
from ..dispatch.backends import AVAILABLE, BACKENDS
from ..divergence import DIVERGENCES
from ..triton_kernels.configurations import in_force
from .terminal import table, write

TOLERANCE = 2e-5  # total variation from the oracle on the same inputs: design contract
DRAWS = 8
# A race that is decided by less may go the other way in fp32: about 2 TV of the draws, see design.
CLOSE_RACE = 1e-3


class Check(NamedTuple):
    """One line of the self-check."""

    backend: str
    device: str
    what: str
    passed: bool
    detail: str
    explanation: str = ""  # of the first wrong row


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters, or "not installed"."""
    packages = ("torch", "triton", "numpy", "transformers", "matplotlib", "rich")
    ours = {"python": platform.python_version(), "mod_fused": __version__}
    return ours | {name: _version(name) for name in packages}


def devices() -> list[str]:
    """The devices torch sees, one description each."""
    cpu = f"cpu ({torch.get_num_threads()} threads)"
    cuda = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability "
        + ".".join(map(str, torch.cuda.get_device_capability(i)))
        for i in range(torch.cuda.device_count())
    ]
    return [cpu, *(cuda or ["no CUDA device"])]


def working() -> list[tuple[str, str]]:
    """Every (backend, device type) to check: available backends on the devices of this machine."""
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    found = backends()
    return [
        (backend.name, device)
        for backend in BACKENDS
        for device in backend.device_types or here
        if found[backend.name] == AVAILABLE
    ]


def self_check(backend: str, device: str) -> Iterator[Check]:
    """Compare `backend` on `device` with the float64 oracle on small random inputs.

    Yields one check of log pi* (total variation at most `TOLERANCE`) and one of the drawn tokens
    (those of the oracle's race) for each of the five divergences. A backend that raises fails its
    check with the error as detail.
    """
    for divergence in DIVERGENCES:
        generator = torch.Generator().manual_seed(0)
        rows, vocab, policies = 4, 2500, 2  # three tiles of the race, the last one not full
        base = 3.0 * torch.randn(rows, vocab, generator=generator)
        shifts = torch.randn(policies, rows, vocab, generator=generator)
        base[:, 7] = -torch.inf
        logits = [base, *(base + shifts)]
        weights = [0.6, 0.3]
        oracle = reference.log_probs(logits[0], logits[1:], weights, divergence=divergence)
        expected = np.exp(oracle)
        ref, *pols = (x.to(device) for x in logits)
        try:
            out = log_probs(ref, pols, weights, divergence=divergence, backend=backend)
            got = out.double().exp().cpu().numpy()
            distances = np.abs(got - expected).sum(1) / 2
            close = bool(distances.max() <= TOLERANCE)
            arguments: dict[str, Any] = {"divergence": divergence, "backend": backend}
            found = ""
            if not close:
                first = int(np.argmin(distances <= TOLERANCE))  # NaN is wrong too
                found = str(explain(ref, pols, weights, **arguments, seed=1, row=first))
            detail = f"TV {distances.max():.1e}"
            yield Check(backend, device, f"{divergence} log pi*", close, detail, found)
            wrong = draws = 0
            found = ""
            seeds = list(range(1, rows + 1))
            for position in range(DRAWS):
                noise: dict[str, Any] = {
                    "seed": torch.tensor(seeds, device=device),
                    "position": position,
                }
                tokens = sample(ref, pols, weights, **arguments, **noise).tokens.tolist()
                for row, (token, p, seed) in enumerate(zip(tokens, expected, seeds, strict=True)):
                    if reference.race_margin(p, seed, position) <= CLOSE_RACE:
                        continue
                    draws += 1
                    if token != reference.race(p, seed, position):
                        wrong += 1
                        found = found or str(
                            explain(ref, pols, weights, **arguments, **noise, row=row)
                        )
            detail = f"{draws - wrong} of {draws} tokens as the oracle's race draws them"
            passed = draws > 0 and not wrong
            yield Check(backend, device, f"{divergence} tokens", passed, detail, found)
        except Exception as error:  # a broken backend is what this command is for
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Check(backend, device, divergence, False, detail)


def run() -> int:
    """Print the report; 0 if at least one backend is available and every check passed, else 1."""
    write("versions", style="bold")
    table(["package", "version"], list(versions().items()))
    write("\ndevices", style="bold")
    for device in devices():
        write(f"  {device}")
    write("\nbackends", style="bold")
    table(["backend", "state"], list(backends().items()))
    write(f"\nlaunch table of the Triton kernels: {in_force()}")
    write("\nself-check against the float64 oracle", style="bold")
    checks = [check for place in working() for check in self_check(*place)]
    table(
        ["backend", "device", "check", "result", "detail"],
        [[*c[:3], "ok" if c.passed else "FAILED", c.detail] for c in checks],
    )
    failed = [c for c in checks if not c.passed]
    explained = next((c for c in failed if c.explanation), None)
    if explained is not None:
        write(f"\nthe first wrong row: {explained.backend}, {explained.what}", style="bold")
        write(explained.explanation)
    if failed or not checks:
        problem = f"{len(failed)} of {len(checks)} checks FAILED" if checks else "no backend works"
        write(f"\n{problem}", style="bold red")
        return 1
    write(f"\nall {len(checks)} checks passed", style="bold green")
    return 0


def add_options(commands: Any) -> None:
    """Add the command."""
    doctor = commands.add_parser("doctor", help="versions, devices, backends and a self-check")
    doctor.set_defaults(run=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    return run()
