"""Times one warp along a path through sm_90 machine code, without a GPU.

The compiler writes a schedule into the upper half of every instruction: its *stall*, the cycles
until the warp may issue the next one; which of six *scoreboards* it holds until its result is there
or its operands are read; and for which of them it waits. Latencies that are the same for every
issue are in the stalls. The others are taken from `LATENCY`: nominal figures, not measured.

A path is the one with the fewest instructions between its points. So every branch goes the cheap
way, except where a point lies on the other: a tile's sums are stored, and a phase ends with the
store that comes last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import networkx
from mod_fused.triton_kernels.instructions import decoded

#: Cycles at 1.98 GHz until a result is there, by opcode; `OTHER` for what is not listed. A load
#: from global memory takes `L2` or `HBM`.
L2, HBM, OTHER = 300, 800, 20
LATENCY = {
    "ATOM": 350, "ATOMG": 350, "MEMBAR": 500, "BAR": 30, "SHFL": 24, "REDUX": 24, "MUFU": 22,
    "LDS": 29, "LDSM": 33, "LDC": 40, "ULDC": 30, "LDL": 40, "S2R": 30, "S2UR": 30, "R2UR": 12,
    "VOTE": 6, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16, "STG": 10, "STS": 10, "ERRBAR": 10,
}  # fmt: skip
OPERANDS = 12  # cycles until a store has read its operands
PORT = 64  # bytes that a multiprocessor gets from the L2 cache in a cycle
#: Passes of a loop that searches, where its code does not show a number: 32 bits, three at a time.
SEARCH = 11
_ATOMIC = ("ATOM", "ATOMG", "RED", "REDG")
_LIMIT = re.compile(r"U?ISETP\.\S+ U?P\d, U?PT, \S+, (0x[0-9a-f]+), ")
_DOWN = re.compile(r"IADD3 (U?R\d+), \1, -0x1, U?RZ")
_WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")


class Control(NamedTuple):
    """The schedule of an instruction."""

    stall: int  # cycles
    write: int  # the scoreboard that its result clears; 7: none
    read: int  # the scoreboard that reading its operands clears; 7: none
    wait: int  # a bit for each scoreboard that it waits for

    @classmethod
    def of(cls, word: int) -> Control:
        """The schedule in the upper half of an instruction."""
        return cls(word >> 41 & 15, word >> 46 & 7, word >> 49 & 7, word >> 52 & 63)


class Cost(NamedTuple):
    """What a warp issues on a path, and how long it takes."""

    cycles: float = 0.0
    instructions: float = 0.0
    barriers: float = 0.0
    shuffles: float = 0.0
    special: float = 0.0  # of the special function unit: exponentials, roots, reciprocals
    float64: float = 0.0
    wide_loads: float = 0.0  # of 16 bytes, from global memory


class Phase(NamedTuple):
    """The costs of a phase."""

    task: Cost  # from the start of a program to its arrival, with one tile
    tile: Cost  # a further tile
    end: Cost  # from the arrival on, in the program that arrives last, with its loops' passes


def total(parts: Iterable[tuple[float, Cost]]) -> Cost:
    """The sum of costs, each so many times."""
    scaled = [[times * x for x in cost] for times, cost in parts]
    return Cost(*map(sum, zip(*scaled, strict=True)))


def opcode(text: str) -> str:
    """LDG of `@!P0 LDG.E.128 ...`."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def _kind(name: str, text: str) -> tuple[bool, ...]:
    """Whether an instruction counts in the fields of `Cost` from `barriers` on."""
    float64 = name in ("DADD", "DMUL", "DFMA", "DSETP")
    wide = name == "LDG" and ".128" in text
    return name == "BAR", name == "SHFL", name == "MUFU", float64, wide


def _loaded(text: str) -> int:
    """Bytes that a thread loads."""
    width = _WIDTH.search(text)
    return int(width[1]) // 8 if width else 4


class _Walk(NamedTuple):
    times: float
    path: list[int]


