"""The torch backend: chunks of rows, safety nets of the solver and the race, tracing."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from mod_fused import log_probs, reference, sample
from mod_fused.divergence import ForwardKL
from mod_fused.torch_kernels import draw, launch, normalizer, philox


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
        backend="torch",
    )
    whole = sample(ref, [policy], **arguments)
    monkeypatch.setattr(launch, "CHUNK_TOKENS", 2 * 2048)
    for one, other in zip(whole, sample(ref, [policy], **arguments), strict=True):
        assert torch.equal(one, other)


class WildSlope(ForwardKL):
    """Forward KL whose Newton steps all leave the bracket."""

    def log_slope(self, q):
        wild = 40.0 if q.dim() == 1 else 0.0  # where it scales a step, not where it is summed
        return super().log_slope(q) + wild


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "alpha:0.5", "jeffrey"])
def test_levels_far_from_zero_leave_the_differences(divergence):
    ref, policy = torch.tensor([[1e17, 1e17, -1e17]]), torch.tensor([[0.0, 3.0, 1.0]])
    got = log_probs(ref, [policy], [0.5], divergence=divergence, backend="torch")
    expected = reference.log_probs(ref, [policy], [0.5], divergence=divergence)
    assert abs(got[0].double().exp().numpy() - np.exp(expected[0])).max() < 1e-5


def test_bisection_alone_finds_tau():
    generator = torch.Generator().manual_seed(1)
    log_ref = torch.randn(3, 1, 64, generator=generator).mul(2).flatten(1).log_softmax(-1)
    excess = torch.rand(3, 1, 64, generator=generator)
    excess[..., 5] = 0.0
    tau = normalizer.solve(WildSlope(), log_ref.view(3, 1, 64), excess, torch.full((3,), 5))
    total = (log_ref.double().exp() / (tau.double()[:, None] + excess[:, 0].double())).sum(1)
    assert (total - 1).abs().max() < 1e-5


def test_a_zero_mass_loses_to_a_mass_whose_quotient_overflows():
    arrival = torch.ones(1, 3)
    assert draw._first(arrival, torch.tensor([[0.0, 1e-44, 0.0]])).tolist() == [1]


@pytest.mark.parametrize("words", [0, 2**32 - 1])
def test_exponentials_of_extreme_words_are_positive_and_finite(monkeypatch, words):
    monkeypatch.setattr(philox, "philox", lambda counter, key: (torch.full((1, 1), words),) * 4)
    one = torch.zeros(1, dtype=torch.int64)
    drawn = philox.exponential(one, one, one[None], 0)
    assert 0.0 < drawn.item() < 17.0


def test_compile_works_in_a_fresh_process_with_the_default_backend():
    code = """
        import torch, mod_fused
        draw = torch.compile(
            lambda r, p: mod_fused.sample(r, [p], [1.0], seed=1).tokens,
            fullgraph=True,
            backend="aot_eager",
        )
        r, p = torch.zeros(2, 9), torch.eye(2, 9)
        assert torch.equal(draw(r, p), mod_fused.sample(r, [p], [1.0], seed=1).tokens)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
