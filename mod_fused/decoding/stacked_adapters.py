"""PEFT's LoRA adapters of one base as models that share all its weights: one for each policy, and
one that runs them all in one call.

No weight of the base is copied, and the PeftModel stays as it is: module trees are copied, tensors
are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architectures import text_config
from .stacked_layers import (
    ALONE,
    Factors,
    FewRows,
    PerPolicy,
    Rows,
    StackedEmbedding,
    StackedLayer,
    StackedLinear,
)

#: Ways of initialising an adapter that leave the base as it is.
_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Variants of LoRA whose forward, without training, is LoRA's own.
_PLAIN = {"MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant"}
#: PEFT's layers that add x A B to what their base layer gives, whatever that computes with.
_STACKED = {
    "AqlmLoraLinear",
    "AwqLoraLinear",
    "EetqLoraLinear",
    "Embedding",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "TorchaoLoraLinear",
}
#: Layers and variants that run on one policy's rows at a time: whole layers, and what PEFT runs
#: with `adapter_names`.
_BY_ITSELF = {
    "BdLoraLinearVariant",
    "Conv1d",
    "ModulesToSaveWrapper",
    "QALoraLinearVariant",
    "TrainableTokensWrapper",
}
_DORA = "DoraLinearVariant"
#: How an ensemble of adapters may run.
FORWARDS = ("auto", "stacked", "separate")
#: Models that run one after the other, and why.
_SEPARATE = {
    "rwkv": "RWKV's cached step mixes the rows of a batch",
    "xlnet": "XLNet's layers do not get the rows in front",
}


class StackedModel(NamedTuple):
    """What `stacked` makes.

    Attributes:
        models: M+1 models, the base's first; each runs by itself.
        together: one that runs any of them in one call, rows model-major.
        rows: tells `together` which.
        separate: why they must not run together; None where they may.
    """

    models: list[Any]
    together: Any
    rows: Rows
    separate: str | None


def stacked(base: Any, sources: Sequence[tuple[Any, str]]) -> StackedModel:
    """A base model and M adapters of it as M+1 models that share its weights.

    Args:
        base: the model without adapters.
        sources: for each policy a `PeftModel` around this base, or around a copy of its modules, in
            evaluation mode, and the name of its adapter.

    Raises:
        ValueError: an adapter is merged, or is one that cannot be mixed with others on one base;
            says which and why.
    """
    layers: dict[str, list[tuple[Any, str] | None]] = {}
    for policy, (source, name) in enumerate(sources):
        for path, layer in _adapted(source.get_base_model(), name):
            layers.setdefault(path, [None] * len(sources))[policy] = layer, name
    made = {path: _layer(base, path, changed) for path, changed in layers.items()}

    def model(rows: Rows) -> Any:
        # A model by itself keeps the layers that its adapter leaves alone.
        only = rows.policies[0] if rows.policies else None
        mine = {
            id(base.get_submodule(path)): make(rows)
            for path, make in made.items()
            if len(rows.models) > 1 or (only is not None and layers[path][only] is not None)
        }
        if len(rows.models) > 1:
            for module in base.modules():
                if FewRows.suits(module) and id(module) not in mine:
                    mine[id(module)] = FewRows(module)
        return copy_of_modules(base, mine)

    together = Rows(range(len(sources) + 1))
    models = [model(Rows([place])) for place in together.models]
    return StackedModel(models, model(together), together, _separate(base))


def check_plain(base: Any) -> None:
    """Raise ValueError for a model that is no base without adapters, ready to run."""
    check_evaluating(base)
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(f"weights of the base model are offloaded or not loaded: {ALONE}")
    if any(_adapted(base)):
        raise ValueError(
            "the base model holds adapters already (load_adapter): load it without, or pass the "
            "PeftModel"
        )


def check_evaluating(model: Any) -> None:
    """Raise ValueError for a model in training mode."""
    if model.training:
        raise ValueError(f"the {type(model).__name__} is in training mode: call .eval() on it")


def without_adapters(peft_model: Any) -> Any:
    """The base model of a PeftModel, free of PEFT's layers; shares its weights.

    Raises:
        ValueError: adapters are merged into the weights, or change the base themselves.
    """
    check_evaluating(peft_model)
    for name, config in peft_model.peft_config.items():  # one changes the base for all
        check_config(name, config)
    if any(getattr(module, "merged_adapters", None) for module in peft_model.modules()):
        raise ValueError("an adapter is merged into the base model: call unmerge_adapter()")
    base = peft_model.get_base_model()
    plain = {id(layer): _plain(layer) for _, layer in _adapted(base)}
    return copy_of_modules(base, plain)


def runs_stacked(stacked: StackedModel, forward: str) -> bool:
    """Whether an ensemble runs its models in one call. "auto" does so wherever the tokens stay the
    same (`python -m bench.run adapters`).

    Raises:
        ValueError: "stacked", for a model that must run separately; says why.
    """
    if forward == "stacked" and stacked.separate is not None:
        raise ValueError(
            f"the models cannot run stacked, {stacked.separate}: pass forward='separate'"
        )
    return forward != "separate" and stacked.separate is None


def _separate(base: Any) -> str | None:
    """Why several models' rows cannot go through the layers in one call; None where they can."""
    if any(getattr(getattr(x, "state", None), "threshold", 0.0) for x in base.modules()):
        return "bitsandbytes' 8-bit layers round a row by what the other rows hold"
    return _SEPARATE.get(text_config(base).model_type)