class Program:
    """The instructions of a kernel, by index, and the ways through them."""

    def __init__(self, assembly: str) -> None:
        code = decoded(assembly)
        self.text = [x.text for x in code]
        self.names = [opcode(x) for x in self.text]
        self.controls = [Control.of(x.word) for x in code]
        self.graph = networkx.DiGraph()
        self.graph.add_nodes_from(range(len(code)))
        for i, x in enumerate(code):
            if x.target is not None:
                self.graph.add_edge(i, x.target)
            if not (x.always or x.text.startswith(("EXIT", "RET"))) and i + 1 < len(code):
                self.graph.add_edge(i, i + 1)

    def find(self, *names: str) -> list[int]:
        """The instructions with one of these opcodes."""
        return [i for i, name in enumerate(self.names) if name in names]

    @property
    def exits(self) -> list[int]:
        """Where the program ends."""
        return self.find("EXIT")

    def cost(self, path: Sequence[int], threads: int, memory: int = L2, first: int = 0) -> Cost:
        """The cost of a path's instructions from number `first` on, for a warp that walks all of
        it. `memory` is the latency of a load from global memory. The warps of a program run
        side by side, a quarter of them on each scheduler."""
        now = port = begun = 0.0
        ready = [0.0] * 8  # by scoreboard
        for n, i in enumerate(path):
            control, name = self.controls[i], self.names[i]
            if n == first:
                begun = now
            now = max([now, *(ready[b] for b in range(6) if control.wait >> b & 1)])
            latency: float = LATENCY.get(name, OTHER)
            if name == "MEMBAR" and ".CTA" in self.text[i]:
                latency = OTHER
            if name in ("BAR", "MEMBAR"):
                now += latency
            elif name == "LDG":
                port = max(now, port) + _loaded(self.text[i]) * threads / PORT
                latency = port - now + memory
            ready[control.write] = max(ready[control.write], now + latency)
            ready[control.read] = max(ready[control.read], now + OPERANDS)
            now += max(1, control.stall)
        counted = [_kind(self.names[i], self.text[i]) for i in path[first:]]
        issued = len(counted) * threads / 32 / 4
        columns = zip(*counted, strict=True)
        return Cost(max(now - begun, issued), len(counted), *map(float, map(sum, columns)))

    def repeated(self, path: Sequence[int], threads: int, memory: int = L2) -> Cost:
        """The cost of a loop's further pass: loads may be for the next one."""
        return self.cost([*path] * 3, threads, memory, 2 * len(path))

    def _last(self, graph: Any, start: int, among: Iterable[int]) -> int | None:
        """Of some instructions the one that is reached last."""
        far = networkx.single_source_shortest_path_length(graph, start)
        return max((i for i in among if i in far), key=far.__getitem__, default=None)

    def _leave(self, start: int) -> list[int]:
        """The shortest path to the end of the program."""
        ways = networkx.single_source_shortest_path(self.graph, start)
        return min((ways[i] for i in self.exits if i in ways), key=len)

    def idle(self, threads: int) -> Cost:
        """The cost of a program that finds nothing to do."""
        return self.cost(self._leave(0), threads)

    def phase(self, threads: int, memory: int) -> Phase:
        """The costs of a phase that is a launch of its own: tiles, the arrival by an atomic
        operation, and what the last program to arrive does."""
        way = networkx.single_source_shortest_path_length(self.graph, 0)
        arrivals = [i for i in self.find("ATOM", "ATOMG") if i in way]
        if not arrivals:
            raise ValueError("expected an atomic operation that counts arrivals, found none")
        arrival = min(arrivals, key=way.__getitem__)
        stores = self.find("ST", "STG")
        before = networkx.ancestors(self.graph, arrival)
        path = self._storing(self.graph, 0, [arrival], set(stores) & before)
        last = self._last(self.graph, arrival, stores)
        if last is not None:
            path += route(self.graph, arrival, last)[1:]
        path += self._leave(path[-1])[1:]
        at = path.index(arrival)
        task = self.cost(path[:at], threads, memory)
        end = [(1.0, self.cost(path, threads, L2, at))]
        for loop in loops(self.graph.subgraph(networkx.descendants(self.graph, arrival)).copy()):
            if loop.header in path:
                body = self._walks(loop.inside, loop.header, loop.latch, 0.0, 1)
                further = self._passes(body, 0.0, 1) - 1.0
                end.append((further, self.repeated(body[0].path, threads)))
        return Phase(task, self._tile(before, threads, memory) or task, total(end))

    def _storing(
        self, graph: Any, start: int, goals: Iterable[int], stores: Iterable[int]
    ) -> list[int]:
        """The shortest path from `start` over one of the stores to one of the goals; over a wide
        load too, if such a path has one."""
        begins = networkx.single_source_shortest_path(graph, start)
        found = []
        for store in {i for i in stores if i in begins} or {start}:
            ends = networkx.single_source_shortest_path(graph, store)
            found += [begins[store] + ends[i][1:] for i in goals if i in ends]
        wide = [x for x in found if any(_kind(self.names[i], self.text[i])[-1] for i in x)]
        return min(wide or found, key=len)

    def _tile(self, before: set[int], threads: int, memory: int) -> Cost | None:
        """The cost of a pass of the loop over tiles; None if there is no loop."""
        found = []
        for loop in loops(self.graph.subgraph(before).copy()):
            wide = sum(_kind(self.names[i], self.text[i])[-1] for i in loop.inside)
            stores = [i for i in self.find("ST", "STG") if i in loop.inside] or [loop.latch]
            found.append((wide, self._storing(loop.inside, loop.header, loop.latches, stores)))
        if not found:
            return None
        return self.repeated(max(found)[1], threads, memory)

    def rows(self, threads: int, vocab: int, search: int = SEARCH) -> tuple[Cost, Cost]:
        """The cost of a launch whose programs each do a row, or a slice, of `vocab` float32: as it
        usually runs, and as it runs where all loops do. A loop that loads is a sweep over the row.
        A loop around a sweep, or without loads, is a search: it has as many passes as its code
        compares with, else `search`. A kernel that can search or add up without a sweep usually
        makes none."""
        row_bytes = 4 * vocab / threads  # of a thread
        swept = self._row(self.graph, row_bytes, search)
        graph = self.graph.copy()
        for loop in loops(graph):
            if self._loads(loop.inside):
                graph.remove_edges_from(_around(graph, loop))
                graph.remove_nodes_from(loop.inside)
        unswept = self._row(graph, row_bytes, search) if 0 in graph else []
        gathers = len(unswept) > 1 or any(self.names[i] in _ATOMIC for x in unswept for i in x.path)
        return self._cost(unswept if gathers else swept, threads), self._cost(swept, threads)

    def _cost(self, walks: Sequence[_Walk], threads: int) -> Cost:
        first, *further = walks
        costs = [(1.0, self.cost(first.path, threads))]
        return total(costs + [(x.times, self.repeated(x.path, threads)) for x in further])

    def _row(self, graph: Any, row_bytes: float, search: int) -> list[_Walk]:
        """The walks through a row with the instructions of `graph`; none if it has no way out."""
        alive = [networkx.ancestors(graph, i) | {i} for i in self.exits if i in graph]
        graph = graph.subgraph(set().union(*alive)).copy()
        if 0 not in graph:
            return []
        goal = self._last(graph, 0, self.exits)
        assert goal is not None
        return self._walks(graph, 0, goal, row_bytes, search)

    def _loads(self, nodes: Iterable[int]) -> int:
        """Bytes that a thread loads from global memory."""
        return sum(_loaded(self.text[i]) for i in nodes if self.names[i] == "LDG")

    def _walks(
        self, graph: Any, start: int, goal: int, row_bytes: float, search: int
    ) -> list[_Walk]:
        """The walk from start to goal through those loops, stores and atomic operations that are
        the most work, each once; then the further passes of the loops."""
        after = networkx.descendants(graph, start)
        found = [x for x in loops(graph) if x.header in after and goal not in x.inside]
        inside = {i for loop in found for i in loop.inside}
        single = {*self.find("ST", "STG", *_ATOMIC)} & after
        bodies: dict[int, tuple[float, list[_Walk]]] = {}
        ends = {i: i for i in single - inside - {start, goal}}
        for loop in found:
            body = self._walks(loop.inside, loop.header, loop.latch, row_bytes, search)
            bodies[loop.header] = self._passes(body, row_bytes, search), body
            ends[loop.header] = loop.latch
        work = {i: 1.0 for i in ends}
        for header, (times, body) in bodies.items():
            work[header] = times * sum(x.times * len(x.path) for x in body)
        reached = {i: networkx.descendants(graph, end) for i, end in ends.items()}
        chain = networkx.DiGraph([(start, goal, {"weight": 1.0})])
        useful = [i for i in ends if goal in reached[i]]
        for i in useful:
            chain.add_edge(start, i, weight=work[i])
            chain.add_edge(i, goal, weight=1.0)
            for j in useful:
                if j in reached[i] and j != i:
                    chain.add_edge(i, j, weight=work[j])
        main, extra = [start], []
        for i in networkx.dag_longest_path(chain)[1:]:
            main += networkx.shortest_path(graph, main[-1], i)[1:]
            if i in bodies:
                times, (own, *inner) = bodies[i]
                main += own.path[1:]
                extra += [_Walk(times - 1, own.path)]
                extra += [_Walk(times * x.times, x.path) for x in inner]
        return [_Walk(1.0, main), *extra]

    def _passes(self, body: Sequence[_Walk], row_bytes: float, search: int) -> float:
        """How many passes a loop has; `search` if its code does not show it."""
        path = body[0].path
        loaded = self._loads(path)
        if loaded and len(body) == 1:
            return max(1.0, row_bytes / loaded)
        shown = [self._counted_down(i, path[0]) for i in path]
        limits = [_LIMIT.search(self.text[i]) for i in path]
        shown += [int(x[1], 16) for x in limits if x]
        return float(next((x for x in shown if x and 1 < x <= 64), search))

    def _counted_down(self, i: int, header: int) -> int | None:
        """If an instruction counts a register down: what that is before the loop."""
        down = _DOWN.search(self.text[i])
        if down is None:
            return None
        begin = re.compile(rf"MOV\S* {down[1]}, (?:U?RZ, U?RZ, )?(0x[0-9a-f]+)$")
        found = (begin.search(self.text[n]) for n in range(header - 1, -1, -1))
        return next((int(x[1], 16) for x in found if x), None)


