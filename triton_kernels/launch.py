"""Turns a call into launches of `mixture_kernel`, `bias_kernel` and `filter_kernel`: variant, grid,
workspace.

`log_probs_out` and `sample_out` are the backend `triton`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.outputs import Outputs
from .bias import bias_kernel
from .compiled import BoundLaunches, Launch
from .configurations import Configuration, configuration, processors, rows_together
from .constants import TILE
from .divergences import device_functions
from .filters import filter_kernel
from .mixture import mixture_kernel
from .own_mass import OF_MASS
from .parameters import Drawing, drawing_of, mixing_of
from .workspace import cdiv, cell_size, make_workspace, parts_of_tile, record_size, row_tiles

#: Evaluations of G that are phases of their own, by the solver (normalizer.py). A row that needs
#: more is finished by one program.
MOMENTS_EVALUATIONS, SECULAR_EVALUATIONS, NEWTON_EVALUATIONS = 2, 3, 5
SWEPT = 4  # tiles of a flat row that a program reads side by side
CANDIDATE_BLOCKS = (32, 256, 1024)  # how many are read at once: a kernel for each


class Variant(NamedTuple):
    """The compile-time choices of a kernel."""

    models: int
    model_block: int  # a power of two, at least models
    first_policy: int  # index of the first policy: 1 with a reference, else 0
    scores: int  # J
    candidates: int  # of CANDIDATE_BLOCKS; 0: the values are dense
    plausible: int | None  # model of the plausibility constraint; None: off in all rows
    general: bool  # not reverse KL
    exact: bool
    simplex: bool  # neither values nor prefix
    own_mass: bool  # G is the mixture's own mass of the response
    deficit: Any  # from here to `of_mass`: a `TritonDivergence`
    log_ratio: Any
    log_slope: Any
    clamped: bool
    bounded: bool
    excess: Any
    shift: Any
    unshift: Any
    root: bool
    factor: bool
    of_mass: str | None
    sums: bool  # a phase of its own for the log-sum-exps
    evaluations: int
    early: bool  # drawn from the last evaluation
    finish: bool
    draw: bool  # draw in the mixture kernel
    mask: bool
    packed_mask: bool
    bias: bool
    tempered: bool  # some temperature is not 1
    top_k: bool
    top_p: bool
    min_p: bool
    store_keys: bool
    model_logprobs: bool
    proposal_logprobs: bool
    phases: int
    tiles: int  # a power of two, at least the row's
    parts: int  # of a tile
    record: int  # numbers of a part
    chunk: int  # tiles of a task
    cell: int  # tokens of a cell, see workspace.py
    filter_block: int  # tokens of a flat row that a program reads at once, a power of two
    swept: int  # tiles that these belong to

    @property
    def cache_key(self) -> str:
        """The variant's name in Triton's cache, with the sources of its device functions."""
        return repr(tuple(x.cache_key if hasattr(x, "cache_key") else x for x in tuple(self)))


def variant_of(
    mixing: MixtureArguments,
    drawing: DrawArguments | None,
    configured: Configuration,
) -> Variant:
    """The variant for these arguments."""
    divergence = device_functions(mixing.divergence)
    general = not divergence.log_linear
    own_mass = general and mixing.mixture_prefix_logprobs is not None
    if own_mass:
        divergence = OF_MASS.get(mixing.divergence.name, divergence)
    exact = general and mixing.normalizer == "exact"
    plausible: int | None = None
    if mixing.plausibility_is_on():
        plausible = mixing.plausibility_tensor - (mixing.ref_logits is None)
    sums = general or plausible is not None
    evaluations = 0
    if exact:
        evaluations = NEWTON_EVALUATIONS
        if divergence.excess is not None:
            evaluations = SECULAR_EVALUATIONS if divergence.root else MOMENTS_EVALUATIONS
    mask = tempered = top_k = top_p = min_p = False
    packed = filters = False
    if drawing is not None:
        mask = drawing.mask is not None
        packed = drawing.mask is not None and drawing.mask.dtype == torch.int32
        tempered = isinstance(drawing.temperature, Tensor) or drawing.temperature != 1.0
        top_k, top_p, min_p = drawing.filters()
        filters = drawing.needs_keys()
    finish = drawing is None
    early = exact and divergence.excess is not None and drawing is not None
    early = early and not (mask or tempered or filters)
    candidates = 0
    if mixing.value_ids is not None:
        count = mixing.value_ids.shape[1]
        candidates = next((x for x in CANDIDATE_BLOCKS if count <= x), CANDIDATE_BLOCKS[-1])
    tiles = row_tiles(mixing.vocab_size)
    return Variant(
        models=mixing.model_count(),
        model_block=triton.next_power_of_2(mixing.model_count()),
        first_policy=int(mixing.ref_logits is not None),
        scores=0 if mixing.values is None else mixing.values.shape[0],
        candidates=candidates,
        plausible=plausible,
        general=general,
        exact=exact,
        simplex=mixing.values is None and mixing.prefix_logprobs is None,
        own_mass=own_mass,
        **divergence._asdict(),
        sums=sums,
        evaluations=evaluations,
        early=early,
        finish=finish,
        draw=drawing is not None and not filters,
        mask=mask,
        packed_mask=packed,
        bias=drawing is not None and drawing.bias is not None,
        tempered=tempered,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        store_keys=finish or filters,
        model_logprobs=drawing is not None and drawing.return_model_logprobs,
        proposal_logprobs=drawing is not None and drawing.return_proposal_logprobs,
        phases=int(sums) + (evaluations + 1 if exact else 0) + 1 - early + int(finish),
        tiles=tiles,
        parts=parts_of_tile(max(x.element_size() for x in mixing.tensors())),
        record=record_size(mixing.model_count()),
        chunk=configured.chunk,
        cell=cell_size(mixing.vocab_size),
        filter_block=configured.filter_block,
        swept=SWEPT,
    )


def _cut(
    mixing: MixtureArguments, variant: Variant, rows: int, configured: Configuration
) -> tuple[tuple[int], int]:
    """The grid, and how many rows form a group (mixture.py)."""
    row_tasks = cdiv(cdiv(mixing.vocab_size, TILE.value), variant.chunk)
    programs = configured.programs_per_processor * processors(mixing.batch_tensor().device)
    group = rows_together(mixing, rows, variant.phases, row_tasks, programs)
    tasks = rows * row_tasks
    return (tasks if variant.phases == 1 else min(tasks, programs),), group


def row_slices(vocab: int, rows: int, configured: Configuration, processors: int) -> int:
    """How many programs a row of the filters has: no more than run at once on so many
    multiprocessors."""
    tiles = cdiv(vocab, TILE.value)
    each = cdiv(tiles, max(1, min(processors // rows, configured.filter_slices)))
    return cdiv(tiles, each)


def log_probs_launches(
    mixing: MixtureArguments, out: Tensor, workspace: Tensor | None = None
) -> list[Launch]:
    """The launches that write log pi* to `out`."""
    rows = mixing.batch_tensor().shape[0]
    configured = configuration(mixing, rows)
    variant = variant_of(mixing, None, configured)
    made = make_workspace(out, rows, mixing.vocab_size, variant.models, False, workspace)
    work = made._replace(keys=out)
    grid, group = _cut(mixing, variant, rows, configured)
    arguments = (mixing_of(mixing), Drawing(), work, rows, group, 0, 0)
    return [Launch(mixture_kernel, grid, arguments, variant, configured.threads)]


def log_probs_out(mixing: MixtureArguments, out: Tensor, workspace: Tensor | None = None) -> None:
    """Write log pi* to `out` [B, V]."""
    if out.shape[0] == 0:
        return
    for launch in log_probs_launches(mixing, out, workspace):
        launch.run(out.device)


def sample_launches(
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None = None,
) -> list[Launch]:
    """The launches that write to `outputs`."""
    logits = mixing.batch_tensor()
    rows = logits.shape[0]
    configured = configuration(mixing, rows)
    variant = variant_of(mixing, drawing, configured)
    work = make_workspace(
        logits, rows, mixing.vocab_size, variant.models, variant.store_keys, workspace
    )
    grid, group = _cut(mixing, variant, rows, configured)
    changing = (drawing.seed, drawing.position, drawing.top_k)
    seed, position, top_k = (0 if isinstance(x, Tensor) else x for x in changing)
    records = (mixing_of(mixing), drawing_of(drawing, outputs), work)
    arguments = (*records, rows, group, seed, position)
    launches = [Launch(mixture_kernel, grid, arguments, variant, configured.threads)]
    if not variant.draw:
        if variant.bias:
            chunks = cdiv(cdiv(mixing.vocab_size, TILE.value), variant.chunk)
            grid = (rows * chunks,)
            launches.append(Launch(bias_kernel, grid, records, variant, configured.threads))
        slices = row_slices(mixing.vocab_size, rows, configured, processors(logits.device))
        filtering = (*records, seed, position, top_k, slices)
        grid = (rows * slices,)
        launches.append(Launch(filter_kernel, grid, filtering, variant, configured.filter_threads))
    return launches


def sample_out(
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None = None,
) -> None:
    """Write the result of `sample` to `outputs`."""
    tokens, logprobs, valid, model_logprobs, proposal_logprobs = outputs
    if tokens.shape[0] == 0:
        return
    if not drawing.return_model_logprobs:
        model_logprobs = None
    outputs = (tokens, logprobs, valid, model_logprobs, proposal_logprobs)
    for launch in sample_launches(mixing, drawing, outputs, workspace):
        launch.run(tokens.device)


def bound_sample(
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None,
) -> BoundLaunches:
    """What `sample_out` launches, to be run again and again with other numbers for seed and
    position. For at least one row, model_logprobs None unless asked for."""
    launches = sample_launches(mixing, drawing, outputs, workspace)
    return BoundLaunches(launches, outputs[0].device)
