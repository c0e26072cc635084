"""What shards combine, without processes: each one's message is handed to all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import normal

from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.call.outputs import new_outputs
from mod_fused.torch_kernels import launch
from mod_fused.torch_kernels.mixture import mix
from mod_fused.torch_kernels.vocabulary import Vocabulary, VocabularyShard

CPU = torch.device("cpu")
WIDTHS = [700, 1, 1500, 99, 1000, 50]  # the last begins beyond V
V = 3200


class _Sent(Exception):
    """Ends a method at its message."""


def shards() -> list[VocabularyShard]:
    def gather(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    return [VocabularyShard(V, WIDTHS, rank, gather, CPU) for rank in range(len(WIDTHS))]


def together(method: str, *of_shard: tuple[Any, ...]) -> list[Any]:
    """What a method returns to each shard, given the arguments of each."""
    every, messages = shards(), []

    def send(x: torch.Tensor) -> torch.Tensor:
        messages.append(x)
        raise _Sent

    for shard, arguments in zip(every, of_shard, strict=True):
        shard.gather = send
        with pytest.raises(_Sent):
            getattr(shard, method)(*arguments)
    found = []
    for shard, arguments in zip(every, of_shard, strict=True):
        shard.gather = lambda x: torch.stack(messages)
        found.append(getattr(shard, method)(*arguments))
    return found


def cut(x: torch.Tensor, fill: float) -> list[torch.Tensor]:
    """A row [b, V] and padding as the tiles of each shard."""
    padded = torch.nn.functional.pad(x, (0, sum(WIDTHS) - V), value=torch.nan)
    return [
        shard.tiled(part, fill)
        for shard, part in zip(shards(), padded.split(WIDTHS, 1), strict=True)
    ]


def test_a_row_comes_back_from_its_tiles():
    x = normal(1, 2, V)
    back = [shard.untiled(part) for shard, part in zip(shards(), cut(x, 0.0), strict=True)]
    assert torch.equal(torch.cat(back, 1), x)
    assert Vocabulary(V).tiled(x, 0.0).shape == (2, 4, 1024)


def test_sums_by_tile_count_each_column_once():
    x = normal(2, 2, V).round()  # sums of integers are exact
    wanted = Vocabulary(V).tiled(x, 0.0).sum(-1)
    for found in together("tile_sums", *((part.sum(-1),) for part in cut(x, 0.0))):
        assert torch.equal(found, wanted)


def test_log_sums_by_tile_survive_parts_that_are_empty_or_infinite():
    x = 30.0 * normal(3, 5, V)
    x[1, :1024] = -torch.inf
    x[2, 700:] = -torch.inf
    x[3, 2500] = torch.inf
    x[4, 0] = torch.nan

    def stacked(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        peaks = tiles.amax(-1)
        base = torch.where(peaks.isfinite(), peaks, 0.0)
        return peaks[None], torch.exp(tiles - base[..., None]).sum(-1)[None]

    whole = Vocabulary(V).tiled(x, -torch.inf)
    for peaks, sums in together("tile_log_sums", *map(stacked, cut(x, -torch.inf))):
        assert torch.equal(peaks[0].nan_to_num(), whole.amax(-1).nan_to_num())
        base = torch.where(peaks.isfinite(), peaks, 0.0)[0].double()
        wanted = torch.logsumexp(whole.double(), -1)
        got = base + sums[0].double().log()
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_token_is_picked_where_it_is():
    x = normal(4, 6, V)
    token = torch.tensor([0, 700, 701, 2299, 2300, V - 1])
    rows = [([part.flatten(1)], token) for part in cut(x, 0.0)]
    for (found,) in together("pick", *rows):
        assert torch.equal(found, x.gather(1, token[:, None]).squeeze(1))


def test_of_equals_the_first_shard_has_the_least():
    x = [torch.tensor([1.0, 5.0]), torch.tensor([0.5, 5.0])] + 4 * [torch.tensor([0.5, 6.0])]
    ids = [torch.tensor([10 * k, 10 * k + 1]) for k in range(len(WIDTHS))]
    for least, token in together("least", *zip(x, ids, strict=True)):
        assert least.tolist() == [0.5, 5.0] and token.tolist() == [10, 1]
        assert token.dtype == torch.int64


#: Of docs/backends.md: collectives, and numbers of each row, for 3 tiles and M = 1.
EXCHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "reverse_kl": ({}, {}, 1 + 3, 2 * 3 + 3 + 4),
    "zero": ({"divergence": "jsd", "normalizer": "zero"}, {}, 3 + 3, 4 * 3 + 2 * 3 + 2 + 3 + 4),
    "plausibility": ({"plausibility": 0.1}, {}, 1 + 3 + 1, 2 * 3 + 3 + 4 + 1),
    "bias": ({}, {"bias": torch.zeros(2, 3000)}, 1 + 3 + 2, 2 * 3 + 3 + 4 + 2),
    "top_k": ({}, {"top_k": 7}, 1 + 3 + 4, 2 * 3 + 3 + 4 + 1024),
    "top_p": ({}, {"top_p": 0.9}, 1 + 3 + 5, 2 * 3 + 3 + 4 + 1025),
    "models": ({}, {"return_model_logprobs": True}, 1 + 3 + 1, 2 * 3 + 3 + 4 + 2 + 4 * 3),
}


def exchanged(mixing: dict[str, Any], drawing: dict[str, Any]) -> tuple[int, int, int]:
    """Collectives of a call with one shard, numbers of each row in them, and evaluations."""
    x, y = normal(5, 2, 2, 3000)
    given = check_mixture(x, [y], [0.7], **mixing)
    draws = check_draw(given, **drawing, seed=1)
    sent: list[int] = []

    def gather(x: torch.Tensor) -> torch.Tensor:
        sent.append(x.numel() // 2)
        return x[None]

    one = VocabularyShard(3000, [3000], 0, gather, CPU)
    launch.sample_out(given, draws, new_outputs(given, draws), None, one)
    record: dict[str, Any] = {"evaluations": 0}
    mix(given, slice(0, 2), Vocabulary(3000), record)
    return len(sent), sum(sent), record["evaluations"]


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_documented_numbers_are_exchanged(name):
    mixing, drawing, collectives, numbers = EXCHANGES[name]
    assert exchanged(mixing, drawing) == (collectives, numbers, 0)


def test_an_evaluation_is_one_collective():
    collectives, numbers, evaluations = exchanged({"divergence": "jsd"}, {})
    assert evaluations > 1
    assert collectives == 4 + evaluations + 3
    assert numbers == 4 * 3 + 6 * 3 + 4 * 3 * evaluations + 2 + 3 + 4
