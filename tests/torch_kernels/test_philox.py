"""Philox-4x32-10, SplitMix64 and the exponential variates: known answers and exact definitions."""

import numpy as np
import pytest
import torch
from cases import KNOWN_ANSWERS

from mod_fused.reference import sampling as oracle
from mod_fused.torch_kernels import philox as torch_philox


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers_of_random123(counter, key, words):
    assert oracle.philox4x32(counter, key) == words
    as_tensors = [tuple(torch.tensor(word) for word in x) for x in (counter, key)]
    assert tuple(int(x) for x in torch_philox.philox(*as_tensors)) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_seed_position_index_and_stream_take_their_places_in_key_and_counter(counter, key, words):
    seed = key[0] | key[1] << 32
    position = counter[0] | counter[1] << 32
    index = np.array([counter[2], 5])
    x0, x1 = oracle.philox4x32_words(seed, position, index, stream=counter[3])
    assert (int(x0[0]), int(x1[0])) == words[:2]
    assert (int(x0[0]), int(x1[0])) != (int(x0[1]), int(x1[1]))


def test_splitmix64_known_answers():
    # The first outputs of the reference implementation seeded with 0 and with 1234567.
    assert oracle.splitmix64(0) % 2**64 == 0xE220A8397B1DCDAF
    assert oracle.splitmix64(1234567) == 6457827717110365317
    assert oracle.splitmix64(-1) == oracle.splitmix64(2**64 - 1)


@pytest.mark.parametrize("seed", [0, 1, -3, 2**62, 2**63 - 2, -(2**63)])
def test_row_seeds_of_torch_equal_the_oracle(seed):
    seeds = torch_philox.split_mix(seed, 5, torch.device("cpu"))
    assert seeds.tolist() == oracle.row_seeds(seed, 5)


def test_continuations_have_seeds_of_their_own_the_first_its_rows():
    rows = [0, 1, 2, -1, 2**63 - 1, -(2**63)]
    seeds = torch_philox.continuation_seeds(torch.tensor(rows), 50).view(6, 50)
    for row, found in zip(rows, seeds.tolist(), strict=True):
        scrambled = oracle.splitmix64(row)
        assert found == [row, *(oracle.splitmix64(scrambled + k) for k in range(1, 50))]
    assert len(seeds.unique()) == 300  # neighbouring rows share none


def test_exponentials_of_torch_equal_the_oracle_and_small_ones_relatively():
    seeds, positions, index = [3, -(2**40) - 1], [0, 2**33 + 7], np.arange(200_000)
    e = torch_philox.exponential(
        torch.tensor(seeds), torch.tensor(positions), torch.from_numpy(index)[None], stream=1
    )
    assert e.dtype == torch.float32
    for row, seed, position in zip(e.double().numpy(), seeds, positions, strict=True):
        expected = oracle.exponentials(seed, position, index, stream=1)
        assert (np.abs(row / expected - 1.0) <= 4e-7)[expected < 0.1].all()
        # v next to 1 has an absolute error of 2^-25, which counts relative to 1 - v = exp(-E)
        assert np.abs(np.expm1(expected - row) * np.exp(-expected)).max() <= 2.0**-23


def test_the_scheme_version_is_the_oracle_s():
    assert torch_philox.SCHEME_VERSION == oracle.SCHEME_VERSION


def test_negative_seeds_and_large_positions_use_all_64_bits():
    e = {
        (seed, position): tuple(oracle.exponentials(seed, position, np.arange(3), 0))
        for seed in (0, -1, 2**32, 2**63 - 1, -(2**63))
        for position in (0, 2**32)
    }
    assert len(set(e.values())) == len(e)


def test_exponentials_are_exponential():
    # Kolmogorov-Smirnov at 200,000 draws; false-alarm rate 1e-6.
    from scipy import stats

    draws = oracle.exponentials(12345, 0, np.arange(200_000), stream=1)
    assert stats.kstest(draws, "expon").pvalue > 1e-6


@pytest.mark.parametrize("words", [0, 2**32 - 1])
def test_exponentials_of_extreme_words_are_positive_and_finite(monkeypatch, words):
    monkeypatch.setattr(
        torch_philox, "philox", lambda counter, key: (torch.full((1, 1), words),) * 4
    )
    one = torch.zeros(1, dtype=torch.int64)
    drawn = torch_philox.exponential(one, one, one[None], 0)
    assert 0.0 < drawn.item() < 17.0
