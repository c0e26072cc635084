"""The Triton kernels compiled for GPUs that need not be here: no spills, no stack, and loads that
show that every logit is read once. The launches are those of `mod_fused.sample` and `log_probs`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from launches import launches

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from mod_fused.triton_kernels import launch  # noqa: E402
from mod_fused.triton_kernels.ahead_of_time import (  # noqa: E402
    TARGETS,
    compile_launch,
    disassembled,
    machine_code,
)

TILE = 1024


def candidates(rows: int, count: int) -> dict[str, Any]:
    """Two values of `count` candidates in each row."""
    ids = torch.empty((rows, count), dtype=torch.int64, device="meta")
    values = torch.empty((2, rows, count), dtype=torch.bfloat16, device="meta")
    return {"rows": rows, "values": values, "value_ids": ids}


#: Names, and arguments that differ from the defaults; `vocab`, `policies`, `dtype` and `op` too.
CALLS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "reverse_kl-fp32": {"dtype": torch.float32},
    "reverse_kl-8_policies": {"policies": 8},
    "reverse_kl-misaligned": {"vocab": 50257},
    "reverse_kl-padded": {"vocab": 50304, "vocab_size": 50257},
    "reverse_kl-model_logprobs": {"return_model_logprobs": True, "rows": 64},
    "reverse_kl-proposal_logprobs": {"return_proposal_logprobs": True},
    "reverse_kl-mask": {
        "temperature": 0.7,
        "mask": torch.empty((1, 128256), dtype=torch.bool, device="meta"),
    },
    "reverse_kl-bias": {"bias": torch.empty(128256, device="meta")},
    "jsd-bias": {"divergence": "jsd", "top_p": 0.9, "bias": torch.empty(128256, device="meta")},
    "reverse_kl-filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.1},
    "reverse_kl-top_k": {"top_k": 50},
    "reverse_kl-long": {"vocab": 262144, "top_p": 0.9, "temperature": 0.7},
    "reverse_kl-log_probs": {"op": "log_probs", "rows": 64},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd-log_probs": {"divergence": "jsd", "op": "log_probs"},
    "alpha": {"divergence": "alpha:0.5"},
    "jeffrey": {"divergence": "jeffrey"},
    "jsd-fp32-8_policies": {"divergence": "jsd", "dtype": torch.float32, "policies": 8, "rows": 64},
    "reverse_kl-many_rows": {"rows": 64},
    "forward_kl-many_rows": {"divergence": "forward_kl", "rows": 64},
    "jsd-many_rows": {"divergence": "jsd", "rows": 64},
    "alpha-many_rows": {"divergence": "alpha:0.5", "rows": 64},
    "jeffrey-many_rows": {"divergence": "jeffrey", "rows": 64},
    "reverse_kl-1_candidate": {**candidates(1, 1)},
    "reverse_kl-candidates": {**candidates(64, 1500), "top_p": 0.9},
    "jsd-candidates": {**candidates(1, 40), "divergence": "jsd"},
    "jeffrey-candidates": {**candidates(64, 1500), "divergence": "jeffrey"},
}
#: Triton 3.6 spills a few values in these.
SPILLS_OF_3_6 = {"reverse_kl-filters": 8, "jsd-fp32-8_policies": 2, "jeffrey-candidates": 18}
EVERYWHERE = ("reverse_kl", "reverse_kl-filters", "jsd", "jsd-many_rows", "jeffrey-many_rows")
CASES = [(t, name) for t in TARGETS for name in CALLS if t == "sm_90" or name in EVERYWHERE]


def logit_loads(made: launch.Launch, logit_bytes: int, whole: int, last: int) -> Counter[int]:
    """Loads by bytes that a thread of the mixture kernel has for logits: every phase reads its tile
    of every model once, and so does the race in the winner's tile, each in a branch for whole tiles
    and in one for a row's last tile; one branch runs. Log-linear keys have a second form, for whole
    tiles in which all logits are finite. Where a task has several tiles, log-sum-exps load the
    next whole tile in their loop, and the first one before it."""
    variant, tokens = made.variant, TILE // made.threads
    phases = 1 + variant.sums + (2 if variant.evaluations else 0) - variant.early
    phases += variant.draw
    finite = not (variant.general or variant.sums or variant.model_logprobs or variant.candidates)
    loads: Counter[int] = Counter()
    ahead = bool(variant.sums) and variant.chunk > 1
    for width, forms in ((whole, phases + finite + ahead), (last, phases)):
        loads[width] += variant.models * forms * tokens * logit_bytes // width
    return loads


@pytest.mark.parametrize(("target", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_compiled_kernels_spill_nothing_and_read_each_logit_once(target: str, name: str) -> None:
    call = CALLS[name]
    spills = SPILLS_OF_3_6.get(name, 0) if triton.__version__.startswith("3.6.") else 0
    mixture, *filters = launches(**call)
    code = machine_code(compile_launch(mixture, TARGETS[target]))
    assert code.spills <= spills and code.stack <= 4 * spills, code
    logit_bytes = call.get("dtype", torch.bfloat16).itemsize
    # Rows that do not start at multiples of 16 bytes are read logit by logit, and so is the last
    # tile where the vocabulary ends at no such multiple.
    tokens = TILE // mixture.threads
    widest = min(16, tokens * logit_bytes)
    whole = logit_bytes if call.get("vocab", 128256) % 8 else widest
    last = logit_bytes if mixture.arguments[0].vocab % 8 else whole
    expected = logit_loads(mixture, logit_bytes, whole, last)
    if mixture.variant.finish:
        expected[16] += 2  # the keys of a tile, for the last phase
    if mixture.variant.bias:
        # That of a whole tile and that of the last; once more where keys have a second form.
        forms = 3 if mixture.variant.phases == 1 else 2
        expected[16] += forms * tokens * 4 // 16
    if not mixture.variant.candidates:  # whose loads may be as wide
        assert {w: n for w, n in code.loads.items() if w in expected or w > 8} == expected, code
    if mixture.variant.phases == 1 and not mixture.variant.model_logprobs | mixture.variant.scores:
        # Besides logits: two numbers of every part, four where they are kept at a temperature too,
        # and the mask of a tile and of the winner's, at most byte by byte.
        parts = -(-mixture.variant.tiles * mixture.variant.parts // mixture.threads)
        others = (2 + 2 * mixture.variant.tempered) * parts
        others += mixture.variant.mask * 2 * tokens
        assert code.loads.total() - expected.total() <= others, code
    for filter_launch in filters:
        code = machine_code(compile_launch(filter_launch, TARGETS[target]))
        assert code.spills <= spills and code.stack <= 4 * spills, code


@pytest.mark.parametrize("default", [True, False])
def test_products_and_sums_are_fused_whatever_the_default(default: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", default)
    (made,) = launches()
    _, assembly = disassembled(compile_launch(made, TARGETS["sm_90"]).asm["cubin"])
    assert assembly.count("FFMA") > assembly.count("FMUL")


def test_all_targets_and_calls_are_covered() -> None:
    assert {target for target, _ in CASES} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {name for _, name in CASES} == set(CALLS)
