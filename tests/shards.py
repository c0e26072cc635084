"""Calls on a vocabulary in shards, and the process of one rank that runs them.

    python tests/shards.py RANK FOLDER

writes what rank RANK of `RANKS` found to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # not under pytest

import torch
from cases import logits, normal

RANKS = 4
B = 4
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey")
#: Widths of the shards; V where the last ones hold padding.
LAYOUTS: dict[str, tuple[list[int], int | None]] = {
    "one_rank": ([1100], None),
    "two_halves": ([1100, 1100], None),
    "whole_tiles": ([1024, 2048, 1024, 77], None),
    "ragged": ([700, 1, 1500, 99], None),  # tiles of three ranks and of two
    "tiny": ([2, 1, 1, 3], None),
    "padded": ([576, 576, 576, 576], 1700),  # the last rank has nothing but padding
}
WEIGHTS = [0.5, 0.4]
SEEDS = torch.tensor([3, 2**40 + 1, -5, 77])
POSITIONS = torch.tensor([0, 9, 2**33, 5])
ROWS = torch.arange(B)


class Case(NamedTuple):
    """One call of `log_probs` and `sample` on a vocabulary in shards, as on one device."""

    layout: str
    args: tuple[Any, ...]  # reference, policies, weights
    mixing: dict[str, Any]
    drawing: dict[str, Any]
    chunk_tokens: int | None = None

    @property
    def widths(self) -> list[int]:
        return LAYOUTS[self.layout][0]

    @property
    def vocab(self) -> int:
        widths, vocab = LAYOUTS[self.layout]
        return vocab or sum(widths)

    def of_rank(self, rank: int) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The arguments that a rank passes. Padding holds NaN, which nobody may look at."""
        begin, width = sum(self.widths[:rank]), self.widths[rank]

        def cut(x: torch.Tensor) -> torch.Tensor:
            x = x[..., begin : begin + width]
            fill = float("nan") if x.is_floating_point() else 1
            return torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=fill)

        ref, policies, weights = self.args
        mixing, drawing = dict(self.mixing), dict(self.drawing)
        if "values" in mixing and "value_ids" not in mixing:
            mixing["values"] = cut(mixing["values"])
        if "bias" in drawing and "bias_ids" not in drawing:
            drawing["bias"] = cut(drawing["bias"])
        if "mask" in drawing:
            mask = cut(drawing["mask"])
            drawing["mask"] = packed(mask) if rank % 2 else mask
        if LAYOUTS[self.layout][1] is not None:
            mixing["vocab_size"] = self.vocab
        policies = [cut(x) for x in policies]
        return (None if ref is None else cut(ref), policies, weights), mixing, drawing


