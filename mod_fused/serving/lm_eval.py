"""A model of lm-evaluation-harness whose answers are those of the mixture.

    python -m mod_fused.serving.lm_eval run --model mod_fused --tasks TASKS \\
        --model_args '{"pretrained": "REF", "policies": ["A", "B"], "weights": [0.5, 0.5]}'

The command is the harness's own, which does not know this model until the module is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text

from ..call.checks import check_mixture
from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.likelihood import loglikelihood
from ..decoding.options import support_cut
from ..decoding.prompts import encode_text, padded
from ..torch_kernels.philox import split_mix

#: The harness's arguments of a generation and ours.
_DRAWING = {"do_sample", "temperature", "top_k", "top_p", "min_p"}


@register_model("mod_fused")
class ModFusedLM(TemplateLM):
    """The mixture as a model of the harness.

    Args:
        pretrained: folder or hub name of the reference; None for reverse KL without one.
        policies: folders or hub names of the policies.
        weights: one number for each policy; None: equal weights that sum to one.
        divergence, normalizer, sequence_history, plausibility_tensor, backend: as in
            `mod_fused.loglikelihood`, for answers that are given and for those that are drawn. In
            a document longer than max_length the history begins anew with each window.
        plausibility: the same; "auto" cuts the support of answers that are drawn as
            `mod_fused.generate` does, and scores those that are given without a cut.
        batch_size: rows at a time, a whole number.
        max_length: the most tokens of context and answer; None: of the models' positions, or 2048.
        max_gen_toks: the most tokens of an answer, where a task does not say.
        seed: of the answers that are drawn; request n of a call has SplitMix64(seed + n), whatever
            batch_size is.
        device, dtype, others: as in `Ensemble.from_pretrained`.

    Raises:
        ValueError: a batch size that is no whole number, or options that `mod_fused.sample` would
            refuse.
        TypeError, OSError: as `Ensemble.from_pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None,
        policies: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        divergence: str = "reverse_kl",
        normalizer: str = "exact",
        sequence_history: bool = False,
        plausibility: float | str | None = "auto",
        plausibility_tensor: int = 0,
        backend: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
        dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(f"batch_size must be a whole number of rows, got {batch_size!r}")
        self.batch_size = int(batch_size)
        weights = [1 / len(policies)] * len(policies) if weights is None else weights
        logits = torch.empty(1, 2, device="meta")
        check_mixture(
            None if pretrained is None else logits, [logits] * len(policies), weights, divergence,
            normalizer, plausibility=support_cut(plausibility, divergence),
            plausibility_tensor=plausibility_tensor,
        )  # fmt: skip
        self.ensemble = Ensemble.from_pretrained(
            pretrained, policies, device=device, dtype=dtype, **kwargs
        )
        self.tokenizer = self.ensemble.tokenizer
        self.mixture: dict[str, Any] = {
            "weights": list(weights), "divergence": divergence, "normalizer": normalizer,
            "sequence_history": sequence_history, "plausibility_tensor": plausibility_tensor,
            "backend": backend,
        }  # fmt: skip
        self.cut_of_drawn = plausibility
        self.cut_of_given = None if isinstance(plausibility, str) else plausibility
        self.max_length = max_length or self._positions()
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self._device = self.ensemble.device

    def _positions(self) -> int:
        configs = [model.config.get_text_config() for model in self.ensemble.present]
        found = [getattr(config, "max_position_embeddings", None) for config in configs]
        return min([n for n in found if n], default=2048)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches of requests by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one string, by the reference's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text."""
        return encode_text(string, self.tokenizer, add_special_tokens)

    def _inputs(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        ids, mask = padded(rows, self.ensemble.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """log pi* of each (key, context, continuation), and whether it is the greedy answer."""
        rows = [(c[-max(1, self.max_length + 1 - len(y)) :], y) for _, c, y in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for batch in self._batches(rows):
            out = loglikelihood(
                self.ensemble,
                responses=[rows[i][1] for i in batch],
                plausibility=self.cut_of_given,
                **self._inputs([rows[i][0] for i in batch]),
                **self.mixture,
            )
            pairs = zip(out.totals.tolist(), out.greedy.all(1).tolist(), strict=True)
            for i, pair in zip(batch, pairs, strict=True):
                found[i] = pair
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], pair)
        return found

    def _batches(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
        """Indices of rows of about equal length, that fit into max_length when they are padded."""
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i]))):
            longest = [max(len(rows[j][part]) for j in (*batch, i)) for part in (0, 1)]
            if batch and (len(batch) == self.batch_size or sum(longest) > self.max_length + 1):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log pi* of whole documents, window by window."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, tokens))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, greedy unless the task asks for draws.

        Raises:
            ValueError: arguments of a generation that the decoder does not have, by name.
        """
        seeds = split_mix(self.seed, len(requests), torch.device("cpu")).tolist()
        order = Collator(
            [(*request.args, seed) for request, seed in zip(requests, seeds, strict=True)],
            sort_fn=lambda x: -len(self.tok_encode(x[0])),
            group_fn=lambda x: x[1],
            group_by="gen_kwargs",
        )
        found = []
        for batch in order.get_batched(n=self.batch_size):
            options: dict[str, Any] = dict(normalize_gen_kwargs(batch[0][1], self.max_gen_toks))
            until = [text for text in options.pop("until") if text]
            length = options.pop("max_gen_toks")
            if unknown := options.keys() - _DRAWING:
                raise ValueError(f"unknown arguments of a generation: {', '.join(sorted(unknown))}")
            room = self.max_length - length
            if room < 1:
                raise ValueError(
                    f"max_gen_toks must be below max_length = {self.max_length}, got {length}"
                )
            out = generate(
                self.ensemble,
                **self._inputs([self.tok_encode(context)[-room:] for context, _, _ in batch]),
                max_new_tokens=length,
                plausibility=self.cut_of_drawn,
                stop_strings=until or None,
                seed=[seed for _, _, seed in batch],
                **self.mixture | options,
            )
            for request, text in zip(batch, out.texts or (), strict=True):
                answer = postprocess_generated_text(text, until, None)
                found.append(answer)
                self.cache_hook.add_partial("generate_until", request[:2], answer)
        return order.get_original(found)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
