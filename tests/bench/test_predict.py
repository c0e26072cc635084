"""Times predicted from machine code: schedules and paths of programs made by hand, and one compile
of the real kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETED

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is not installed

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mod_fused.triton_kernels import instructions  # noqa: E402

from bench import report  # noqa: E402
from bench.gpu import predict, predict_model  # noqa: E402
from bench.gpu.predict_model import Kernel, Selection  # noqa: E402
from bench.gpu.predict_walk import Control, Cost, Phase, Program  # noqa: E402

NONE = 7  # no scoreboard


def word(stall: int = 1, write: int = NONE, read: int = NONE, wait: int = 0) -> int:
    return stall << 41 | write << 46 | read << 49 | wait << 52


def assembly(*lines: tuple[str, int]) -> str:
    """Lines as cuobjdump prints them: each instruction, then the upper half of its 16 bytes."""
    return "\n".join(
        f"        /*{16 * i:04x}*/   {text} ;   /* 0x{0:016x} */\n   /* 0x{upper:016x} */"
        for i, (text, upper) in enumerate(lines)
    )


def test_schedules_are_read_from_lines_of_cuobjdump() -> None:
    code = instructions.decoded("""
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
                                                                    /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;               /* 0x0000000000007919 */
                                                                    /* 0x000e280000002100 */
        /*0020*/              @!P0 BRA 0x0 ;                        /* 0x0000000000008947 */
                                                                    /* 0x003fea0003800000 */