def packed(mask: torch.Tensor) -> torch.Tensor:
    """A bool mask [B, n] as int32 [B, ceil(n / 32)], bit s % 32 of word s // 32."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (padded.long() << torch.arange(32)).sum(-1)
    return (words - (words >> 31 << 32)).int()


def cases() -> dict[str, Case]:
    """By name; every tensor comes from a seed."""
    found = {}
    for layout in LAYOUTS:
        for kind in DIVERGENCES:
            found[f"{layout}-{kind}"] = make(layout, kind)
    for index, name in enumerate(OPTIONS):
        other = DIVERGENCES[index % len(DIVERGENCES)]
        chosen = [("ragged", kind) for kind in DIVERGENCES]
        chosen += [("padded", other)] + [("tiny", other)] * (name not in WIDE)
        if name == "no_reference":
            chosen = [("ragged", "reverse_kl"), ("padded", "reverse_kl")]
        for layout, kind in chosen:
            found[f"{layout}-{kind}-{name}"] = make(layout, kind, name)
    return found


def make(layout: str, kind: str, option: str | None = None) -> Case:
    widths, vocab = LAYOUTS[layout]
    vocab = vocab or sum(widths)
    rng = sum(map(ord, f"{layout}{kind}{option}"))
    ref, policies = logits(rng, B, vocab, 2, kind="typical", excluded=0.1)
    case = Case(layout, (ref, policies, WEIGHTS), {"divergence": kind}, {})
    asked = {"return_model_logprobs": True, "return_proposal_logprobs": True}
    drawing = {"seed": SEEDS, "position": POSITIONS, **asked}
    case = case._replace(drawing=drawing)
    return case if option is None else OPTIONS[option](case, rng)


def _with(case: Case, **options: Any) -> Case:
    args = options.pop("args", case.args)
    own = {x: options.pop(x) for x in tuple(options) if x in MIXING}
    return case._replace(args=args, mixing=case.mixing | own, drawing=case.drawing | options)


MIXING = {
    "normalizer", "values", "value_ids", "value_weights", "prefix_logprobs",
    "mixture_prefix_logprobs", "logit_scales", "plausibility", "plausibility_tensor",
}  # fmt: skip


def _filters(case: Case, rng: int) -> Case:
    return _with(case, temperature=0.8, top_k=60, top_p=0.9, min_p=0.001)


def _filters_by_row(case: Case, rng: int) -> Case:
    return _with(
        case,
        temperature=torch.tensor([0.0, 0.7, 1.0, 1.6]),
        top_k=torch.tensor([3, 0, 5000, 2]),
        top_p=torch.tensor([1.0, 0.8, 0.3, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.2, 1.0]),
    )


def _ties(case: Case, rng: int) -> Case:
    """Keys of few values, so that thresholds and the most likely tokens tie across the shards."""
    ref, policies, weights = case.args
    vocab = ref.shape[1]
    coarse = (normal(rng, B, vocab) * 1.5).round()
    coarse[3] = 0.0
    same = [coarse, coarse]
    temperature = torch.tensor([1.0, 0.0, 0.7, 0.0])
    return _with(case, args=(coarse, same, weights), temperature=temperature, top_k=2, top_p=0.7)


def _mask(case: Case, rng: int) -> Case:
    mask = normal(rng, B, case.vocab) > 0.5
    mask[0] = False
    mask[0, -1] = True  # one token, in the last shard
    mask[2] = False  # none
    return _with(case, mask=mask)


def _bias(case: Case, rng: int) -> Case:
    bias = 3.0 * normal(rng, B, case.vocab)
    bias[0, 0] = torch.nan
    bias[1, -1] = torch.inf
    bias[2, : case.vocab // 2] = -torch.inf
    mask = normal(rng + 1, B, case.vocab) > -1.0
    mask[:, -2] = True
    return _with(case, bias=bias, mask=mask, top_p=0.95)


def _bias_ids(case: Case, rng: int) -> Case:
    last = case.vocab - 1
    ids = torch.tensor([[0, last, 2, -1], [1, last, 3, 0], [4, 4, 1, 2], [last + 1, 0, 1, 2]])
    return _with(case, bias=5.0 * normal(rng, B, 4), bias_ids=ids, temperature=1.3)


def _values(case: Case, rng: int) -> Case:
    values = -normal(rng, 2, B, case.vocab).abs()
    values[0, 1, case.vocab // 2 :] = -torch.inf
    values[1, 2, -1] = torch.nan
    return _with(case, values=values, value_weights=[0.5, 1.0])


def _value_ids(case: Case, rng: int) -> Case:
    last = case.vocab - 1
    ids = torch.tensor([[0, last, 2, -1], [1, last, 3, 0], [4, 5, 1, 2], [last + 1, 0, 1, 2]])
    return _with(case, values=normal(rng, 1, B, 4), value_ids=ids)


def _values_alone(case: Case, rng: int) -> Case:
    return _with(case, args=(case.args[0], [], []), values=normal(rng, 1, B, case.vocab))


def _history(case: Case, rng: int) -> Case:
    return _with(case, prefix_logprobs=-10.0 * normal(rng, B, 3).abs(), logit_scales=[0.5, 1, 2])


def _own_mass(case: Case, rng: int) -> Case:
    prefix = -5.0 * normal(rng, B, 3).abs().double()
    return _with(case, prefix_logprobs=prefix, mixture_prefix_logprobs=prefix.mean(1))


def _zero(case: Case, rng: int) -> Case:
    return _with(case, normalizer="zero", plausibility=1e-3, plausibility_tensor=1)


def _plausibility_by_row(case: Case, rng: int) -> Case:
    return _with(case, plausibility=torch.tensor([0.0, 1e-2, 1.0, 0.3]))


def _broken(case: Case, rng: int) -> Case:
    """NaN in the last shard, nothing left, +inf in the first, and a policy of weight 0."""
    ref, policies, _ = case.args
    ref, policies = ref.clone(), [x.clone() for x in policies]
    ref[0, -1] = torch.nan
    ref[1] = -torch.inf
    policies[0][2, 0] = torch.inf
    policies[1][:, 1] = torch.nan
    policies[1][3, -1] = torch.inf
    return _with(case, args=(ref, policies, torch.tensor([0.6, 0.0])), return_model_logprobs=False)


def _signed(case: Case, rng: int) -> Case:
    ref, policies, _ = case.args
    near = [ref + 0.3 * (x - ref).nan_to_num(neginf=0.0) for x in policies]
    return _with(case, args=(ref, near, [[1.0, 0.0], [1.3, -0.3], [0.0, 1.0], [0.2, 0.1]]))


def _sixteen_bits(case: Case, rng: int) -> Case:
    ref, policies, weights = case.args
    args = ref.bfloat16(), [policies[0].half(), policies[1].bfloat16()], weights
    return _with(case, args=args, seed=7, position=3)


def _chunks(case: Case, rng: int) -> Case:
    return _filters_by_row(case, rng)._replace(chunk_tokens=4096)


def _greedy(case: Case, rng: int) -> Case:
    """The most likely token is the last, ties with the first, or stands in the middle."""
    models = [x.clone() for x in (case.args[0], *case.args[1])]
    for x in models:
        x[:2, -1] = x[1, 0] = x[2, case.vocab // 2] = 20.0
    return _with(case, args=(models[0], models[1:], WEIGHTS), temperature=0.0)


def _no_reference(case: Case, rng: int) -> Case:
    return _with(case, args=(None, case.args[1], [0.5, 0.5]))


OPTIONS: dict[str, Any] = {
    "filters": _filters, "filters_by_row": _filters_by_row, "ties": _ties, "mask": _mask,
    "bias": _bias, "bias_ids": _bias_ids, "values": _values, "value_ids": _value_ids,
    "values_alone": _values_alone, "history": _history, "own_mass": _own_mass, "zero": _zero,
    "plausibility_by_row": _plausibility_by_row, "broken": _broken, "signed": _signed,
    "sixteen_bits": _sixteen_bits, "chunks": _chunks, "no_reference": _no_reference,
    "greedy": _greedy,
}  # fmt: skip
#: Options that need more than a few tokens.
WIDE = {"filters_by_row", "chunks", "zero", "plausibility_by_row"}


class Refusal(NamedTuple):
    """A call that every rank must refuse: options by rank, and what the message says."""

    of_rank: tuple[dict[str, Any], ...]
    message: str
    kind: type = ValueError


def _rank_two(**options: Any) -> tuple[dict[str, Any], ...]:
    return ({}, {}, options, {})


REFUSALS = {
    "rows": Refusal(_rank_two(rows=2), "B must be the same on all ranks .* 3 on rank 0, 2 on rank"),
    "weights": Refusal(_rank_two(weights=[0.25]), r"weights must .*\[0.5\] on rank 0, \[0.25\]"),
    "divergence": Refusal(_rank_two(divergence="jsd"), "divergence must .* reverse_kl on rank 0"),
    "top_k": Refusal(_rank_two(top_k=3), "top_k must be the same on all ranks"),
    "list by row": Refusal(_rank_two(temperature=[1.0, 0.1, 1.0]), "temperature must be the same"),
    "numbers in a list": Refusal(
        tuple({"top_k": [1, 2, 3 + (rank == 2)]} for rank in range(RANKS)),
        r"top_k must .*\[1, 2, 3\] on rank 0, \[1, 2, 4\] on rank 2",
    ),
    "values": Refusal(
        tuple(
            {
                "values": torch.zeros(1 + (rank == 2), 3, 50),
                "value_weights": torch.ones(1 + (rank == 2)),
            }
            for rank in range(RANKS)
        ),
        r"values must be the same .* \[1, 3\] of torch.float32 on rank 0",
    ),
    "mask": Refusal(_rank_two(mask=torch.ones(3, 50) > 0), "mask must .* got None on rank 0"),
    "seed": Refusal(_rank_two(seed=None), "seed must .* got 1 on rank 0, seed=None on rank 2"),
    "vocab_size": Refusal(_rank_two(vocab_size=90), "vocab_size must be the same on all ranks"),
    "function": Refusal(_rank_two(function="log_probs"), "the function must be the same"),
    "too_many": Refusal(({"vocab_size": 201},) * RANKS, "vocab_size must be between 1 and the 200"),
    "none_left": Refusal(({"vocab_size": 0},) * RANKS, "vocab_size must be between 1 and the 200"),
    "no_integer": Refusal(({"vocab_size": 1.5},) * RANKS, "vocab_size must be an int", TypeError),
    "cpu": Refusal(({"backend": "cpu"},) * RANKS, "group runs on backend 'torch', got 'cpu'"),
    "triton": Refusal(({"backend": "triton"},) * RANKS, "group runs on backend 'torch'"),
    "width": Refusal(({"policy_width": 49},) * RANKS, r"must have one width, got \[50, 49\]"),
    "no_group": Refusal(({"group": 7},) * RANKS, "ProcessGroup, got int", TypeError),
    "no_member": Refusal(({"group": -100},) * RANKS, "must be one that this process is in"),
    "no_bias": Refusal(({"bias_ids": torch.zeros(3, 1).long()},) * RANKS, "bias_ids needs bias"),
    "compiled": Refusal(({"function": "compiled"},) * RANKS, "group cannot be compiled", Exception),
}
#: A rank refuses its own arguments by their name, the others by its rank.
ONE_REFUSES = Refusal(_rank_two(temperature=-1.0), "temperature must be in .*, got -1.0")


def call(refusal: Refusal, rank: int, group: Any) -> Any:
    """A call of one rank with 50 columns of its own."""
    import mod_fused

    options = dict(refusal.of_rank[rank])
    rows, width = options.pop("rows", 3), options.pop("policy_width", 50)
    x = normal(1, rows, 50)
    weights, name = options.pop("weights", [0.5]), options.pop("function", "sample")
    arguments = {"group": group} | ({} if name == "log_probs" else {"seed": 1}) | options
    function = getattr(mod_fused, "sample" if name == "compiled" else name)
    if name == "compiled":
        run = torch.compile(
            lambda: function(x, [x], weights, **arguments), fullgraph=True, backend="eager"
        )
        return run()
    return function(x, [x[:, :width]], weights, **arguments)


def _run(case: Case, rank: int, groups: dict[int, Any]) -> Any:
    from mod_fused import log_probs, sample
    from mod_fused.torch_kernels import launch

    ranks = len(case.widths)
    if rank >= ranks:
        return None
    args, mixing, drawing = case.of_rank(rank)
    usual = launch.CHUNK_TOKENS
    launch.CHUNK_TOKENS = case.chunk_tokens or usual
    drawn = sample(*args, **mixing, **drawing, group=groups[ranks])
    found = log_probs(*args, **mixing, group=groups[ranks])
    launch.CHUNK_TOKENS = usual
    return found, tuple(drawn)


def _others(rank: int, group: Any) -> dict[str, Any]:
    """Calls with seed=None and with tensors of the caller's, and no rows at all."""
    from mod_fused import Sample, log_probs, sample

    torch.manual_seed(rank)
    case = make("ragged", "jsd")
    args, mixing, drawing = case.of_rank(rank)
    unseeded = sample(*args, **mixing, group=group)
    out = Sample(*(torch.full_like(x, 7) for x in sample(*args, **mixing, **drawing, group=group)))
    given = sample(*args, **mixing, **drawing, group=group, out=out)
    wide = torch.full((B, case.widths[rank]), 7.0)
    log_pi = log_probs(*args, **mixing, group=group, out=wide)
    empty = sample(args[0][:0], [x[:0] for x in args[1]], WEIGHTS, seed=1, group=group)
    return {
        "unseeded": tuple(unseeded),
        "out": tuple(out),
        "is_out": given is out and log_pi is wide,
        "log_probs_out": wide,
        "empty": tuple(empty.tokens.shape),
    }


def main(rank: int, folder: Path) -> None:
    """Join the group, run everything, write it down."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, RANKS)}
    groups[RANKS] = dist.group.WORLD
    found: dict[str, Any] = {name: _run(x, rank, groups) for name, x in cases().items()}
    found["others"] = _others(rank, groups[RANKS])
    for name, refusal in {**REFUSALS, "one_refuses": ONE_REFUSES}.items():
        try:
            found[f"refusal-{name}"] = ("none", repr(call(refusal, rank, groups[RANKS])))
        except Exception as error:
            found[f"refusal-{name}"] = (type(error).__name__, str(error))
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
