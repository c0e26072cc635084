"""`Guidance`: trained scorers as the value_fn of `mod_fused.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoding.adapters import check_shared
from ..decoding.architectures import embedded_ids
from ..decoding.model_state import CallableState
from ..decoding.values import Scores
from .scorers import ScalarState, Scorer


class Guidance:
    """Scores of the next token from J scorers; `generate(..., value_fn=Guidance(...))`.

    The decoder draws from pi*(z) = pi_ref(z) (f')^-1(u(z) - Z), where u(z) contains
    sum_j v_j V_j(x, [y, z]) and v are the value_weights of `generate`. For reverse KL pi*(z) is
    proportional to pi_ref(z) exp(sum_j v_j V_j(x, [y, z])). Scorers and policies share a tokenizer;
    the scorers read the first model's prompts.

    Args:
        scorers: J models, callables or `Scorer`s; see there.
        candidates: K: score the K most likely tokens of the reference and exclude all others.
            Needed for scalar scorers. None: every token is scored. mask_fn then removes tokens from
            the K; a row with no candidate left is invalid.

    Raises:
        TypeError, ValueError: for an object that is no scorer, for an empty list, or for K below 1.
    """

    def __init__(self, scorers: Sequence[Any], *, candidates: int | None = None) -> None:
        if not isinstance(scorers, (list, tuple)):
            raise TypeError(f"scorers must be a list of models, got {type(scorers).__name__}")
        if not scorers:
            raise ValueError("scorers must hold at least one model, got none")
        self.scorers = [s if isinstance(s, Scorer) else Scorer(s) for s in scorers]
        check_shared(self.places)
        if candidates is not None:
            if isinstance(candidates, bool) or not isinstance(candidates, int):
                raise TypeError(f"candidates must be an int, got {type(candidates).__name__}")
            if candidates < 1:
                raise ValueError(f"candidates must be at least 1, got {candidates}")
        elif not all(scorer.dense for scorer in self.scorers):
            raise ValueError(
                "a scalar scorer reads each token that it scores: say how many with candidates=K"
            )
        self.candidates = candidates
        self.of_prefixes = True  # False: the values are of single tokens

    @classmethod
    def embedded(cls, objectives: Sequence[str] | None = None) -> Guidance:
        """The dense scorers that ship with the package, for the models of `Ensemble.embedded`.

        Args:
            objectives: names of objectives; None means all of `mod_fused.world.OBJECTIVES`.
        """
        from transformers import AutoModelForCausalLM

        from .. import world

        names = world.OBJECTIVES if objectives is None else objectives
        folders = [world.scorer(name) for name in names]
        return cls([AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders])

    @property
    def places(self) -> dict[str, Any]:
        """The scorers' models, by the names that error messages give them."""
        return {f"scorer {i}": scorer.model for i, scorer in enumerate(self.scorers)}

    @property
    def reads_reference(self) -> bool:
        """Whether the reference's logits choose the candidates."""
        return self.candidates is not None

    @property
    def num_values(self) -> int:
        """J, the number of scorers."""
        return len(self.scorers)

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        has_reference: bool = True,
        max_new_tokens: int = 1,
        use_cache: bool = True,
    ) -> GuidanceState:
        """Begin a batch of prompts int64 [B, n], left-padded; runs no model yet.

        Raises:
            ValueError: candidates without a reference, or a scorer that is in training mode, has
                too few positions for the tokens, or cannot read padded prompts.
        """
        if self.candidates is not None and not has_reference:
            raise ValueError("candidates are the reference's most likely tokens: it is None")
        states = []
        for index, scorer in enumerate(self.scorers):
            label = f"scorer {index}"
            states.append(scorer.start(label, input_ids, attention_mask, use_cache))
            states[-1].check(max_new_tokens)
        return GuidanceState(self.scorers, states, self.candidates)


class GuidanceState:
    """One batch in progress: the caches of all scorers. Made by `Guidance.start`."""

    def __init__(
        self, scorers: list[Scorer], states: list[CallableState], candidates: int | None
    ) -> None:
        self._scorers = scorers
        self._states = states
        self._candidates = candidates

    def fork(self, copies: int) -> None:
        """See `values.ValueState.fork`."""
        for state in self._states:
            state.fork(copies)

    def select(self, rows: Tensor) -> None:
        """See `values.ValueState.select`."""
        for state in self._states:
            state.select(rows)

    @torch.no_grad()
    def step(self, tokens: Tensor | None, reference: Tensor | None, vocab_size: int) -> Scores:
        """Values [J, B, V], or (values [J, B, K], ids int64 [B, K]); see `values.ValueState`."""
        ids = None
        if self._candidates is not None:
            assert reference is not None
            ids = reference[:, :vocab_size].topk(min(self._candidates, vocab_size)).indices
        rows = []
        for scorer, state in zip(self._scorers, self._states, strict=True):
            if isinstance(state, ScalarState):
                assert ids is not None
                _check_width(state.label, embedded_ids(state.model), vocab_size)
                output = state.score(tokens, ids)
            else:
                output = state.step(tokens)
                _check_width(state.label, output.shape[1], vocab_size)
                output = output[:, :vocab_size] if ids is None else output.gather(1, ids)
            rows.append(scorer.finish(output))
        values = rows[0][None] if len(rows) == 1 else torch.stack(rows)
        return values if ids is None else (values, ids)


def _check_width(label: str, known: int, vocab_size: int) -> None:
    if known < vocab_size:
        raise ValueError(
            f"{label} knows {known} tokens, the models have {vocab_size}: pass vocab_size"
        )
