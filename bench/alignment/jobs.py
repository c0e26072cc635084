"""Trainings and cells as jobs: each leaves one file in the work folder and is not done again."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mod_fused import Ensemble, world
from mod_fused.terminal import track

from . import plan
from .measuring import Cell, draw_pool, measure
from .plan import Policy, Sizes
from .training import Answers, draw_answers, train_policy

SEED = 0
DECODE_SEED = 1  # of the held-out prompts, of drawing the answers and the pool's first part
POOL_PART = 64  # answers to each prompt in one job
Job = tuple[str, Sizes, Any]


@functools.cache
def _reference() -> tuple[Any, Any]:
    """The embedded reference and its tokenizer."""
    ensemble = Ensemble.embedded([], dtype=torch.float32)
    return ensemble.models[0], ensemble.tokenizer


@functools.lru_cache(maxsize=1)
def load_answers(file: Path) -> Answers:
    """Answers to train on, the last ones kept in memory."""
    return torch.load(file, weights_only=False)


@functools.lru_cache(maxsize=8)
def _policy(file: Path) -> Any:
    import copy

    model = copy.deepcopy(_reference()[0])
    model.load_state_dict(torch.load(file))
    return model.eval()


def file_of(work: Path, job: Job) -> Path:
    """Where a job leaves its result."""
    kind, _, item = job
    if kind == "answers":
        return work / f"answers-s{item}.pt"
    if kind == "policy":
        return work / f"{item.name}.pt"
    return work / (f"pool-{item}.npz" if kind == "pool" else f"{item.name}.npz")


def _train(work: Path, sizes: Sizes, policy: Policy, file: Path) -> None:
    answers = load_answers(file_of(work, ("answers", sizes, policy.seed)))
    reference, _ = _reference()
    model, losses = train_policy(
        reference, answers, policy.weights, policy.divergence, sizes.steps, policy.seed, policy.name
    )
    torch.save(model.state_dict(), file)
    last = losses[-max(1, len(losses) // 4) :]
    record = {"loss": sum(last) / len(last), "first_loss": losses[0]}
    (work / f"{policy.name}.json").write_text(json.dumps(record))


def _do(work: Path, job: Job, file: Path) -> None:
    kind, sizes, item = job
    reference, tokenizer = _reference()
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    if kind == "answers":
        torch.save(draw_answers(reference, tokenizer, sizes.train_prompts, SEED + item), file)
    elif kind == "policy":
        _train(work, sizes, item, file)
    elif kind == "pool":
        size = min(POOL_PART, sizes.pool - item * POOL_PART)
        rewards = draw_pool(reference, tokenizer, prompts, size, DECODE_SEED + item)
        np.savez(file, rewards=rewards)
    else:
        models = [_policy(file_of(work, ("policy", sizes, p))) for p in plan.needed(item)]
        np.savez(file, **measure(item, reference, models, tokenizer, prompts, DECODE_SEED))


def _run(work: Path, job: Job) -> tuple[str, float]:
    """Does a job, unless its file is there; returns the file's name and the seconds it took."""
    file, began = file_of(work, job), time.perf_counter()
    if not file.exists():
        unfinished = file.with_name(f"unfinished-{os.getpid()}{file.suffix}")
        _do(work, job, unfinished)
        unfinished.rename(file)  # what bears the name is complete
    return file.stem, time.perf_counter() - began


def _alone() -> None:
    torch.set_num_threads(1)  # the models are small: processes share the cores better


def _phases(sizes: Sizes) -> list[tuple[str, list[Job]]]:
    answers: list[Job] = [("answers", sizes, seed) for seed in range(sizes.train_seeds)]
    trainings: list[Job] = [("policy", sizes, p) for p in plan.policies(sizes)]
    cells: list[Job] = [("cell", sizes, c) for c in plan.cells(sizes)]
    parts = range(-(-sizes.pool // POOL_PART))
    pool: list[Job] = [("pool", sizes, part) for part in parts]
    first = [*answers, *pool]
    return [("answers of the reference", first), ("trainings", trainings), ("cells", cells)]


def _run_all(jobs: Sequence[Job], do: Callable[[Job], tuple[str, float]], workers: int) -> Any:
    if workers == 1:
        _alone()
        yield from map(do, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _alone) as pool:
        yield from pool.imap_unordered(do, jobs)
        pool.close()
        pool.join()


def run(work: Path, sizes: Sizes, workers: int) -> float:
    """Does what is missing in the folder `work`; returns the seconds that all jobs took together.

    Raises:
        ValueError: the folder holds results of other sizes.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings, stamp = work / "sizes.json", json.dumps(sizes._asdict())
    if settings.exists() and settings.read_text() != stamp:
        raise ValueError(
            f"{work} holds results of other sizes, {settings.read_text()}, expected {stamp}; "
            "remove it or name another folder"
        )
    settings.write_text(stamp)
    log = work / "seconds.json"
    seconds: dict[str, float] = json.loads(log.read_text()) if log.exists() else {}
    do = functools.partial(_run, work)
    for title, jobs in _phases(sizes):
        missing = [job for job in jobs if not file_of(work, job).exists()]
        done = _run_all(missing, do, workers)
        for name, took in track(done, f"{title}, {len(missing)} of {len(jobs)}", len(missing)):
            seconds[name] = took
            log.write_text(json.dumps(seconds))
    return sum(seconds.values())


def load_pool(work: Path) -> np.ndarray:
    """The rewards [N, K, 3] of the reference's answers."""
    parts = sorted(work.glob("pool-*.npz"), key=lambda file: int(file.stem.split("-")[1]))
    return np.concatenate([np.load(part)["rewards"] for part in parts], axis=1).astype(float)


def load(work: Path, cell: Cell) -> dict[str, np.ndarray]:
    """The arrays of a measured cell."""
    with np.load(work / f"{cell.name}.npz") as arrays:
        return dict(arrays)
