"""From the op's arguments to launches: which variant of the kernel, its workspace, its grid."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..arguments import DrawArguments, MixtureArguments
from ..divergence import AlphaDivergence, ReverseKL, get_divergence
from . import divergences
from .configurations import Configuration, configuration, processors, rows_together
from .filters import filter_kernel
from .mixture import mixture_kernel
from .solver import TILE_FIELDS
from .tiles import STATE_FIELDS, TILE

#: The solver's evaluations that are spread over the GPU; rows that need more finish on one program.
SECULAR_EVALUATIONS, NEWTON_EVALUATIONS = 3, 5


class Mixing(NamedTuple):
    """The distribution, as the kernels read it. Pointers are tensors or None."""

    logits: tuple[Tensor, ...]  # reference first
    strides: tuple[int, ...]
    scales: tuple[float, ...] | None
    weights: tuple[float, ...]  # of the policies; read where weights_pointer is None
    weights_pointer: Tensor | None
    weights_strides: tuple[int, int]  # row (0: one for all), policy
    reference_weight: float  # 1 - sum w
    scores: Tensor | None  # [J, B, V]
    value_strides: tuple[int, int]  # J, B
    value_weights: tuple[float, ...]
    value_weights_pointer: Tensor | None
    value_weights_strides: tuple[int, int]
    prefix: Tensor | None
    prefix_strides: tuple[int, int]
    vocab: int
    log_plausibility: float
    alpha: float
    supremum: float  # sup f'; 0 where it is infinite


class Drawing(NamedTuple):
    """What is done with it, and the outputs."""

    temperature: float
    temperature_pointer: Tensor | None
    temperature_stride: int
    top_k_pointer: Tensor | None
    top_k_stride: int
    top_p: float
    top_p_pointer: Tensor | None
    top_p_stride: int
    min_p: float
    min_p_pointer: Tensor | None
    min_p_stride: int
    mask: Tensor | None
    mask_strides: tuple[int, int]
    seed_pointer: Tensor | None
    seed_stride: int
    position_pointer: Tensor | None
    position_stride: int
    tokens: Tensor | None
    logprobs: Tensor | None
    valid: Tensor | None
    model_logprobs: Tensor | None


class Workspace(NamedTuple):
    """Memory between the phases; the counters are zero before and after a launch."""

    states: Tensor  # float64 [B, STATE_FIELDS]
    fields: Tensor  # float32 [B, 2 models + TILE_FIELDS, Variant.tiles]
    leasts: Tensor  # float64 [B, tiles]
    winners: Tensor  # int32 [B, tiles]
    keys: Tensor | None  # float32 [B, V]
    tickets: Tensor  # int32 [2]
    flags: Tensor  # int32 [B], phases a row has ended
    arrivals: Tensor  # int32 [B], chunks of the running phase that are done


class Variant(NamedTuple):
    """What is decided when a kernel is compiled."""

    models: int
    model_block: int  # a power of two, at least models
    first_policy: int  # 1 with a reference
    scores: int  # J
    plausible: int  # model of the plausibility constraint, -1: none
    general: bool  # not reverse KL
    exact: bool
    simplex: bool  # neither values nor prefix
    deficit: Any
    log_ratio: Any
    log_slope: Any
    excess: Any
    shift: Any
    unshift: Any
    clamped: bool
    bounded: bool
    is_alpha: bool
    is_jsd: bool
    sums: bool  # a phase of its own for the log-sum-exps
    evaluations: int
    finish: bool
    draw: bool  # in the mixture kernel
    mask: bool
    packed_mask: bool
    tempered: bool  # some temperature is not 1
    top_k: bool
    top_p: bool
    min_p: bool
    store_keys: bool
    model_logprobs: bool
    phases: int
    tiles: int  # a power of two, at least the row's
    chunk: int  # tiles of a task
    filter_block: int

    @property
    def cache_key(self) -> str:
        """Names the variant and the sources of its device functions."""
        return repr(tuple(x.cache_key if hasattr(x, "cache_key") else x for x in tuple(self)))


class Launch(NamedTuple):
    """One launch of a kernel; `ahead_of_time.py` compiles from it what `run` launches."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    variant: Variant
    threads: int

    def options(self, amd: bool, warp_size: int) -> dict[str, Any]:
        """The compiler's options."""
        options = {"C": self.variant, "num_warps": self.threads // warp_size}
        if self.variant.general and not amd:
            # Left to itself ptxas spills to make room for more programs on a multiprocessor.
            options["maxnreg"] = 255
        return options

    def run(self) -> None:
        amd = torch.version.hip is not None
        self.kernel[self.grid](*self.arguments, **self.options(amd, 64 if amd else 32))


def _strides(tensor: Tensor | None, rank: int) -> tuple[int, int]:
    """Row and column strides of [n] (rank 1 stored for every row) or [B, n]."""
    if tensor is None:
        return 0, 0
    return (0, tensor.stride(0)) if tensor.dim() < rank else (tensor.stride(0), tensor.stride(1))


def _dense(mixing: MixtureArguments) -> tuple[MixtureArguments, Tensor | None]:
    """With candidates' values as [J, B, V], -inf for every other token, and the rows with bad
    ids."""
    if mixing.values is None or mixing.value_ids is None:
        return mixing, None
    ids, vocab = mixing.value_ids, mixing.vocab_size
    values = mixing.values.float()
    weights, tensor = mixing.value_weights, mixing.value_weights_tensor
    if 0.0 in weights or not weights:
        # A weight of 0 hides its values, but not which tokens are candidates: one plane more.
        count = values.shape[0]
        values = torch.cat([values, torch.zeros_like(ids[None], dtype=torch.float32)])
        rows = [weights[i : i + count] for i in range(0, len(weights), max(1, count))]
        weights = [v for row in rows for v in (*row, 1.0)]
        if tensor is not None:
            tensor = torch.cat([tensor, torch.ones_like(tensor[..., :1])], -1)
    inside = (ids >= 0) & (ids < vocab)
    dense = values.new_full((*values.shape[:2], vocab + 1), -torch.inf)
    dense.scatter_(2, torch.where(inside, ids, vocab).expand(values.shape), values)
    mixing = mixing._replace(
        values=dense[:, :, :vocab],
        value_ids=None,
        value_weights=weights,
        value_weights_tensor=tensor,
    )
    return mixing, ~(inside | (ids == -1)).all(1)


def variant_of(
    mixing: MixtureArguments, drawing: DrawArguments | None, configured: Configuration
) -> Variant:
    """The variant for these arguments."""
    divergence = get_divergence(mixing.divergence)
    general = not isinstance(divergence, ReverseKL)
    functions = divergences.device_functions(divergence)
    exact = general and mixing.normalizer == "exact"
    plausible = -1
    if mixing.plausibility > 0.0:
        plausible = mixing.plausibility_tensor - (mixing.ref_logits is None)
    sums = general or plausible >= 0
    evaluations = 0
    if exact:
        stieltjes = functions.excess is not None
        evaluations = SECULAR_EVALUATIONS if stieltjes else NEWTON_EVALUATIONS
    mask = tempered = top_k = top_p = min_p = False
    packed = False
    if drawing is not None:
        mask = drawing.mask is not None
        packed = drawing.mask is not None and drawing.mask.dtype == torch.int32
        tempered = drawing.temperature_tensor is not None or any(
            t != 1.0 for t in drawing.temperature
        )
        top_k = drawing.top_k_tensor is not None or any(drawing.top_k)
        top_p = drawing.top_p_tensor is not None or any(p < 1.0 for p in drawing.top_p)
        min_p = drawing.min_p_tensor is not None or any(p > 0.0 for p in drawing.min_p)
    filters = top_k or top_p or min_p
    finish = drawing is None
    tiles = triton.cdiv(mixing.vocab_size, TILE.value)
    return Variant(
        models=mixing.model_count(),
        model_block=triton.next_power_of_2(mixing.model_count()),
        first_policy=int(mixing.ref_logits is not None),
        scores=0 if mixing.values is None else mixing.values.shape[0],
        plausible=plausible,
        general=general,
        exact=exact,
        simplex=mixing.values is None and mixing.prefix_logprobs is None,
        deficit=functions.deficit,
        log_ratio=functions.log_ratio,
        log_slope=functions.log_slope,
        excess=functions.excess,
        shift=functions.shift,
        unshift=functions.unshift,
        clamped=functions.clamped,
        bounded=functions.bounded,
        is_alpha=isinstance(divergence, AlphaDivergence),
        is_jsd=divergence.name == "jsd",
        sums=sums,
        evaluations=evaluations,
        finish=finish,
        draw=drawing is not None and not filters,
        mask=mask,
        packed_mask=packed,
        tempered=tempered,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        store_keys=finish or filters,
        model_logprobs=drawing is not None and drawing.return_model_logprobs,
        phases=int(sums) + (evaluations + 1 if exact else 0) + 1 + int(finish),
        tiles=triton.next_power_of_2(tiles),
        chunk=configured.chunk,
        filter_block=configured.filter_block,
    )


def _per_row(host: list[float], tensor: Tensor | None, count: int, like: Tensor) -> Tensor | None:
    """The tensor of some weights; numbers that differ from row to row become one."""
    if tensor is None and len(host) > count:
        tensor = torch.tensor(host, dtype=torch.float64, device=like.device).view(-1, count)
    return tensor


def _mixing(mixing: MixtureArguments) -> Mixing:
    divergence = get_divergence(mixing.divergence)
    logits, values = mixing.tensors(), mixing.values
    weights = _per_row(mixing.weights, mixing.weights_tensor, len(mixing.policy_logits), logits[0])
    value_weights = _per_row(
        mixing.value_weights,
        mixing.value_weights_tensor,
        0 if values is None else values.shape[0],
        logits[0],
    )
    supremum = getattr(divergence, "supremum", 0.0)
    return Mixing(
        logits=tuple(logits),
        strides=tuple(x.stride(0) for x in logits),
        scales=tuple(mixing.logit_scales) or None,
        weights=tuple(mixing.weights) or (0.0,),
        weights_pointer=weights,
        weights_strides=_strides(weights, 2),
        reference_weight=1.0 - sum(mixing.weights),
        scores=values,
        value_strides=(0, 0) if values is None else (values.stride(0), values.stride(1)),
        value_weights=tuple(mixing.value_weights) or (0.0,),
        value_weights_pointer=value_weights,
        value_weights_strides=_strides(value_weights, 2),
        prefix=mixing.prefix_logprobs,
        prefix_strides=_strides(mixing.prefix_logprobs, 2),
        vocab=mixing.vocab_size,
        log_plausibility=math.log(mixing.plausibility) if mixing.plausibility > 0.0 else 0.0,
        alpha=getattr(divergence, "alpha", 1.0),
        supremum=supremum if math.isfinite(supremum) else 0.0,
    )


def _workspace(mixing: Mixing, variant: Variant, rows: int, keys: Tensor | None) -> Workspace:
    like = mixing.logits[0]
    tiles = triton.cdiv(mixing.vocab, TILE.value)
    fields = 2 * variant.models + TILE_FIELDS.value
    counters = like.new_zeros((2 + 2 * rows,), dtype=torch.int32)
    return Workspace(
        states=like.new_empty((rows, STATE_FIELDS.value), dtype=torch.float64),
        fields=like.new_empty((rows, fields, variant.tiles), dtype=torch.float32),
        leasts=like.new_empty((rows, tiles), dtype=torch.float64),
        winners=like.new_empty((rows, tiles), dtype=torch.int32),
        keys=keys,
        tickets=counters[:2],
        flags=counters[2 : 2 + rows],
        arrivals=counters[2 + rows :],
    )


def _grid(mixing: Mixing, variant: Variant, rows: int, configured: Configuration) -> int:
    tasks = rows * triton.cdiv(triton.cdiv(mixing.vocab, TILE.value), variant.chunk)
    programs = configured.programs_per_processor * processors(mixing.logits[0].device)
    return tasks if variant.phases == 1 else min(tasks, programs)


_NO_DRAWING = Drawing(
    1.0, None, 0, None, 0, 1.0, None, 0, 0.0, None, 0, None, (0, 0), None, 0, None, 0, None, None,
    None, None,
)  # fmt: skip


def log_probs_launches(mixing: MixtureArguments, out: Tensor) -> tuple[list[Launch], Tensor | None]:
    """The launches that write log pi* to `out`, and the rows [B] with a bad id."""
    rows = mixing.batch_tensor().shape[0]
    mixing, bad = _dense(mixing)
    configured = configuration(mixing, rows)
    variant = variant_of(mixing, None, configured)
    m = _mixing(mixing)
    w = _workspace(m, variant, rows, out)
    grid = (_grid(m, variant, rows, configured),)
    arguments = (m, _NO_DRAWING, w, rows, rows_together(mixing, rows), 0, 0)
    return [Launch(mixture_kernel, grid, arguments, variant, configured.threads)], bad


def log_probs(mixing: MixtureArguments) -> Tensor:
    """log pi* [B, V]."""
    logits = mixing.batch_tensor()
    rows = logits.shape[0]
    out = logits.new_empty((rows, mixing.vocab_size), dtype=torch.float32)
    if rows == 0:
        return out
    launches, bad = log_probs_launches(mixing, out)
    for launch in launches:
        launch.run()
    return out if bad is None else out.masked_fill_(bad[:, None], torch.nan)


def _spread(host: list[Any], tensor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Any:
    """(number, tensor): numbers that differ from row to row become a tensor."""
    if tensor is None and len(host) > 1:
        tensor = torch.tensor(host, dtype=dtype, device=like.device)
    return host[0], tensor, 0 if tensor is None else tensor.stride(0)


def sample_launches(
    mixing: MixtureArguments, drawing: DrawArguments, outputs: tuple[Tensor, ...]
) -> tuple[list[Launch], Tensor | None]:
    """The launches that write to `outputs`, those of `sample`, and the rows [B] with a bad id."""
    tokens, logprobs, valid, model_logprobs = outputs
    logits = mixing.batch_tensor()
    rows = logits.shape[0]
    mixing, bad = _dense(mixing)
    configured = configuration(mixing, rows)
    variant = variant_of(mixing, drawing, configured)
    m = _mixing(mixing)
    temperature, temperatures, temperature_stride = _spread(
        drawing.temperature, drawing.temperature_tensor, logits, torch.float32
    )
    top_k, top_ks, top_k_stride = _spread(drawing.top_k, drawing.top_k_tensor, logits, torch.int64)
    top_p, top_ps, top_p_stride = _spread(
        drawing.top_p, drawing.top_p_tensor, logits, torch.float64
    )
    min_p, min_ps, min_p_stride = _spread(
        drawing.min_p, drawing.min_p_tensor, logits, torch.float32
    )
    position, positions, position_stride = _spread(
        drawing.position, drawing.position_tensor, logits, torch.int64
    )
    r = Drawing(
        temperature=temperature,
        temperature_pointer=temperatures,
        temperature_stride=temperature_stride,
        top_k_pointer=top_ks,
        top_k_stride=top_k_stride,
        top_p=top_p,
        top_p_pointer=top_ps,
        top_p_stride=top_p_stride,
        min_p=min_p,
        min_p_pointer=min_ps,
        min_p_stride=min_p_stride,
        mask=drawing.mask
        if variant.packed_mask or drawing.mask is None
        else drawing.mask.view(torch.int8),
        mask_strides=_strides(drawing.mask, 2),
        seed_pointer=drawing.seed_tensor,
        seed_stride=0 if drawing.seed_tensor is None else drawing.seed_tensor.stride(0),
        position_pointer=positions,
        position_stride=position_stride,
        tokens=tokens,
        logprobs=logprobs,
        valid=valid.view(torch.int8),
        model_logprobs=model_logprobs,
    )
    keys = None
    if variant.store_keys:
        keys = logits.new_empty((rows, m.vocab), dtype=torch.float32)
    w = _workspace(m, variant, rows, keys)
    grid = (_grid(m, variant, rows, configured),)
    arguments = (m, r, w, rows, rows_together(mixing, rows), drawing.seed, position)
    launches = [Launch(mixture_kernel, grid, arguments, variant, configured.threads)]
    if not variant.draw:
        arguments = (m, r, w, drawing.seed, position, top_k)
        launches.append(
            Launch(filter_kernel, (rows,), arguments, variant, configured.filter_threads)
        )
    return launches, bad


def sample(
    mixing: MixtureArguments, drawing: DrawArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, logprobs, valid, model_logprobs; see `mod_fused.sample`."""
    logits = mixing.batch_tensor()
    rows = logits.shape[0]
    columns = mixing.model_count() if drawing.return_model_logprobs else 0
    tokens = logits.new_empty((rows,), dtype=torch.int64)
    logprobs = logits.new_empty((rows,), dtype=torch.float32)
    valid = logits.new_empty((rows,), dtype=torch.bool)
    model_logprobs = logits.new_empty((rows, columns), dtype=torch.float32)
    if rows == 0:
        return tokens, logprobs, valid, model_logprobs
    launches, bad = sample_launches(mixing, drawing, (tokens, logprobs, valid, model_logprobs))
    for launch in launches:
        launch.run()
    if bad is not None:
        valid &= ~bad
        tokens.masked_fill_(bad, 0)
        logprobs.masked_fill_(bad, torch.nan)
        model_logprobs.masked_fill_(bad[:, None], torch.nan)
    return tokens, logprobs, valid, model_logprobs
