"""One head for a log-linear mixture: sum_k c_k W h_k = W sum_k c_k h_k. The last hidden states of
models that share the head W are mixed, and it multiplies once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import unwrapped
from .architectures import text_config
from .stacked_layers import FewRows

#: Model types of transformers whose own causal class makes its logits of its head alone, or of a
#: constant times that. A soft-cap counts only where the config sets one.
FAMILIES = frozenset(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation
    big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert codegen
    cohere cohere2 cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 diffllama dots1 dots3_note_text electra ernie ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3 gemma3_text
    gemma4 gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss
    gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
    hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2
    jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text mamba mamba2 marian
    mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text
    ministral ministral3 mistral mixtral modernbert-decoder mpt mvp nanochat nemotron nemotron_h
    olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phimoe plbart
    qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    rembert roberta roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 solar_open
    stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod
    youtu zamba zamba2 zaya
    """.split()
)

_LOCK = threading.Lock()


class OneHead:
    """What the models of one batch share, and how to mix what they do not.

    Args:
        models: those that run, by the names that error messages give them, in order.
        coefficients: float64 [rows, K] of the K models, rows = 1 for all.
        device: where they are mixed.
        together: a model that may run them all in one call.

    Raises:
        OneHeadError: the logits of the mixture are not those of its hidden states.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        coefficients: Tensor,
        device: torch.device,
        together: Any = None,
    ) -> None:
        heads = {label: _head(model, label) for label, model in models.items()}
        (first, shared), *others = heads.items()
        for label, head in others:
            _check_equal(shared, head, f"{first} and {label}")
        rounding = (coefficients.shape[1] + 1) * 2.0**-24
        sums_to_one = bool(((coefficients.sum(1) - 1.0).abs() <= rounding).all())
        if shared.bias is not None and not sums_to_one:
            raise OneHeadError("the head has a bias, and the coefficients do not sum to one")
        self._head: Any = FewRows(shared) if FewRows.suits(shared) else shared
        owners = [*models.values(), *([] if together is None else [together])]
        self._places = [place for model in owners for place in _places(model)]
        self._coefficients = [c[:, None] for c in coefficients.float().to(device).unbind(1)]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """For a while the models give hidden states [..., d] in place of logits [..., V] to this
        thread."""
        stand_ins: list[_Bypass] = []
        try:
            for module, name in self._places:
                stand_ins.append(_Bypass.begin(module, name))
            yield
        finally:
            for (module, name), bypass in zip(self._places, stand_ins, strict=False):
                bypass.end(module, name)

    def logits(self, hidden: Sequence[Tensor]) -> Tensor:
        """The logits [B, V] of the mixture, given the last hidden states [B, d] of each model. A
        model whose coefficient is 0 in a row is not looked at there."""
        mixed = torch.zeros_like(hidden[0], dtype=torch.float32)
        for c, h in zip(self._coefficients, hidden, strict=True):
            mixed = torch.where(c == 0, mixed, torch.addcmul(mixed, c, h.float()))
        weight = self._head.weight
        return self._head(mixed.to(weight.device, weight.dtype)).to(mixed.device)


class OneHeadError(ValueError):
    """One head cannot be had."""


def shared_head(
    one_head: bool | str,
    ensemble: Any,
    running: Sequence[int],
    coefficients: Tensor | None,
    device: torch.device,
    in_the_way: Mapping[str, bool],
) -> OneHead | None:
    """The head to use in a call of `generate`; None for one product for each model.

    Args:
        one_head: as in `generate`.
        ensemble: a `mod_fused.Ensemble`.
        running: the indices of those that run, in order (0: the reference).
        coefficients: float64 [rows, M+1], see `skipping.log_linear_coefficients`; None where the
            weights do not fit: their checks will refuse the call.
        device: of the logits.
        in_the_way: other arguments by name, and whether they need the models' own logits.

    Raises:
        ValueError: for one_head=True where it cannot be had, with the reason.
    """
    if not isinstance(one_head, bool) and one_head != "auto":
        raise ValueError(f"one_head must be True, False or 'auto', got {one_head!r}")
    if one_head is False:
        return None
    try:
        for name, needs_logits in in_the_way.items():
            if needs_logits:
                raise OneHeadError(f"{name} needs the logits of every model")
        if len(running) < 2 or coefficients is None:
            return None
        places = enumerate(ensemble.places.items(), ensemble.first)
        models = {name: model for i, (name, model) in places if i in running}
        together = None if ensemble.stacked is None else ensemble.stacked.together
        return OneHead(models, coefficients[:, list(running)], device, together)
    except OneHeadError as error:
        if one_head is True:
            raise ValueError(f"one_head=True is not possible: {error}") from None
        return None


class _Bypass(nn.Module):
    """Stands in the place of a head: threads that mix hidden states get these back, others logits.

    Two decodes, or a decode and other work, may share a model in several threads.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self._threads: list[int] = []

    @staticmethod
    def begin(module: nn.Module, name: str) -> _Bypass:
        with _LOCK:
            there = module._modules[name]
            bypass = there if isinstance(there, _Bypass) else _Bypass(there)  # type: ignore[arg-type]
            bypass._threads.append(threading.get_ident())
            module._modules[name] = bypass
            return bypass

    def end(self, module: nn.Module, name: str) -> None:
        with _LOCK:
            self._threads.remove(threading.get_ident())
            if not self._threads:
                module._modules[name] = self.head

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if threading.get_ident() in self._threads else self.head(hidden)

    @property
    def weight(self) -> Any:  # some models cast to its dtype
        return self.head.weight


