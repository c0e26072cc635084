"""Triton's interpreter with all programs of a launch alive at once, as on a GPU: one runs at a
time, and after each of its atomic operations a seed says who goes on. What programs see of each
other between two atomic operations, a GPU's caches, is not simulated."""

from __future__ import annotations

import builtins
import random
import threading
from collections.abc import Callable
from typing import Any

import torch
from mod_fused.triton_kernels.compiled import Launch
from triton._C.libtriton import ir
from triton.runtime import interpreter


class Stuck(Exception):
    """The programs wait for each other."""


class _Program(int):
    """The number of programs, to the interpreter; its loop over them runs only one."""

    index: int


def _range(*bounds: Any) -> Any:
    return (bounds[0].index,) if isinstance(bounds[0], _Program) else builtins.range(*bounds)


class _Interleaved:
    """Who runs. Each program is a thread that waits for its turn."""

    def __init__(self, programs: int, seed: int, most: int) -> None:
        self.random = random.Random(seed)
        self.order = list(range(programs))  # the first that is not through runs
        self.random.shuffle(self.order)
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.running = self.order[0]
        self.left = most  # atomic operations
        self.errors: list[BaseException] = []

    def hand_over(self) -> None:
        """The next one's turn."""
        if self.order:
            self.running = self.order[0]
            self.turns[self.running].release()

    def after_atomic(self, waiting: bool, released: bool) -> None:
        """Of the running program: it goes last while it waits, and often when it has let others go
        on, which is where what it does next comes too late; now and then all is drawn again."""
        me = self.running
        self.left -= 1
        if self.left < 0 or self.errors:
            raise Stuck
        if waiting or (released and self.random.random() < 0.75):
            self.order.remove(me)
            self.order.append(me)
        elif self.random.random() < 0.25:
            self.random.shuffle(self.order)
        if self.order[0] != me:
            self.hand_over()
            self.turns[me].acquire()
            interpreter.interpreter_builder.set_grid_idx(me, 0, 0)

    def run(self, index: int, program: Callable[[], None]) -> None:
        """A thread: one program from its first turn to its end."""
        self.turns[index].acquire()
        try:
            program()
        except BaseException as error:
            self.errors.append(error)
        self.order.remove(index)
        self.hand_over()


def interleave(launch: Launch, seed: int, monkeypatch: Any, most: int = 20000) -> int:
    """Runs a launch; how many atomic operations it took.

    Raises:
        Stuck: after `most` atomic operations, or whatever a program raised.
    """
    (programs,) = launch.grid
    state = _Interleaved(programs, seed, most)
    builder = interpreter.interpreter_builder
    atomic = builder.create_atomic_rmw

    def create_atomic_rmw(op: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        result = atomic(op, pointer, value, *rest)
        waiting = op == ir.ATOMIC_OP.ADD and not value.data.any()
        state.after_atomic(waiting, op == ir.ATOMIC_OP.XCHG)
        return result

    def program(index: int) -> Callable[[], None]:
        count = _Program(programs)
        count.index = index
        return lambda: launch._replace(grid=(count,)).run(torch.device("cpu"))

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
        patch.setattr(interpreter, "range", _range, raising=False)
        # All share the memory: nothing is to be copied back when one of them ends.
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        scope = interpreter._patch_lang(launch.kernel.fn)  # until the last one ends
        threads = [
            threading.Thread(target=state.run, args=(i, program(i))) for i in range(programs)
        ]
        try:
            for thread in threads:
                thread.start()
            state.hand_over()
            for thread in threads:
                thread.join()
        finally:
            scope.restore()
    if state.left < 0:
        raise Stuck(f"not through after {most} atomic operations")
    if state.errors:
        raise state.errors[0]
    return most - state.left