class Loop(NamedTuple):
    """A loop."""

    header: int  # where it is entered
    latches: list[int]  # from where it goes back
    inside: Any  # its graph, without the ways back

    @property
    def latch(self) -> int:
        """The jump back that is reached last."""
        far = networkx.single_source_shortest_path_length(self.inside, self.header)
        return max(self.latches, key=far.__getitem__)


def loops(graph: Any) -> list[Loop]:
    """The outermost loops of a graph."""
    found = []
    for nodes in networkx.strongly_connected_components(graph):
        if len(nodes) < 2:
            continue
        entered = [n for n in nodes if any(p not in nodes for p in graph.predecessors(n))]
        header = min(entered or nodes)
        inside = graph.subgraph(nodes).copy()
        latches = list(inside.predecessors(header))
        inside.remove_edges_from(list(inside.in_edges(header)))
        found.append(Loop(header, latches, inside))
    return sorted(found, key=lambda loop: loop.header)


def _around(graph: Any, loop: Loop) -> list[tuple[int, int]]:
    """The jump over a loop that may have no pass: from the branch in front of it to where all its
    ways out lead, with no branch between."""
    guard = loop.header
    while graph.out_degree(guard) < 2 or guard in loop.inside:
        before = [i for i in graph.predecessors(guard) if i not in loop.inside]
        if len(before) != 1:
            return []
        (guard,) = before
    for at in [j for i in loop.inside for j in graph.successors(i) if j not in loop.inside]:
        while not graph.has_edge(guard, at):
            if graph.out_degree(at) != 1:
                return []
            (at,) = graph.successors(at)
    return [(guard, at)]


def route(graph: Any, *points: int) -> list[int]:
    """The shortest path through points in their order."""
    path = [points[0]]
    for a, b in pairwise(points):
        path += networkx.shortest_path(graph, a, b)[1:]
    return path
