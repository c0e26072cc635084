"""The case `adapters`: LoRA policies of one base, as an ensemble may run them, beside ONE model in
transformers' own `generate`."""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mod_fused
from mod_fused.decoding.memory import available_bytes

from .. import measure
from ..case import Procedure, set_threads
from ..contestants import loops, models
from ..report import note, plain

ROUNDS, TOKENS, PROMPT, RANK = 5, 6, 2, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: A decode: seconds of each step behind the first token (it waits for the prompt), and the tokens.
Loop = Callable[[Tensor, int], tuple[list[float], Tensor]]
ONE, AUTHORS = "one model", "separate, the authors' loop"


def options(parser: argparse.ArgumentParser) -> None:
    """The case's own options."""
    add = parser.add_argument
    add("--models", nargs="+", choices=list(models.RANDOM), help="default: 0.1b")
    add("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    add("--policies", nargs="+", type=int, metavar="M", help="default: 2 4")
    add("--batches", nargs="+", type=int, metavar="B", help="default: 1 8 32")
    add("--tokens", type=int, default=TOKENS, metavar="T", help=f"a row; default {TOKENS}")
    add("--threads", type=int, metavar="N", default=torch.get_num_threads())
    add("--rounds", type=int, metavar="N", help=f"decodes of each; default {ROUNDS}")


def _adapted(name: str, dtype: torch.dtype, count: int) -> Any:
    """A PeftModel with `count` adapters on a random base."""
    from peft import LoraConfig, get_peft_model

    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS}
    settings = LoraConfig(**config, task_type="CAUSAL_LM")
    base = models.llama(name, 0, dtype, "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, settings, "0", autocast_adapter_dtype=False)
        for place in range(1, count):
            model.add_adapter(str(place), settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.01 * noise)
    return model.eval()


def _separate(base: Any, adapted: Any, count: int) -> mod_fused.Ensemble:
    """The same policies as whole models, their adapters merged."""
    whole = [copy.deepcopy(base) for _ in range(count + 1)]
    layers = dict(adapted.get_base_model().named_modules())
    with torch.no_grad():
        for place, model in enumerate(whole[1:]):
            for key, layer in model.named_modules():
                if hasattr(layers.get(key), "get_delta_weight"):
                    delta = layers[key].get_delta_weight(str(place))
                    layer.weight.copy_(layer.weight.float() + delta.float())
    return mod_fused.Ensemble(whole)


def _gaps(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def _ours(ensemble: mod_fused.Ensemble, weights: Sequence[float], **settings: Any) -> Loop:
    """Our `generate`."""

    def loop(prompts: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times: list[float] = []
        out = mod_fused.generate(
            ensemble, input_ids=prompts, weights=list(weights), max_new_tokens=tokens, seed=0,
            eos_token_id=[], pad_token_id=0, **settings,
            streamer=lambda step, drawn: times.append(time.perf_counter()),
        )  # fmt: skip
        return _gaps(times), out.tokens

    return loop


def _one(model: Any) -> Loop:
    """transformers' own `generate` of one model."""

    def loop(prompts: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times: list[float] = []

        def watch(ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, stopping_criteria=[watch],
        )  # fmt: skip
        return _gaps(times), out

    return loop


def _by_name(model: Any, weights: Sequence[float]) -> Loop:
    """All models as rows of one batch, each with its adapter's name, as PEFT offers it."""
    names = ["__base__", *map(str, range(len(weights)))]

    @torch.no_grad()
    def loop(prompts: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times, found, cache = [], [], None
        ids = prompts.repeat(len(names), 1)
        rows = [name for name in names for _ in range(len(prompts))]
        for position in range(tokens):
            out = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
                adapter_names=rows,
            )  # fmt: skip
            cache = out.past_key_values
            reference, *policies = out.logits[:, -1].chunk(len(names))
            drawn = mod_fused.sample(
                reference, policies, weights=list(weights), seed=0, position=position
            )
            found.append(drawn.tokens)
            ids = drawn.tokens.repeat(len(names))[:, None]
            times.append(time.perf_counter())
        return _gaps(times), torch.stack(found, 1)

    return loop


def _bytes(modules: Sequence[nn.Module], tensors: Sequence[Tensor] = ()) -> int:
    """The memory of all weights, each counted once."""
    every = [*tensors, *(p for module in modules for p in module.parameters())]
    return sum(
        {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in every}.values()
    )


def _authors(ensemble: mod_fused.Ensemble, weights: Sequence[float]) -> Loop:
    """The loop as MOD's authors wrote it: all models run, one after another."""

    def loop(prompts: Tensor, tokens: int) -> tuple[list[float], Tensor]:
        times: list[float] = []

        def around(draw: Callable[..., Any]) -> Callable[..., Any]:
            def drawn(*given: Any) -> Any:
                out = draw(*given)
                times.append(time.perf_counter())
                return out

            return drawn

        task = loops.Task(ensemble, prompts, tokens, "reverse_kl", tuple(weights))
        out, _ = loops.plain(task, around, loops.weighted_log_probs)
        return _gaps(times), out

    return loop


def contestants(adapted: Any) -> tuple[dict[str, Loop], dict[str, int]]:
    """The loops by name, and the bytes of their weights; `adapted` is a PeftModel with adapters
    "0", "1", ..."""
    count = len(adapted.peft_config)
    simplex = [1 / count] * count
    every = [0.8 / count] * count  # the reference's coefficient is 0.2: all models run
    stacked = mod_fused.Ensemble.from_adapters(adapted, forward="stacked")
    found = {ONE: _one(stacked.models[0])}
    base = _bytes([stacked.models[0]])
    factors = [
        tensor
        for module in stacked.stacked.together.modules()
        for tensor in getattr(module, "factors", ())
        if isinstance(tensor, Tensor)
    ]
    memory = {ONE: base}
    if (available_bytes(torch.device("cpu")) or 0) > 1.1 * (count + 1) * base:
        whole = _separate(stacked.models[0], adapted, count)
        found["separate, all run"] = _ours(whole, every)
        found["separate, simplex"] = _ours(whole, simplex)
        found[AUTHORS] = _authors(whole, simplex)
        memory["separate"] = _bytes(whole.models)
    found["PEFT by name, all run"] = _by_name(adapted, every)
    memory["PEFT by name"] = _bytes([adapted])
    apart = mod_fused.Ensemble.from_adapters(adapted, forward="separate")
    found["shared, one by one, simplex"] = _ours(apart, simplex)
    memory["stacked"] = base + _bytes([], factors)
    found["stacked, all run"] = _ours(stacked, every)
    found["stacked, simplex"] = _ours(stacked, simplex)
    found["stacked, all run, one head"] = _ours(stacked, every, one_head=True)
    found["stacked, simplex, one head"] = _ours(stacked, simplex, one_head=True)
    return found, memory


def _check(found: dict[str, Loop], prompts: Tensor, exact: bool) -> None:
    """Run every loop once.

    Raises:
        RuntimeError: two loops with the same weights draw different tokens, in float32. One row may
            differ: merged weights round otherwise.
    """
    first: dict[bool, tuple[str, Tensor]] = {}
    for name, loop in found.items():
        _, tokens = loop(prompts, 4)
        if name not in (ONE, AUTHORS) and exact:  # these have other noise
            other, expected = first.setdefault("simplex" in name, (name, tokens))
            if (tokens != expected).any(1).sum() > 1:
                raise RuntimeError(f"{name} draws other tokens than {other}")


def timed(
    head: dict[str, Any], found: dict[str, Loop], prompts: Tensor, tokens: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Time the loops in turn, round by round."""
    _check(found, prompts, head["dtype"] == "float32")
    others = measure.Others()
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, loop in found.items():
            seconds[name] += loop(prompts, tokens)[0]
    busy, one = others.cores(), statistics.median(seconds[ONE])
    for name, each in seconds.items():
        step = statistics.median(each)
        yield head | {
            "contestant": name,
            "ms / step": 1e3 * step,
            "tokens / s": len(prompts) / step,
            "step / one model": step / one,
            "other_cores": busy,
        }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All combinations of models, dtypes, policies and batches."""
    rounds = args.rounds or (1 if args.quick else ROUNDS)
    rows: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    missing: list[str] = []
    threads = torch.get_num_threads()
    set_threads(args.threads)
    try:
        for name in args.models or (["tiny"] if args.quick else ["0.1b"]):
            for dtype, count in itertools.product(args.dtypes, args.policies or [2, 4]):
                kind = getattr(torch, dtype)
                found, memory = contestants(_adapted(name, kind, count))
                head = {"model": name, "dtype": dtype, "M": count}
                if "separate" not in memory:
                    missing.append(f"separate models: no memory for {count + 1} ({name}, {dtype})")
                weights += [head | {"B": "", "contestant": n, "MB of weights": b / 1e6}
                            for n, b in memory.items()]  # fmt: skip
                for batch in args.batches or ([2] if args.quick else [1, 8, 32]):
                    prompts = models.random_prompts(batch, models.RANDOM[name][-1])[:, :PROMPT]
                    rows += timed(head | {"B": batch}, found, prompts, args.tokens, rounds)
                    ratios = [f"{row['step / one model']:.2f}" for row in rows[-len(found) :]]
                    note(f"{name} {dtype} M={count} B={batch}: {' '.join(ratios)}")
                del found
    except KeyboardInterrupt:  # a run of hours keeps what it has
        missing.append("what would have come next: the run was stopped")
    finally:
        set_threads(threads)
    what = (
        f"steps of LoRA policies (rank {RANK}, all linear layers) on random Llamas, "
        f"{args.threads} thread(s), medians of {rounds} decodes in turn"
    )
    result = {"what": what, "device": "cpu", "rows": rows, "memory": weights}
    return result | {"left_out": missing}


ADAPTERS = Procedure(
    help="LoRA policies of one base: separate, by PEFT's names, stacked, with one head",
    options=options,
    run=run,
    report=plain,
)