def _without_bypass(module: Any) -> Any:
    return module.head if isinstance(module, _Bypass) else module


def _output(model: Any) -> Any:
    """The head of a model, of whatever kind."""
    return _without_bypass(unwrapped(model).get_output_embeddings())


def _places(model: Any) -> list[tuple[nn.Module, str]]:
    """Where a model has its head: modules, and its name there."""
    head = _output(model)
    return [
        (module, name)
        for module in model.modules()
        if not isinstance(module, _Bypass)
        for name, child in module._modules.items()
        if _without_bypass(child) is head
    ]


def _head(model: Any, label: str) -> nn.Linear:
    """The head of a model whose logits are linear in its input.

    Raises:
        OneHeadError: they are not, or it is not known.
    """
    own = unwrapped(model)
    config = getattr(own, "config", None)
    if config is None or not hasattr(own, "get_output_embeddings"):
        raise OneHeadError(f"{label} is a plain callable, which has no head")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, name = config.model_type, type(own).__name__
    known = kind in FAMILIES and type(own).__module__.startswith("transformers.models.")
    if not known or name != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind):
        raise OneHeadError(f"{label} is a {name} ({kind}), which is not among the families for it")
    if hasattr(model, "_orig_mod") or own._compiled_call_impl is not None or _patched(own):
        raise OneHeadError(f"{label} is compiled, or its forward is not that of {name}")
    if model._forward_hooks or own._forward_hooks:
        raise OneHeadError(f"{label} has a forward hook, which would see hidden states as logits")
    if getattr(text_config(own), "final_logit_softcapping", None) is not None:
        raise OneHeadError(f"{label} ({name}) has a soft-cap on its logits: they are not linear")
    head = _output(model)
    plain = type(head) is nn.Linear and not _patched(head)
    plain = plain and not head._forward_hooks and not head._forward_pre_hooks
    plain = plain and all(
        type(x) in (nn.Parameter, Tensor) and x.device.type != "meta"
        for x in (head.weight, head.bias)
        if x is not None
    )
    if not plain:
        raise OneHeadError(
            f"the head of {label} is a {type(head).__module__}.{type(head).__name__}, or changed, "
            "hooked, quantised, sharded or offloaded: expected a torch.nn.Linear in memory"
        )
    return head


def _patched(module: nn.Module) -> bool:
    """Whether a module's forward is not its class's. (accelerate's hooks only move tensors.)"""
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")


def _check_equal(first: nn.Linear, other: nn.Linear, labels: str) -> None:
    """Raise OneHeadError unless two heads are equal in everything."""
    if first is other:
        return
    for name in ("weight", "bias"):
        a, b = getattr(first, name), getattr(other, name)
        if (a is None) != (b is None):
            raise OneHeadError(f"the heads of {labels} differ: one of them has a bias")
        for what in ("shape", "dtype", "device"):
            x, y = getattr(a, what, None), getattr(b, what, None)
            if x != y:
                raise OneHeadError(f"the heads of {labels} differ in {what}: {x} and {y}")
        if a is not None and not torch.equal(a, b):
            raise OneHeadError(f"the heads of {labels} have different values of {name}")