""")
    assert [x.text for x in code] == ["LDC R1, c[0x0][0x28]", "S2R R0, SR_TID.X", "@!P0 BRA 0x0"]
    assert [(x.target, x.always) for x in code] == [(None, False), (None, False), (0, False)]
    assert [Control.of(x.word) for x in code] == [
        Control(stall=1, write=NONE, read=NONE, wait=0),
        Control(stall=4, write=0, read=NONE, wait=0),
        Control(stall=5, write=NONE, read=NONE, wait=0b11),
    ]


STRAIGHT = Program(
    assembly(
        ("S2R R0, SR_TID.X", word(1, write=0)),
        ("LDG.E.128 R4, desc[UR8][R2.64]", word(2, write=1, wait=0b1)),
        ("FADD R8, R4, R5", word(4, wait=0b10)),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", word(5)),
        ("@!P0 STG.E desc[UR8][R2.64], R8", word(1, read=2)),
        ("EXIT", word(5, wait=0b100)),
    )
)


def test_a_warp_waits_for_loads_barriers_and_operands() -> None:
    cost = STRAIGHT.cost(range(6), threads=128, memory=300)
    # S2R is there at 30; 128 threads get 16 bytes each in 32 cycles, 300 later: 362; FADD 4, the
    # barrier 30 and 5, and 12 until the store has read its operands, then 5.
    assert cost.cycles == 362 + 4 + 35 + 12 + 5
    assert cost[1:] == (6, 1, 0, 0, 0, 1)  # instructions, a barrier, a wide load
    assert STRAIGHT.cost(range(6), 128, memory=800).cycles == cost.cycles + 500
    assert STRAIGHT.cost(range(6), 128, 300, first=2).cycles == cost.cycles - 32
    # 1024 threads are 8 warps for each of 4 schedulers, and share the port of the L2 cache.
    assert STRAIGHT.cost(range(6), 1024, 300).cycles == cost.cycles + 7 * 32
    assert STRAIGHT.cost([3] * 3, 65536, 300).cycles == 3 * 65536 / 128


@pytest.mark.parametrize(("ahead", "cycles"), [(False, 10 + 332), (True, 332)])
def test_a_loop_that_loads_ahead_hides_its_own_instructions(ahead: bool, cycles: int) -> None:
    load = ("LDG.E.128 R4, desc[UR8][R2.64]", word(1, write=0))
    use = ("FADD R8, R4, R5", word(1, wait=0b1))
    rest = [("FADD R9, R9, R5", word(1))] * 8
    lines = [use, load, *rest] if ahead else [*rest, load, use]
    program = Program(assembly(*lines, ("@P0 BRA 0x0", word(1)), ("EXIT", word(1))))
    cost = program.repeated(range(11), threads=128, memory=300)
    assert cost.instructions == 11
    assert cost.cycles == pytest.approx(cycles, abs=2)


# A phase: a loop over tiles with a branch for a rare tile, the arrival, and for the last program a
# step with float64 behind a branch; the store of the state comes last.
PHASE_LINES = [
    ("S2R R0, SR_TID.X", word(1)),
    ("LDG.E.128 R4, desc[UR8][R2.64]", word(1, write=0)),  # 1: the loop
    ("@P3 BRA 0xb0", word(1)),
    ("MUFU.EX2 R4, R4", word(1, wait=0b1)),
    ("STG.E desc[UR8][R2.64], R4", word(1)),
    ("@P0 BRA 0x10", word(1)),
    ("MEMBAR.ALL.GPU", word(1)),
    ("ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5", word(1, write=0)),  # 7
    ("@P1 EXIT", word(1, wait=0b1)),
    ("DFMA R2, R2, R2, R4", word(1, write=0)),
    ("BRA 0xd0", word(1)),
    ("SHFL.BFLY PT, R4, R4, 0x10, 0x1f", word(1, write=0)),  # 11: the rare tile
    ("BRA 0x30", word(1)),
    ("STG.E.64 desc[UR8][R2.64], R2", word(1, wait=0b1)),  # 13
    ("EXIT", word(1)),
]
PHASE = Program(assembly(*PHASE_LINES))


def test_a_phase_is_its_tiles_its_arrival_and_its_end() -> None:
    task, tile, end = PHASE.phase(threads=128, memory=800)
    assert task == Cost(1 + 832 + 4 - 1 + 500 + 1, 7, 0, 0, 1, 0, 1)
    assert tile == Cost(pytest.approx(832 + 3, abs=1), 5, 0, 0, 1, 0, 1)
    assert end == Cost(350 + 1 + 16 + 2, 6, 0, 0, 0, 1, 0)
    # The end again, with a loop of 8 passes in it, counted down.
    looped = [*PHASE_LINES]
    looped[9:11] = [
        ("UMOV UR4, 0x8", word(1)),
        ("UIADD3 UR4, UR4, -0x1, URZ", word(1)),
        ("@P2 BRA 0xa0", word(1)),
        ("BRA 0xf0", word(1)),
    ]
    looped[2] = ("@P3 BRA 0xd0", word(1))
    assert Program(assembly(*looped)).phase(128, 800).end.instructions == 6 + 1 + 8 * 2 - 1
    assert PHASE.cost([6], 128).cycles == 501
    assert Program(assembly(("MEMBAR.ALL.CTA", word(1)))).cost([0], 128).cycles == 21
    assert PHASE.idle(128).instructions == 9  # leaves after the arrival


# A search of 9 passes, each with a sweep over the row; around it a way that searches in registers
# and adds up what it finds; then a store.
LOAD, STORE = "LDG.E.128 R4, desc[UR8][R2.64]", "STG.E desc[UR8][R2.64], R4"
ROWS = assembly(
    ("@P3 BRA 0x70", word(1)),
    ("MOV R1, RZ", word(1)),  # 1: the search
    (LOAD, word(1)),  # 2: the sweep
    ("@P0 BRA 0x20", word(1)),
    ("ISETP.NE.AND P1, PT, R3, 0x9, PT", word(1)),
    ("@P1 BRA 0x10", word(1)),
    ("BRA 0xd0", word(1)),
    ("@P4 BRA 0xd0", word(1)),
    ("FADD R1, R1, R1", word(1)),  # 8: in registers
    ("ISETP.NE.AND P1, PT, R3, 0x5, PT", word(1)),
    ("@P1 BRA 0x80", word(1)),
    ("@P4 BRA 0xd0", word(1)),
    ("RED.E.ADD.64.STRONG.GPU desc[UR8][R2.64], R4", word(1)),
    (STORE, word(1)),
    ("EXIT", word(1)),
)


def test_sweeps_over_a_row_are_counted_in_searches_and_left_out_where_they_can_be() -> None:
    usual, sweeping = Program(ROWS).rows(threads=256, vocab=4096)
    # A pass of a sweep takes 4 * 256 tokens of 4096. In registers: 5 passes of 3.
    assert usual.instructions == 2 + 5 * 3 + 2 + 2
    assert usual.wide_loads == 0
    assert sweeping.instructions == 1 + 9 * (3 + 4 * 2) + 1 + 2
    assert sweeping.wide_loads == 9 * 4
    # A search that does not show its passes has as many as are given.
    hidden = Program(ROWS.replace("0x5, PT", "R6, PT"))
    assert hidden.rows(256, 4096)[0].instructions == usual.instructions + (11 - 5) * 3
    assert hidden.rows(256, 4096, 7)[0].instructions == usual.instructions + (7 - 5) * 3
    # What neither searches nor adds up without a sweep makes them all.
    other = ROWS.replace("@P1 BRA 0x80", "FADD R1, R1, R1").replace("RED.E.ADD.64", "FADD")
    usual, sweeping = Program(other).rows(threads=256, vocab=4096)
    assert usual == sweeping and sweeping.wide_loads == 9 * 4
    # Adding up is enough.
    usual, _ = Program(ROWS.replace("@P1 BRA 0x80", "FADD R1, R1, R1")).rows(256, 4096)
    assert usual.instructions == 2 + 3 + 2 + 2


def test_what_follows_a_sweep_is_left_out_with_it_even_if_the_sweep_may_have_no_pass() -> None:
    lines = (
        ("RED.E.ADD.64.STRONG.GPU desc[UR8][R2.64], R4", word(1)),
        ("@P4 BRA 0x80", word(1)),  # leaves it all out
        ("@!P0 BRA 0x60", word(1)),  # 2: no pass
        ("MOV R1, RZ", word(1)),
        (LOAD, word(1)),  # 4: the sweep
        ("@P0 BRA 0x40", word(1)),
        ("FADD R1, R1, R1", word(1)),  # 6: a search
        ("@P1 BRA 0x60", word(1)),
        (STORE, word(1)),
        ("EXIT", word(1)),
    )
    usual, sweeping = Program(assembly(*lines)).rows(threads=256, vocab=4096)
    assert usual.instructions == 4
    assert sweeping.instructions == 4 + 2 + 4 * 2 + 11 * 2


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "programs"),
    [(128, 168, 0, 3), (64, 168, 0, 6), (128, 96, 0, 5), (512, 64, 0, 2),
        (512, 16, 0, 4), (128, 32, 0, 16),
     (128, 32, 58000, 3), (32, 16, 0, 32)],
)  # fmt: skip
def test_registers_memory_and_warps_limit_the_programs(threads, registers, shared, programs):
    assert predict_model.resident(threads, registers, shared) == programs


def kernel(tile: float = 1000.0, instructions: float = 100.0, **changes: object) -> Kernel:
    one = Cost(cycles=tile, instructions=instructions)
    phase = Phase(one, one, Cost(cycles=2000.0, instructions=500.0))
    return Kernel(128, 1, 4, [phase, phase], 0, Cost(cycles=600.0))._replace(**changes)


def test_one_row_takes_its_phases_in_turn_and_many_take_what_bounds_them() -> None:
    ask = {"rows": 1, "vocab": 128256, "row_bytes": 6 * 128256}
    one = predict_model.predicted(kernel(), [], **ask)
    handoff = 500 + 525 + 30
    assert one.bound == "chain"
    assert one.us == pytest.approx((2 * 3000 + handoff + 600 + 350) / 1980)
    skipping = predict_model.predicted(kernel(skipped=1), [], **ask)
    assert skipping.us - one.us == pytest.approx((handoff + 760 + 300) / 1980)

    many = ask | {"rows": 256}
    tiles = 256 * 126 / 132
    waits = predict_model.predicted(kernel(), [], **many)
    assert waits.bound == "latency"
    more = predict_model.predicted(kernel(skipped=1), [], **many)
    row = one.us / 2
    assert more.us - waits.us == pytest.approx((tiles * 1060 / 4 + (handoff + 1060) / 2) / 1980)
    ends = 2 * 2000 * 256 / 132 / 4
    assert waits.us == pytest.approx((2 * tiles * 1760 / 4 + ends) / 1980 + row)
    issues = predict_model.predicted(kernel(instructions=900.0), [], **many)
    assert issues.bound == "issue"
    assert issues.us == pytest.approx((2 * tiles * 900 + ends) / 1980 + row)
    assert issues.issue_us == pytest.approx(2 * tiles * 900 / 1980)
    reads = predict_model.predicted(kernel(tile=10.0, instructions=10.0, idle=None), [], **many)
    assert reads.hbm_us == pytest.approx(256 * 6 * 128256 / 4.3e6)
    assert reads.bound == "HBM" and reads.hbm_us < reads.us < 1.2 * reads.hbm_us


def test_a_launch_of_rows_runs_in_rounds() -> None:
    ask = {"vocab": 1024, "row_bytes": 6 * 1024}
    row = Selection(512, 2, Cost(cycles=9000.0, instructions=1000.0))

    def time(rows: int) -> float:
        with_it = predict_model.predicted(kernel(), [row], rows=rows, **ask).us
        return with_it - predict_model.predicted(kernel(), [], rows=rows, **ask).us

    assert time(1) == time(132) == pytest.approx(1 + 9000 / 1980)
    assert time(265) == pytest.approx(1 + 2 * 9000 / 1980)
    busy = row._replace(row=Cost(cycles=9000.0, instructions=3000.0))
    assert predict_model.predicted(kernel(), [busy], rows=1, **ask).bound == "filters"
    row = busy  # 16 warps of 3000 instructions: two programs keep a scheduler busy for longer
    assert time(264) == pytest.approx(1 + 3000 * 4 * 2 / 1980)


def test_the_real_kernel_is_predicted_from_its_machine_code(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(predict, "SHAPES", [(128256, 256)])
    predict.main(["--only", "reverse_kl", "--out", str(tmp_path)])
    result = report.load(tmp_path / "predicted.json")
    (row,), (phase,) = result["rows"], result["phases"]
    counted = instructions.measure("reverse_kl")["phases"]["keys"]["instructions"]
    # The path that is timed goes over a store.
    assert phase["tile_instructions"] == pytest.approx(counted * 1024 / phase["threads"], rel=0.03)
    assert phase["tile_wide_loads"] == 3 * 1024 / phase["threads"] / 8
    assert 1 <= phase["programs"] and phase["kernel_registers"] >= 32
    assert phase["end_float64"] > 0 and phase["end_us"] > 0.35
    assert row["hbm_us"] < row["us"] < 4 * row["hbm_us"]
    assert (tmp_path / "predicted.md").read_text() == predict.markdown(result)

    # Beside itself, twice as slow.
    slow = result | {"rows": [row | {"us": 2 * row["us"]}]}
    report.save(slow, earlier := tmp_path / "earlier.json")
    predict.main(["--only", "reverse_kl", "--baseline", str(earlier)])
    shown = f"{report.number(row['us'])} | {report.number(2 * row['us'])} | 2.00 |"
    assert f"| reverse_kl | 128256 | 256 | {shown}" in capsys.readouterr().out
