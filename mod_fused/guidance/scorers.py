"""Scorers: ordinary Hugging Face models whose output is a value, run with their KV caches.

A *dense* scorer is a causal language model whose "logits" at the prefix [x, y] are the values
V(x, [y, z]) of every next token z: one pass scores the vocabulary (Controlled Decoding, arXiv
2310.17022). A *scalar* scorer is a token classifier with one label, which gives V(x, y) of the
prefix that it has read. To score K next tokens it reads all K in one pass, each as its own branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.architectures import (
    accepted_arguments,
    cache_name,
    check_candidates,
    is_transformers_model,
    text_config,
)
from ..decoding.model_state import CallableState, CausalLMState, positions_of
from ..decoding.sequences import Rows


@dataclass(frozen=True)
class Scorer:
    """A model and the transform of its output.

    Args:
        model: dense: a causal language model, or a callable `step(tokens) -> values [B, V]` as in
            `Ensemble`. Scalar: a decoder with a token classification head of one label
            (AutoModelForTokenClassification, num_labels=1).
        transform: applied to the output in float32, elementwise; logsigmoid makes the logit of a
            classifier the log-probability of its attribute (FUDGE, arXiv 2104.05218). None: the
            output is the value.

    Raises:
        TypeError: if the model is neither dense nor scalar.
    """

    model: Any
    transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not is_transformers_model(self.model):
            if not callable(self.model):
                raise TypeError(
                    "a scorer must be a language model or a callable step(tokens) -> values, "
                    f"got {type(self.model).__name__}"
                )
            return
        if not self.dense and getattr(self.model.config, "num_labels", None) != 1:
            raise TypeError(
                "a scorer must be a causal language model (a value for every token) or a token "
                f"classifier with one label, got {type(self.model).__name__} with "
                f"{getattr(self.model.config, 'num_labels', 'no')} labels"
            )

    @property
    def dense(self) -> bool:
        """Whether one pass gives the value of every next token."""
        return (
            not is_transformers_model(self.model) or self.model.get_output_embeddings() is not None
        )

    def start(
        self, label: str, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool
    ) -> CallableState:
        """The state of one batch; a `ScalarState` for a scalar scorer."""
        kind = CausalLMState if is_transformers_model(self.model) else CallableState
        if not self.dense:
            kind = ScalarState
        return kind(self.model, label, input_ids, attention_mask, use_cache)

    def finish(self, output: Tensor) -> Tensor:
        """The values [...] of a model's output [...]."""
        return output if self.transform is None else self.transform(output.float())


class ScalarState(CausalLMState):
    """A scalar scorer and its KV cache: values of K candidates for the next token in one pass.

    The pass reads the token drawn last and the K candidates, which all stand at the position after
    it. A candidate attends to the prefix and to itself, not to other candidates. The cache then
    drops the candidates.
    """

    reads_ahead = 1

    def __init__(
        self,
        model: Any,
        label: str,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool,
    ) -> None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        super().__init__(model, label, input_ids, mask, use_cache)

    def check(self, max_new_tokens: int) -> None:
        super().check(max_new_tokens)
        missing = {"position_ids", cache_name(self.model)} - accepted_arguments(self.model)
        if missing:
            raise ValueError(
                f"{self.label} must take position_ids and a cache to score candidates in "
                f"one pass; {type(self.model).__name__} does not take {', '.join(sorted(missing))}"
            )
        check_candidates(self.model, self.label)

    def fork(self, copies: int) -> None:
        self.copies = copies  # its cache is a DynamicCache, see score()

    def score(self, tokens: Tensor | None, candidates: Tensor) -> Tensor:
        """V(x, [y, z]) [B, K] of the candidates z int64 [B, K].

        `tokens` int64 [B] were drawn last; None at the first call, which reads the prompts. After
        `fork` the first call gets the candidates of all copies; the copies of a row have the same.
        """
        if self.copies > 1:
            copies, self.copies = self.copies, 1
            values = self.score(tokens, candidates[::copies])
            parents = torch.arange(len(values), device=values.device).repeat_interleave(copies)
            self.select(parents)
            return values[parents]
        self.append(tokens)
        assert self.attention_mask is not None
        drawn = self.sequences.shape[1] - self.attention_mask.shape[1]
        seen = F.pad(self.attention_mask, (0, drawn), value=1)
        name = cache_name(self.model)
        cache: Any = self.options.get(name)
        unread = self.sequences if cache is None else self.sequences[:, -1:]
        batch, count = candidates.shape
        new, total = unread.shape[1], seen.shape[1]
        positions = positions_of(seen)
        seen = seen.bool()
        allowed = seen.new_zeros(batch, new + count, total + count)
        causal = seen.new_ones(total, total).tril()[total - new :]
        allowed[:, :new, :total] = causal & seen[:, None]
        allowed[:, new:, :total] = seen[:, None]
        allowed[:, new:, total:] = torch.eye(count, dtype=torch.bool, device=seen.device)
        # An additive mask with finite entries: padding attends to nothing, and -inf would give NaN.
        dtype = self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype, device=seen.device)
        mask.masked_fill_(~allowed, torch.finfo(dtype).min)

        options: dict[str, Any] = {"use_cache": self.use_cache}
        if self.use_cache:
            if cache is None:
                from transformers import DynamicCache

                cache = DynamicCache(config=text_config(self.model))
                self.options = {name: cache}
            options[name] = cache
        output = self.model(
            input_ids=torch.cat([unread, candidates.to(unread.device)], dim=1),
            attention_mask=mask[:, None],
            position_ids=torch.cat(
                [positions[:, -new:], (positions[:, -1:] + 1).expand(-1, count)], dim=1
            ),
            return_dict=True,
            **options,
        )
        if self.use_cache:
            cache.crop(-count)
        return output.logits[:, new:, 0].to(self.home)


def outputs(model: Any, batch: Rows) -> Tensor:
    """A language model's logits or values [N, L, V or 1] at every token of a batch."""
    options = {}
    if "position_ids" in accepted_arguments(model):
        options["position_ids"] = positions_of(batch.attention_mask)
    return model(
        input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False, **options
    ).logits


def taken(values: Tensor, tokens: Tensor) -> Tensor:
    """V(x, y^t) [N, T] of the tokens int64 [N, T] of the responses, picked from a dense scorer's
    values [N, T, V], V(x, [y^(t-1), z]) of every z."""
    return values.gather(-1, tokens[..., None])[..., 0]


def prefix_values(scorer: Any, batch: Rows) -> Tensor:
    """V(x, y^t) of every prefix that ends with token 1..L-1 of the row, [N, L-1]. The entries of
    prompt tokens have no meaning."""
    values = outputs(scorer, batch)
    if Scorer(scorer).dense:
        return taken(values[:, :-1], batch.ids[:, 1:])
    return values[:, 1:, 0]