def copy_of_modules(model: nn.Module, instead: dict[int, nn.Module] | None = None) -> Any:
    """A copy of the tree of modules that shares its leaves, parameters and buffers. `instead`:
    modules to put in place of others, by their ids.

    Raises:
        ValueError: a module's own `forward` is a function, which would go on calling the original.
    """
    for path, module in model.named_modules():
        if any(module.children()) and isinstance(vars(module).get("forward"), FunctionType):
            raise ValueError(
                f"the forward of {path or 'the base model'} has been replaced (as "
                "torch.compile does), and a copy would call the original: pass the model without"
            )
    leaves = [module for module in model.modules() if not any(module.children())]
    shared = (*leaves, *model.parameters(), *model.buffers())
    copied = copy.deepcopy(model, {id(x): x for x in shared} | (instead or {}))
    vars(copied).pop("_compiled_call", None)  # transformers' own: it runs the original
    return copied


def check_config(name: str, config: Any) -> None:
    """Raise ValueError for an adapter that cannot share its base with others."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    start = getattr(config, "init_lora_weights", True)
    reasons = {
        f"is of the kind {method}, not LoRA": method != "LORA",
        "changes the biases of its base model (bias)": getattr(config, "bias", "none") != "none",
        f"changes the weights of its base model (init_lora_weights={start!r})": start
        not in _INITIALISED,
    }
    reasons |= {
        f"{what} ({field})": getattr(config, field, None)
        for field, what in {
            "layer_replication": "repeats layers of its base model",
            "target_parameters": "changes parameters, not layers",
            "kasa_config": "changes the weights of its base model",
            "arrow_config": "routes every token among other adapters",
            "monteclora_config": "is random",
            "alora_invocation_tokens": "begins at a token that it looks for in whole sequences",
        }.items()
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"the adapter {name} {reason}: {ALONE}")


def check_saved(name: str, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise ValueError if an adapter's tensors hold some of its base model (PEFT's
    save_embedding_layers) with other values than the base's `own`."""
    for key, tensor in tensors.items():
        if key in own and not torch.equal(own[key], tensor.to(own[key])):
            raise ValueError(
                f"the adapter {name} changes weights of its base model ({key}, saved with it): "
                f"{ALONE}"
            )


