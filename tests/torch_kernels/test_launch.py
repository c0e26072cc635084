"""Rows of a call in chunks."""

from __future__ import annotations

import torch

from mod_fused import sample
from mod_fused.torch_kernels import launch


def test_rows_do_not_depend_on_the_chunk_they_are_in(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ref, policy = torch.randn(2, 7, 1500, generator=generator)
    arguments = dict(
        weights=[[0.1 * b] for b in range(7)],
        divergence="jsd",
        values=torch.randn(1, 7, 1500, generator=generator),
        value_weights=[[0.2 * b] for b in range(7)],
        prefix_logprobs=-torch.rand(7, 2, generator=generator),
        temperature=[0.5 + 0.1 * b for b in range(7)],
        top_k=[3 + b for b in range(7)],
        top_p=torch.linspace(0.5, 1.0, 7),
        mask=torch.rand(7, 1500, generator=generator) < 0.5,
        seed=5,
        position=[10 * b for b in range(7)],
        return_model_logprobs=True,
        return_proposal_logprobs=True,
        backend="torch",
    )
    whole = sample(ref, [policy], **arguments)
    monkeypatch.setattr(launch, "CHUNK_TOKENS", 2 * 2048)
    for one, other in zip(whole, sample(ref, [policy], **arguments), strict=True):
        assert torch.equal(one, other)
