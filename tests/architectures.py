"""Every causal architecture of transformers compared with its own `generate`.

The command fills the table of docs/architectures.md; the test suite runs a dozen of the same rows:

    python tests/architectures.py --out docs/architectures.md
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from small_models import VOCAB, kinds, small_model

from mod_fused import Ensemble, generate

NEW = 12
LENGTHS = (9, 5, 2)


class Decoded(NamedTuple):
    """Greedy tokens [B, T] and their log-probabilities [B, T]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Small:
    """One architecture: a policy and a reference of the same kind, prompts, and what they give."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.policy, self.reference = (small_model(kind, seed, **options) for seed in (1, 2))
        # Before 5.20 transformers loses the prompt where Phi-3 begins its cache again.
        self.with_cache = kind != "phi3 (LongRoPE)"
        # Dynamic frequencies: cached keys keep those of their time.
        self.cache_matters = "dynamic" in kind
        generator = torch.Generator().manual_seed(7)
        width = LENGTHS[0]
        self.ids = torch.randint(3, VOCAB, (len(LENGTHS), width), generator=generator)
        self.mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()

    def prompt(self, row: int) -> torch.Tensor:
        return self.ids[row : row + 1, self.ids.shape[1] - LENGTHS[row] :]

    def own(self, ids: torch.Tensor, use_cache: bool | None = None) -> Decoded:
        """What transformers generates, without padding."""
        use_cache = self.with_cache if use_cache is None else use_cache
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        # A copy: some versions leave the frequencies of a longer text on the modules.
        out = copy.deepcopy(self.policy).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options
        )
        tokens = out.sequences[:, ids.shape[1] :]
        logprobs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
        return Decoded(tokens, logprobs.gather(-1, tokens[..., None])[..., 0])

    def ours(self, ids: torch.Tensor, models: Any = None, **options: Any) -> Decoded:
        """What mod_fused generates at a corner: the policy, beside a reference that runs too."""
        ensemble = Ensemble([self.reference, self.policy] if models is None else models)
        fixed: dict[str, Any] = {"weights": [1.0], "do_sample": False, "max_new_tokens": NEW}
        fixed |= {"eos_token_id": [], "pad_token_id": 0}
        ran: list[Any] = []
        hooks = [
            model.register_forward_pre_hook(lambda *_: ran.append(1))
            for model in (self.policy, self.reference)
        ]
        try:
            out = generate(ensemble, input_ids=ids, **fixed, **options)
        except (TypeError, ValueError) as error:
            if ran:
                raise Wrong(f"refused after a model ran: {error}") from error
            raise
        finally:
            for hook in hooks:
                hook.remove()
        return Decoded(out.tokens, out.logprobs)

    @functools.cached_property
    def alone(self) -> list[Decoded]:
        """What transformers generates from each prompt by itself."""
        return [self.own(self.prompt(row)) for row in range(len(LENGTHS))]


class Wrong(AssertionError):
    """Other tokens, or other log-probabilities."""


def _same(got: Decoded, expected: Decoded, what: str) -> None:
    if not torch.equal(got.tokens, expected.tokens):
        row, step = (got.tokens != expected.tokens).nonzero()[0].tolist()
        raise Wrong(f"{what}: token {step} of row {row} differs")
    error = float((got.logprobs - expected.logprobs).abs().max())
    if not error < 1e-3:
        raise Wrong(f"{what}: log-probabilities are {error:.2g} nats off")


def _batch(rows: list[Decoded]) -> Decoded:
    return Decoded(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def _rows(small: Small) -> list[Decoded]:
    """What transformers generates from each row of the batch without padding."""
    return [small.own(small.ids[row : row + 1]) for row in range(len(LENGTHS))]


def alone(small: Small) -> None:
    """Each prompt by itself: the policy's own `generate`."""
    for row, expected in enumerate(small.alone):
        _same(small.ours(small.prompt(row)), expected, "one prompt")


def recomputed(small: Small) -> None:
    """Without a cache: the policy's own `generate` without a cache, and with one."""
    ids = small.prompt(0)
    expected = small.own(ids, use_cache=False)
    _same(small.ours(ids, use_cache=False), expected, "recomputed")
    if not small.cache_matters:
        # Tokens alone: chunked and stepwise scans of state-space models round differently.
        tokens = small.alone[0].tokens
        _same(expected._replace(tokens=tokens), expected, "transformers itself without a cache")


def padded(small: Small) -> None:
    """A left-padded batch: each row as alone."""
    ids = torch.where(small.mask.bool(), small.ids, 0)
    _same(small.ours(ids, attention_mask=small.mask), _batch(small.alone), "padded batch")


def permuted(small: Small) -> None:
    """A batch in another order: the same rows in that order, each as alone."""
    order = [2, 0, 1]
    rows = _rows(small)
    _same(small.ours(small.ids[order]), _batch([rows[row] for row in order]), "permuted batch")


