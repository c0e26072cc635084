"""Another commit of this repository beside the working tree, for `--base`.

Each of the two runs in a process of its own. A process imports `mod_fused` from its tree and
everything else from here, so that the two differ in the package alone. It makes the inputs from the
problem, checks its results against the oracle, and times its own calls on request.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from torch import Tensor

import mod_fused

from . import check, measure
from .case import Contestant, Refused, ours, set_threads
from .problem import Problem, logits

ROOT = Path(__file__).resolve().parents[1]
#: Seconds to wait before a call: idle threads of the other process spin for less, then sleep.
_SETTLE = 0.003
_START = """
import sys
tree, root, connection = sys.argv[1:]
sys.path.insert(0, tree)
import mod_fused
sys.path[0] = root
from bench import other_commit
other_commit.serve(tree, int(connection))
"""


def build(tree: Path) -> None:
    """Build the C++ extension of a tree in place."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def _git(*words: str | Path) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"git {' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit(revision: str) -> str:
    """The abbreviated hash of a revision.

    Raises:
        SystemExit: if git knows no such commit.
    """
    return _git("rev-parse", "--short=12", "--verify", f"{revision}^{{commit}}")


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of the revision in a temporary folder, its extension built."""
    with tempfile.TemporaryDirectory(prefix="mod_fused_base_") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", tree, commit(revision))
        try:
            (tree / "mod_fused/triton_kernels").symlink_to(Path("..", "triton_kernels"))
            build(tree)
            yield tree
        finally:
            _git("worktree", "remove", "--force", tree)


class Process:
    """`mod_fused.sample` of a tree, in a process of its own. The object is the call to time."""

    def __init__(self, tree: Path, backend: str, largest_batch: int) -> None:
        self.backend, self.largest_batch = backend, largest_batch
        self._connection, theirs = Pipe()
        with theirs:
            words = [sys.executable, "-c", _START, str(tree), str(ROOT), str(theirs.fileno())]
            self._process = subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()])
        self.pid = self._process.pid

    def _ask(self, *message: Any) -> Any:
        try:
            self._connection.send(message)
            return self._connection.recv()
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            raise RuntimeError(f"a measuring process ended with exit status {status}") from error

    def contestant(self) -> Contestant:
        """The contestant that the runner times."""

        def prepare(problem: Problem, _: list[Tensor]) -> Process:
            found = check.Check(*self._ask("prepare", problem, self.largest_batch, self.backend))
            if not found.passed:
                raise Refused(found.reason)
            return self

        return Contestant(prepare)

    def __call__(self) -> None:
        """One call, not timed."""
        self._ask("call")

    def seconds(self, count: int) -> list[float]:
        """The wall times of `count` calls in a row."""
        return self._ask("time", count)

    def end(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


def serve(tree: str, descriptor: int) -> None:
    """The loop of the measuring process: it answers until the other end closes."""
    found = Path(mod_fused.__file__).resolve()
    if not found.is_relative_to(Path(tree).resolve()):
        raise RuntimeError(f"expected mod_fused of {tree}, got {found}")
    connection, call = Connection(descriptor), None
    os.set_inheritable(descriptor, False)
    while True:
        try:
            what, *rest = connection.recv()
        except EOFError:
            return
        if what == "prepare":
            answer, call = _prepare(*rest)
            connection.send(answer)
        elif what == "call":
            time.sleep(_SETTLE)
            call()
            connection.send(None)
        else:
            connection.send(measure.seconds_of_each(call, *rest))


def _prepare(problem: Problem, largest_batch: int, backend: str) -> tuple[tuple[Any, ...], Any]:
    """The check's result as a plain tuple, and the call."""
    set_threads(problem.threads)
    inputs = logits(problem, largest_batch)
    try:
        expected = check.oracle(problem, largest_batch)
        found = check.check(problem, inputs, expected, backend)
        return tuple(found), ours(backend).build(problem, inputs)
    except Exception as error:  # an older commit may lack a feature
        return (False, None, f"{type(error).__name__}: {error}"), None
