"""`python -m bench.gpu_check --out DIR`: the tests under tests/gpu, then the benchmark's table
(DIR/gpu.json, DIR/gpu.md), on a machine with a GPU in under 8 minutes.

Each file of tests runs in a process of its own with a time limit, and so does the benchmark: after
a crash or a deadlock the next one still runs. Their output is in DIR/gpu.log, pytest's reports in
DIR/NAME.xml. The exit status is 0 when everything passed. `--dry-run` runs the same on the CPU, in
Triton's interpreter, on tiny shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "gpu"
TOTAL_SECONDS, TEST_SECONDS, BENCHMARK_SECONDS = 465.0, 110.0, 240.0
_SLOWER = 8  # the limits are so many times longer for the interpreter


@contextlib.contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python WORDS` in a process group of its own, which is killed at the end."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-u", *words], cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver
            process.wait(10.0)


def run(name: str, words: Sequence[str], log: Path, seconds: float) -> bool:
    """Run `python WORDS` for at most `seconds`, print how it ended, return whether it passed."""
    start, offset = time.monotonic(), log.stat().st_size if log.exists() else 0
    with started(words, log) as process:
        try:
            status = process.wait(seconds)
            said = "passed" if status == 0 else f"FAILED, exit status {status}"
        except subprocess.TimeoutExpired:
            status, said = None, "OUT OF TIME"
    output = log.read_bytes()[offset:].decode(errors="replace")
    print(f"{name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    _, summary, rest = output.rpartition(" short test summary info ")
    shown = rest if summary else output[-1500:] if status != 0 else output.rstrip().split("\n")[-1]
    print(textwrap.indent(shown.strip("=\n "), "    "), flush=True)
    return status == 0


def run_tests(files: Mapping[str, Path], out: Path, seconds: float, processes: int) -> bool:
    """Run pytest on each file in `processes` processes; return whether all passed."""
    words = ["-m", "pytest", "-m", "gpu", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    words += ["-o", f"faulthandler_timeout={0.5 * seconds}"]  # says where a test is stuck
    if processes > 1 and importlib.util.find_spec("xdist"):
        words += ["-n", str(processes), "--dist", "worksteal"]
    passed = [
        run(name, [*words, f"--junitxml={out / name}.xml", str(file)], out / "gpu.log", seconds)
        for name, file in files.items()
    ]
    return all(passed) and bool(passed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go here")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, in the interpreter")
    args = parser.parse_args(argv)
    if args.dry_run:
        os.environ.update(TRITON_INTERPRET="1", MOD_FUSED_BENCH_COMPILER="eager")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores
    from .gpu import device  # after TRITON_INTERPRET is set

    try:
        device.make()
        device.link_kernels()
    except (RuntimeError, ImportError) as error:
        print(f"bench.gpu_check: {error}", file=sys.stderr)
        return 2
    begin, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("gpu.*"), *out.glob("*.xml")):
        old.unlink()
    slower, processes = (_SLOWER, 1) if args.dry_run else (1, device.workers())
    benchmark = ["-m", "bench.gpu.benchmark", "--out", str(out)]
    files = {file.stem.removeprefix("test_"): file for file in sorted(TESTS.glob("test_*.py"))}
    with contextlib.ExitStack() as stack:
        if not args.dry_run:  # compiles while the tests run
            stack.enter_context(started([*benchmark, "--compile"], out / "gpu.log"))
        passed = importlib.util.find_spec("pytest") is not None
        if passed:
            passed = run_tests(files, out, slower * TEST_SECONDS, processes)
        else:
            print("pytest is not installed: no test was run", flush=True)
    left = slower * TOTAL_SECONDS - (time.monotonic() - begin)
    seconds = min(slower * BENCHMARK_SECONDS, left)
    benchmark += ["--seconds", str(seconds - 15.0)]
    return 0 if run("benchmark", benchmark, out / "gpu.log", seconds) and passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