def copied(small: Small) -> None:
    """Several responses to a prompt, and rows that go on with the state of others."""
    rows = _rows(small)
    twice = _batch([row for row in rows for _ in range(2)])
    _same(small.ours(small.ids, num_return_sequences=2), twice, "two responses")
    parents = [2, 0, 0]

    def resample(step: int, *_: torch.Tensor) -> torch.Tensor | None:
        return torch.tensor(parents) if step == 3 else None

    got = small.ours(small.ids, resample_fn=resample)
    _same(got, _batch([rows[row] for row in parents]), "resampled rows")


def shared(small: Small) -> None:
    """One model in two places, after another batch has gone through it."""
    models = [small.policy, small.policy]
    for row in (1, 0):
        got = small.ours(small.prompt(row), models)
        _same(got, small.alone[row], "one model in two places")


def _beyond(kind: str) -> None:
    """Past max_position_embeddings: transformers' own tokens, refused where it cannot."""
    small = Small(kind, max_position_embeddings=12, n_positions=12)
    small.ours(small.prompt(0))  # first: transformers raises what should be refused
    alone(small)


CHECKS: dict[str, Callable[[Small], None]] = {
    check.__name__: check for check in (alone, recomputed, padded, permuted, copied, shared)
}
COLUMNS = (*CHECKS, "beyond")


def _outcome(check: Callable[[], None]) -> str:
    """ "equal", "refused: why" by mod_fused before any model ran, or "wrong: what"."""
    try:
        check()
    except (TypeError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        kind = "refused" if "mod_fused" in Path(place).parts else f"wrong: {type(error).__name__}"
        return f"{kind}: {error}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    return "equal"


def examine(kind: str) -> dict[str, str]:
    """The outcome of every check, or {"unbuilt": why}."""
    try:
        small = Small(kind)
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {error}"}
    try:
        small.own(small.prompt(0))
    except Exception as error:
        return {"unbuilt": f"its own generate raises {type(error).__name__}: {error}"}
    found = {name: _outcome(functools.partial(check, small)) for name, check in CHECKS.items()}
    found["beyond"] = _outcome(functools.partial(_beyond, kind))
    return found


_HEAD = """# Architectures

What `python tests/architectures.py --out docs/architectures.md` (`make architectures`) found: every
causal architecture of transformers, built small with random weights, decoded at a corner of the
mixture, where pi* is one policy. A cell says `equal` (greedy tokens equal those of transformers'
own `generate`, their log-probabilities within 1e-3 nats), `refused` with the reason before any
model ran, or `wrong`. `make test-transformers` runs a dozen of the rows under the oldest and the
newest transformers that the decoder takes; outside them importing the decoder says so.

- alone: one prompt.
- recomputed: without a cache, equal to `generate` with and without one.
- padded: a left-padded batch, each row as alone.
- permuted: a batch in another order, each row as alone.
- copied: two responses to a prompt, and rows that go on with the state of others.
- shared: one model in two places, after another batch has gone through it.
- beyond: a sequence longer than max_position_embeddings.

"""


def _report(kind: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    pipe.send(examine(kind))


def _examined(kind: str, seconds: int = 180) -> dict[str, str]:
    """`examine` in a process of its own, so that one architecture cannot end the run."""
    context = multiprocessing.get_context("fork")
    end, pipe = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(kind, pipe), daemon=True)
    process.start()
    pipe.close()
    try:
        return end.recv() if end.poll(seconds) else {"unbuilt": f"longer than {seconds} s"}
    except EOFError:
        return {"unbuilt": "its process died"}
    finally:
        process.kill()
        process.join()


def _table(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """Markdown: a line per architecture, and the reasons below."""
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        word, _, reason = text.partition(": ")
        # The model's place and the lengths are the test's, not the architecture's.
        return f"{word} [{reasons.setdefault(reason, len(reasons) + 1)}]" if reason else word

    built = {kind: outcome for kind, outcome in found.items() if "unbuilt" not in outcome}
    yield "| Architecture | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for kind, outcome in built.items():
        yield f"| {kind} | " + " | ".join(cell(outcome[column]) for column in COLUMNS) + " |"
    yield ""
    yield from (f"[{number}] {' '.join(reason.split())}  " for reason, number in reasons.items())
    yield ""
    yield "Not compared:"
    yield ""
    for kind, outcome in found.items():
        if "unbuilt" in outcome:
            yield f"- {kind}: {' '.join(outcome['unbuilt'].split())[:160]}"


def main() -> int:
    """Write the table; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types; all of them by default")
    parser.add_argument("--out", type=Path, help="the Markdown file; without it: printed")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for kind in arguments.kinds or kinds():
        found[kind] = _examined(kind)
        print(kind, json.dumps(found[kind]), file=sys.stderr, flush=True)
    cells = [text.partition(": ")[0] for outcome in found.values() for text in outcome.values()]
    counts = {word: cells.count(word) for word in ("equal", "refused", "wrong")}
    text = "\n".join(
        [
            f"transformers {transformers.__version__}, torch {torch.__version__}: "
            f"{len(found)} architectures, {counts['equal']} comparisons equal, "
            f"{counts['refused']} refused, {counts['wrong']} wrong.",
            "",
            *_table(found),
            "",
        ]
    )
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(_HEAD + text)
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