def _adapted(base: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT has put into the base, the outermost ones, with their names. `adapter`:
    those that this one changes."""
    outermost = "\0"
    for path, module in base.named_modules():  # a layer's parts follow it
        if type(module).__module__.startswith("peft.") and not path.startswith(outermost):
            outermost = f"{path}."
            if adapter is None or adapter in _adapters_of(module):
                yield path, module


def _adapters_of(layer: Any) -> set[str]:
    if hasattr(layer, "token_adapter"):
        return set(layer.token_adapter.trainable_tokens_delta)
    found = [getattr(layer, name, ()) for name in ("lora_A", "lora_embedding_A", "modules_to_save")]
    return {name for adapters in found for name in adapters}


def _plain(layer: Any) -> nn.Module:
    """The base's own layer inside one of PEFT's."""
    return layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()


def _layer(
    base: Any, path: str, changed: Sequence[tuple[Any, str] | None]
) -> Callable[[Rows], nn.Module]:
    """A function that makes the layer to put in place of the base's. `changed`: for each policy
    PEFT's layer and the name of the adapter, None where it has the base's."""
    old = base.get_submodule(path)
    what = f"{path} ({type(old).__name__})"
    if "experts" in path.split("."):
        raise ValueError(f"the layer {what} sees the tokens sorted by expert: {ALONE}")
    kinds = {kind for pair in changed if pair is not None for kind in _kinds(*pair)}
    embedding = isinstance(old, nn.Embedding)
    if embedding and old is not base.get_input_embeddings():
        raise ValueError(f"the embedding {what} does not read the token ids: {ALONE}")
    if any(old.children()):
        raise ValueError(f"{what} is no single layer: {ALONE}")
    if kinds <= _STACKED or kinds <= {"Linear", _DORA}:
        factors = _factors(changed, embedding)
        kind: type[StackedLayer] = StackedEmbedding if embedding else StackedLinear
        few = FewRows(old) if FewRows.suits(old) else old
        return lambda rows: kind(few if len(rows.models) > 1 else old, factors, rows, what)
    if unknown := kinds - _STACKED - _BY_ITSELF:
        raise ValueError(f"the layer {what} cannot be stacked ({', '.join(unknown)}): {ALONE}")
    calls = [None if pair is None else _call(*pair) for pair in changed]
    return lambda rows: PerPolicy(old, calls, rows, what)


def _kinds(layer: Any, name: str) -> set[str]:
    """What an adapter makes of a layer: PEFT's class, and its variant of LoRA."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    return {type(layer).__name__, *({type(variant).__name__} if variant else ())} - _PLAIN


def _call(layer: Any, name: str) -> Callable[..., Any]:
    """One of PEFT's layers with one adapter."""
    if hasattr(layer, "token_adapter"):
        return partial(_with_tokens, layer.token_adapter, name)
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[name]
    return partial(_with_name, layer, name)


def _with_tokens(adapter: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An embedding, or a head tied to it, with the tokens that an adapter has trained."""
    return adapter.forward_adapters(x, [name], *args, **kwargs)


def _with_name(layer: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's way of running an adapter by its name."""
    return layer(x, *args, adapter_names=[name] * len(x), **kwargs)


@torch.no_grad()
def _factors(changed: Sequence[tuple[Any, str] | None], embedding: bool) -> Factors:
    """The adapters of a layer, of ranks r_i, as tensors for all M policies."""
    pairs = [None if pair is None else _pair(*pair, embedding) for pair in changed]
    given = [pair for pair in pairs if pair is not None]
    dtype = max((a.dtype for a, _ in given), key=lambda kind: kind.itemsize)
    if given[0][0].device.type == "cpu":  # small products of 16 bits are slow there
        dtype = torch.promote_types(dtype, torch.float32)
    rank, size = max(len(a) for a, _ in given), len(pairs)
    A = given[0][0].new_zeros((size, given[0][0].shape[1], rank), dtype=dtype)
    B = given[0][1].new_zeros((size, rank, len(given[0][1])), dtype=dtype)
    gain, shift = torch.ones_like(B[:, 0]), torch.zeros_like(B[:, 0])
    for i, (pair, source) in enumerate(zip(pairs, changed, strict=True)):
        if pair is None or source is None:
            continue
        a, b = (x.to(dtype) for x in pair)
        layer, name = source
        scale = layer._get_embed_scale() if embedding else None
        strength = layer.scaling[name] * (1 if scale is None else scale.to(dtype))
        if _DORA in _kinds(layer, name):
            gain[i], shift[i] = _dora(layer, name, a, b)
        elif not embedding and layer.lora_B[name].bias is not None:
            shift[i] = layer.lora_B[name].bias * strength
        A[i, :, : len(a)] = a.T
        B[i, : len(a)] = b.T * strength * gain[i]
    changes = bool((gain != 1).any()), bool((shift != 0).any())
    return Factors(A, B, gain if changes[0] else None, shift if changes[1] else None)


def _pair(layer: Any, name: str, embedding: bool) -> tuple[Tensor, Tensor]:
    """An adapter's A [r, in] and B [out, r]."""
    if embedding:
        found = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        found = layer.lora_A[name].weight, layer.lora_B[name].weight
    if any(x.is_meta for x in found):
        raise ValueError(
            "the weights of an adapter are offloaded: load the base model onto devices that hold it"
        )
    return found


def _dora(old: Any, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift of DoRA (arXiv 2402.09353): y = bias + g (W x + s B A x), with g the learned
    magnitude over the norm of the rows of W + s B A."""
    from peft.utils.integrations import dequantize_module_weight

    layer, base = old.lora_magnitude_vector[name], old.get_base_layer()
    weight = dequantize_module_weight(base).to(a.dtype)
    gain = layer.weight / layer.get_weight_norm(weight, b @ a, old.scaling[name])
    bias = getattr(base, "bias", None)
    return gain, torch.zeros_like(gain) if bias is None else (1 - gain) * bias
