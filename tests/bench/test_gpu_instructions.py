"""Instructions counted in machine code (bench/gpu/instructions.py), and that they stay few."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETED

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bench.gpu import instructions  # noqa: E402

# An outer loop from 0010 and two in it: the first with a short and a long way, the second straight.
# Behind the end stands what is never reached.
ASSEMBLY = """
        /*0000*/                   MOV R1, RZ ;
        /*0010*/                   FADD R2, R1, R1 ;
        /*0020*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0030*/              @!P2 BRA P5, 0x70 ;
        /*0040*/                   FADD R2, R1, R1 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/                   BRA 0x70 ;
        /*0070*/                   MUFU.RSQ R3, R3 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/                   FADD R2, R1, R1 ;
        /*00a0*/               @P0 BRA 0x90 ;
        /*00b0*/               @P1 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0 ;
"""


def test_the_shortest_way_through_each_innermost_loop_is_counted() -> None:
    first, second = instructions.loops(ASSEMBLY)
    assert first == (4, 1, 1)  # load, branch, root, branch
    assert second == (2, 0, 0)


@pytest.mark.parametrize(
    ("divergence", "most"),
    [
        ("reverse_kl", {"keys": 25}),
        ("forward_kl", {"sums": 44, "deficits": 86, "evaluation": 64, "keys": 56}),
    ],
)
def test_a_token_costs_few_instructions(divergence: str, most: dict[str, int]) -> None:
    # A tenth above what Triton 3.6 and 3.9 make of it.
    found = instructions.measure(divergence)
    assert found["spills"] == 0 and found["phases"].keys() == most.keys()
    for name, phase in found["phases"].items():
        assert 0.0 < phase["instructions"] <= most[name], (name, phase)
