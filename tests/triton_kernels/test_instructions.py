"""Instructions counted in machine code, and that they stay few."""

from __future__ import annotations

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mod_fused.triton_kernels import instructions  # noqa: E402

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
        ("forward_kl", {"sums": 44, "deficits": 86, "evaluation": 64}),
    ],
)
def test_a_token_costs_few_instructions(divergence: str, most: dict[str, int]) -> None:
    # A tenth above what Triton 3.6 and 3.9 make of it.
    found = instructions.measure(divergence)
    assert found["spills"] == 0 and found["phases"].keys() == most.keys()
    for name, phase in found["phases"].items():
        assert 0.0 < phase["instructions"] <= most[name], (name, phase)


def test_the_table_names_every_phase_and_predicts_from_the_counts() -> None:
    found = {"registers": 90, "moments": False}
    found |= {"phases": {"keys": {"instructions": 20.0, "special": 1.0}}}
    two = {"sums": 30.0, "deficits": 70.0, "evaluation": 50.0, "keys": 40.0}
    phases = {name: {"instructions": n, "special": 2.0} for name, n in two.items()}
    data = {"one": found, "two": {"registers": 136, "moments": False, "phases": phases}}
    data["three"] = data["two"] | {"moments": True}
    text = instructions.markdown({"triton": "3.9", "divergences": data})
    row = 128256 / (132 * 128 * 1.98e3)  # microseconds for an instruction a token
    assert f"| one | 90 |  |  |  | 20.0 (1.0) | {20 * row:.2f} |  |  |" in text
    shown = " | ".join(f"{n:.1f} (2.0)" for n in two.values())
    last = f"{190 * row:.2f} | {240 * row:.2f} |"
    assert f"| two | 136 | {shown} |  | {last}" in text
    assert f"| three | 136 | {shown} | {140 * row:.2f} | {last}" in text
