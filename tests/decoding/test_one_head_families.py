"""One head in every family of transformers that is documented for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import transformers
from shared_heads import (
    IDS,
    heads_of,
)

from mod_fused import Ensemble, generate
from mod_fused.decoding.architectures import text_config
from mod_fused.decoding.one_head import FAMILIES, OneHead


@contextmanager
def _where_it_runs(kind: str) -> Iterator[None]:
    """Skip a family that another version of transformers than the pinned one lacks or cannot run
    small."""
    pins = (Path(__file__).parents[2] / "requirements-dev.txt").read_text()
    pinned = f"transformers=={transformers.__version__}" in pins
    if kind not in small_models.kinds():
        pytest.skip("not in this version of transformers")
    try:
        yield
    except (AttributeError, ValueError) as error:
        if pinned:
            raise
        pytest.skip(f"this version of transformers cannot run it small: {error}")


def _pair(kind: str, **options: Any) -> list[Any]:
    """Two small models with equal heads; a bias is not 0, and a scale of logits not 1."""
    models = [small_models.small_model(kind, seed, **options) for seed in (1, 2)]
    heads = heads_of(models)
    with torch.no_grad():
        heads[1].weight.copy_(heads[0].weight)
        for head in heads:
            if head.bias is not None:
                head.bias.copy_(torch.linspace(-1.0, 1.0, len(head.bias)))
    for model in models:
        for owner, name in ((model, "logit_scale"), (model.config, "logits_scaling")):
            if kind != "minicpm3" and getattr(owner, name, None) is not None:
                setattr(owner, name, 0.4)
    return models


def _apart(models: list[Any], head: OneHead, coefficients: torch.Tensor) -> float:
    """Total variation between log pi* of separate heads, in float64, and that of one head."""
    ids = torch.randint(3, small_models.VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [model(ids).logits[:, -1].double() for model in models]
        with head.bypassed():
            hidden = [model(ids).logits[:, -1] for model in models]
        found = head.logits(hidden).double().softmax(-1)
    expected = sum(c[:, None] * x for c, x in zip(coefficients.T, logits, strict=True))
    return float(0.5 * (expected.softmax(-1) - found).abs().sum(-1).max())


COEFFICIENTS = torch.tensor([[1.7, -0.7], [0.25, 0.75]], dtype=torch.float64)
CAPPED = ("beam", "gemma2", "nanochat", "vaultgemma")


SLOW = {"gemma3"}  # with the images that it reads a model is large


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in sorted(FAMILIES)],
)
def test_a_family_mixes_before_its_head_as_behind_it(kind: str) -> None:
    with _where_it_runs(kind):
        models = _pair(kind, **{"final_logit_softcapping": None} if kind in CAPPED else {})
        labelled = dict(zip("ab", models, strict=True))
        head = OneHead(labelled, COEFFICIENTS, torch.device("cpu"))
        assert _apart(models, head, COEFFICIENTS) <= 2e-5


@pytest.mark.parametrize("kind", CAPPED)
def test_a_soft_cap_is_refused_for_it_gives_another_mixture(kind: str) -> None:
    with _where_it_runs(kind):
        models = _pair(kind)
    with pytest.raises(ValueError, match="policy 1 .* has a soft-cap on its logits"):
        generate(Ensemble([None, *models]), input_ids=IDS, weights=[0.5, 0.5], one_head=True)
    caps = [text_config(model) for model in models]
    limits = [config.final_logit_softcapping for config in caps]
    for config in caps:
        config.final_logit_softcapping = None
    head = OneHead(dict(zip("ab", models, strict=True)), COEFFICIENTS, torch.device("cpu"))
    for config, limit in zip(caps, limits, strict=True):
        config.final_logit_softcapping = limit
    assert _apart(models, head, COEFFICIENTS) > 1e-3
