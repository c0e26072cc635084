"""M+1 causal language models, their tokenizers and their KV caches, advanced one token at a time.

`Ensemble` holds the models and tokenizers, and checks that a token id means the same token in all
of them. `Ensemble.start` returns an `EnsembleState`, which holds one batch: the KV caches, the
attention masks, the positions. `mod_fused.generate` is a loop around it; you can write your own.

Only `from_pretrained` and `embedded` import transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_loading import load_base_and_adapters
from .adapters import check_shared
from .architectures import check_causal_lm, embedded_ids, input_device, is_transformers_model
from .loading import load_model, load_tokenizer
from .model_state import CallableState, CausalLMState, EnsembleState, StackedState
from .one_head import OneHead
from .prompts import Prompts, encode_prompts
from .stacked_adapters import FORWARDS, StackedModel, runs_stacked, stacked
from .transformers_version import check_transformers_version
from .vocabularies import common_ids, label

check_transformers_version()


class Ensemble:
    """A reference model and M policies that share a vocabulary.

    Args:
        models: [reference, policy 1, ..., policy M]. Each is a transformers causal language model,
            or any callable `step(tokens) -> logits`: tokens int64 [B, n], logits floating point [B,
            V] of the token that comes next. The first call gets the prompt, later calls get the one
            new token of each row (n = 1), so the callable keeps its own state; with
            `use_cache=False` every call gets the whole sequence. A callable gets padded
            prompts without a mask: give it prompts of equal length, or let it recognise padding. A
            callable whose coefficient is 0 is not called (see `mod_fused.generate`).
            The reference may be None: then only reverse KL is possible, and pi* is proportional to
            the product of pi_i^w_i.
        tokenizers: one tokenizer for all models, or a list with one per model (None where there is
            none). Without any, `generate` needs `input_ids` and returns no text.
        check_tokenizers: compare the vocabularies of the tokenizers and refuse different ones.
            Special roles may differ (a base model and its chat model often end a text differently):
            the end-of-sequence tokens of all models count. A tokenizer may have added
            tokens behind the others' vocabulary (a [PAD]): a warning names them, and only the ids
            in common are drawn.

    Raises:
        TypeError: if a model is neither a causal language model nor callable (see
            docs/architectures.md for what is refused).
        ValueError: if there is no model, if two models share modules that PEFT has changed in
            place, if the number of tokenizers is wrong, or if two tokenizers differ.
    """

    def __init__(
        self,
        models: Sequence[Any],
        tokenizers: Any = None,
        *,
        check_tokenizers: bool = True,
    ) -> None:
        if not isinstance(models, (list, tuple)):
            raise TypeError(
                "models must be a list [reference, policy 1, ...] of models or callables, "
                f"got {type(models).__name__}; Ensemble.from_pretrained loads folders and hub names"
            )
        if not models or list(models) == [None]:
            raise ValueError(f"models must hold a reference or a policy, got {list(models)}")
        for index, model in enumerate(models):
            if not callable(model) and not (index == 0 and model is None):
                raise TypeError(
                    f"{label(index)} must be a causal language model or a callable "
                    f"step(tokens) -> logits, got {type(model).__name__}"
                )
            if is_transformers_model(model):
                check_causal_lm(model, label(index))
        self.models = list(models)
        check_shared(self.places)
        if not isinstance(tokenizers, (list, tuple)):
            tokenizers = [tokenizers] * len(models)
        if len(tokenizers) != len(models):
            raise ValueError(
                f"expected {len(models)} tokenizers, one per model, got {len(tokenizers)}"
            )
        self.tokenizers = [
            t if m is not None else None for m, t in zip(models, tokenizers, strict=True)
        ]
        # Of `from_adapters`: one module that runs all models, and when.
        self.stacked: StackedModel | None = None
        self.forward = "separate"
        # How many ids all tokenizers have, where some have added tokens; None where all are alike.
        self.common_ids = common_ids(self.tokenizers) if check_tokenizers else None

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path | None,
        policies: Sequence[str | Path],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        check_tokenizers: bool = True,
        **kwargs: Any,
    ) -> Ensemble:
        """Load models and tokenizers with AutoModelForCausalLM and AutoTokenizer.

        Args:
            reference: local folder or hub name of the reference model; None for reverse KL without
                one.
            policies: local folders or hub names of the M policies. A name given twice is loaded
                once.
            dtype: torch dtype, its name, or "auto"; None is transformers' own default.
            device: where to put the models; None leaves them where transformers loads them.
            check_tokenizers: see `Ensemble`.
            **kwargs: for AutoModelForCausalLM.from_pretrained; the options about where files come
                from (subfolder, revision, cache_dir, local_files_only, token, trust_remote_code,
                ...) reach the tokenizers too. use_safetensors is True unless given: no pickle is
                loaded.

        A name may be that of a PEFT adapter. Each adapter gets a base model of its own, as a
        `PeftModel`, and uses its base model's tokenizer unless it has one. Any other policy without
        a tokenizer uses the reference's, or the first policy's if there is no reference.

        Raises:
            ImportError: if transformers is not installed, or PEFT for an adapter.
            OSError: if a folder or name cannot be loaded, or a tokenizer's files are broken.
            ValueError: if a checkpoint or adapter has tensors that are missing, unexpected or of
                another shape; they are named.
        """
        if isinstance(policies, (str, Path)):
            raise TypeError(f"policies must be a list of folders or hub names, got {policies!r}")
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ImportError(
                "loading language models needs transformers: pip install 'mod-fused[hf]'"
            ) from error

        options = dict(kwargs) if dtype is None else {"dtype": dtype, **kwargs}
        names = [None if name is None else str(name) for name in (reference, *policies)]
        models: dict[str | None, Any] = {None: None}
        tokenizers: dict[str | None, Any] = {None: None}
        for name in dict.fromkeys(names):
            if name is not None:
                model = load_model(AutoModelForCausalLM, name, **options)
                models[name] = model if device is None else model.to(device)
                tokenizers[name] = load_tokenizer(name, **options)
        first = next((tokenizers[name] for name in names if name is not None), None)
        return cls(
            [models[name] for name in names],
            [first if tokenizers[name] is None else tokenizers[name] for name in names],
            check_tokenizers=check_tokenizers,
        )

    @classmethod
    def from_adapters(
        cls,
        base: Any,
        adapters: Sequence[str | Path] | None = None,
        *,
        tokenizers: Any = None,
        forward: str = "auto",
        check_base: bool = True,
        check_tokenizers: bool = True,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Ensemble:
        """LoRA adapters of one base model as policies; the base is the reference. Its weights are
        in memory once, and one forward pass runs all M+1 models: with K the models that run, a
        layer reads its weights once for K B rows, then adds x A_i B_i to the rows of policy i, by
        two batched matrix products.

        The models of the ensemble share the base's weights: do not train or merge what they come
        from meanwhile. A `PeftModel` and a base model that are given stay as they are. Hooks on the
        ensemble's models, and other changes to them, act where a model runs by itself.

        Args:
            base: folder or hub name of the base model; or a transformers model, which may be
                quantised; or a `PeftModel` that has the adapters.
            adapters: folders or hub names of M PEFT adapters. With a PeftModel: names of its
                adapters; None: all of them, in its order. Ranks, targets and scalings may differ,
                and so may modules_to_save, trained tokens, DoRA and biases of the adapters.
            tokenizers: as in `Ensemble`. None: each adapter's own, else the base's; with a
                PeftModel none.
            forward: "stacked" runs all models in one pass; "separate" one after the other, each on
                the shared weights; "auto" stacks wherever that leaves the tokens the same.
            check_base: refuse an adapter that names a base model of another name.
            check_tokenizers: see `Ensemble`.
            dtype, device, kwargs: of the base, as in `from_pretrained`.

        Raises:
            ImportError: if transformers or PEFT is not installed.
            OSError: if a folder or name cannot be loaded.
            TypeError: for a base of another type.
            ValueError: if an adapter's tensors are missing, unexpected or of another shape, if it
                was made for another base, or if it is of a kind that cannot share its base (what
                changes the base itself, and other methods than LoRA): the adapter is named.
        """
        if forward not in FORWARDS:
            raise ValueError(f"forward must be one of {', '.join(FORWARDS)}, got {forward!r}")
        if isinstance(adapters, (str, Path)):
            raise TypeError(f"adapters must be a list, got {adapters!r}")
        options = dict(kwargs) if dtype is None else {"dtype": dtype, **kwargs}
        names = None if adapters is None else [str(name) for name in adapters]
        plain, sources, own = load_base_and_adapters(base, names, check_base, device, **options)
        models = stacked(plain, sources)
        given = own if tokenizers is None else tokenizers
        ensemble = cls(models.models, given, check_tokenizers=check_tokenizers)
        ensemble.stacked, ensemble.forward = models, forward
        return ensemble

    @classmethod
    def embedded(cls, policies: Sequence[str] | None = None, **kwargs: Any) -> Ensemble:
        """The small models that ship with the package: the reference and one policy per objective.

        Args:
            policies: names of objectives; None means all of `mod_fused.world.OBJECTIVES`.
            **kwargs: for `from_pretrained`.
        """
        from .. import world

        names = world.OBJECTIVES if policies is None else policies
        return cls.from_pretrained(
            world.checkpoint("reference"), [world.checkpoint(name) for name in names], **kwargs
        )

    def __repr__(self) -> str:
        names = ["None" if m is None else type(m).__name__ for m in self.models]
        return f"Ensemble(reference={names[0]}, policies=[{', '.join(names[1:])}])"

    @property
    def present(self) -> list[Any]:
        """The models that are not None, the reference first."""
        return [model for model in self.models if model is not None]

    @property
    def first(self) -> int:
        """The index of the first model that is not None."""
        return 0 if self.models[0] is not None else 1

    @property
    def num_policies(self) -> int:
        """M, the number of policies."""
        return len(self.models) - 1

    @property
    def places(self) -> dict[str, Any]:
        """The models that are not None, by the names that error messages give them."""
        return {label(i): m for i, m in enumerate(self.models) if m is not None}

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer there is, used to decode responses; None if there is none."""
        return next((t for t in self.tokenizers if t is not None), None)

    @property
    def device(self) -> torch.device | None:
        """Where prompts go and logits are mixed: the first language model's device; None when all
        models are plain callables."""
        models = filter(is_transformers_model, self.models)
        return next((input_device(model) for model in models), None)

    @property
    def vocab_size(self) -> int | None:
        """How many token ids all language models can read and, where some tokenizers have added
        tokens, all tokenizers have. None when all models are callables with the same tokens."""
        sizes = [embedded_ids(m) for m in self.models if is_transformers_model(m)]
        return min([*sizes, *([] if self.common_ids is None else [self.common_ids])], default=None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The end-of-sequence ids of all models: of the generation config, or of the tokenizer."""
        found: set[int] = set()
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            ids = getattr(tokenizer, "eos_token_id", None) if ids is None else ids
            found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        return sorted(found)

    @property
    def pad_token_id(self) -> int:
        """A padding id that all models can read: a tokenizer's or model's, an eos, or 0."""
        return self.padding_id(())

    def padding_id(self, eos_token_ids: Sequence[int]) -> int:
        """`pad_token_id` for a call with end-of-sequence ids of its own: without a padding token it
        is the first of those, then the models'."""
        sources = [*self.tokenizers, *(getattr(m, "generation_config", None) for m in self.models)]
        candidates = [getattr(source, "pad_token_id", None) for source in sources]
        limit = self.vocab_size
        for token in (*candidates, *eos_token_ids, *self.eos_token_ids):
            if token is not None and 0 <= token and (limit is None or token < limit):
                return token
        return 0

    def encode(
        self,
        prompts: Prompts | None = None,
        *,
        input_ids: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        pad_token_id: int | None = None,
        add_special_tokens: bool | None = None,
        models: Collection[int] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Token ids [B, n_k] and left-padding masks [B, n_k] (None: no padding) of each model's
        prompts.

        See `mod_fused.generate` for the arguments. Models that are None get no entry, nor those
        that are not among `models`, their indices (0: the reference; None: all).
        """
        present = [i for i, model in enumerate(self.models) if model is not None]
        wanted = [k for k, i in enumerate(present) if models is None or i in models]
        return encode_prompts(
            prompts,
            input_ids,
            attention_mask,
            tokenizers=[self.tokenizers[i] for i in present],
            labels=[label(i) for i in present],
            pad_token_id=self.pad_token_id if pad_token_id is None else pad_token_id,
            device=self.device,
            add_special_tokens=add_special_tokens,
            wanted=wanted,
        )

    def start(
        self,
        input_ids: Sequence[Tensor],
        attention_mask: Sequence[Tensor | None],
        *,
        max_new_tokens: int = 1,
        use_cache: bool = True,
        models: Sequence[int] | None = None,
        head: OneHead | None = None,
    ) -> EnsembleState:
        """Begin a batch; runs no model yet.

        Args:
            input_ids: int64 [B, n_k] for each model that runs, left-padded.
            attention_mask: [B, n_k] for each of them, or None where no row is padded.
            max_new_tokens: how many tokens the caller means to draw, to refuse what will not fit.
            use_cache: keep KV caches; False recomputes the whole sequence at every step.
            models: the indices of those that run, in order (0: the reference); None: all that are
                not None. In place of another one's logits stand those of the first that runs: its
                coefficient must be 0. No token is beyond the vocabulary of a language model that
                does not run.
            head: mixes the hidden states of the models that run, for `step`; None: each model has a
                head of its own, as always for `read`.

        Raises:
            ValueError: if a model that runs is in training mode, a token id is outside its
                vocabulary, the sequence will not fit into its table of positions, or it cannot read
                padded prompts.
        """
        states: list[CallableState] = []
        present = [i for i, model in enumerate(self.models) if model is not None]
        running = present if models is None else list(models)
        together = self.stacked if len(running) > 1 else None
        if together is not None and runs_stacked(together, self.forward):
            prompts = list(input_ids), list(attention_mask)
            states = [StackedState(together, running, *prompts, use_cache)]
            try:
                states[0].check(max_new_tokens)
            except ValueError:  # such as padding, where prompts differ in length by model
                if self.forward == "stacked":
                    raise
                states = []
        if not states:
            for index, ids, mask in zip(running, input_ids, attention_mask, strict=True):
                model = self.models[index]
                kind = CausalLMState if is_transformers_model(model) else CallableState
                states.append(kind(model, label(index), ids, mask, use_cache))
                states[-1].check(max_new_tokens)
        skipped = [self.models[i] for i in present if i not in running]
        widths = [embedded_ids(model) for model in skipped if is_transformers_model(model)]
        places = [running.index(i) if i in running else 0 for i in present]
        absent = [None] if self.models[0] is None else []
        return EnsembleState(states, [*absent, *places], min(widths, default=None), head)
