"""A soak of the server: `make soak-vllm`. Thousands of requests with random arguments, of which
some are cancelled and some are wrong. Writes bench/results/vllm_soak.json and vllm_soak.md."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

import mod_fused
from bench import vllm as bench

from .conftest import Case, cases, expected, tokens
from .server import Server, body, serving
from .test_server import COMPLETIONS, right

REQUESTS = int(os.environ.get("REQUESTS", "8000"))
AT_ONCE, CHECKED, SEED = 64, 100, 50


class Soak:
    """The requests, and what became of them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.counts: collections.Counter[str] = collections.Counter()
        self.answers: dict[int, list[int]] = {}
        self.memory: list[int] = []  # bytes of the engine's processes after every tenth request
        self.engine = server.workers()

    async def run(self, given: list[Case]) -> None:
        """Send all requests, `AT_ONCE` of them at a time."""
        draw = random.Random(SEED)
        kinds = [draw.random() for _ in given]
        room = asyncio.Semaphore(AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=300)
        # A connection of its own for each: uvicorn may close an idle one just as it is used again.
        connections = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connections) as session:

            async def one(index: int, case: Case) -> None:
                async with room:
                    chance = random.Random(SEED + index)
                    if kinds[index] < 0.1:
                        await self.wrong(session, case, chance)
                    elif kinds[index] < 0.25:
                        await self.cancelled(session, case, chance)
                    else:
                        await self.answered(session, index, case, chance)
                    if not index % 10:
                        self.memory.append(self.used())

            await asyncio.gather(*(one(i, case) for i, case in enumerate(given)))

    def used(self) -> int:
        """Bytes of the engine's processes that are nobody else's."""
        return sum(p.memory_full_info().uss for p in self.engine if "VLLM" in p.cmdline()[0])

    def post(self, session: aiohttp.ClientSession, given: dict[str, Any]) -> Any:
        return session.post(
            f"{self.server.url}/v1/completions",
            data=json.dumps({"model": "mod"} | given),
            headers={"content-type": "application/json"},
        )

    async def wrong(self, session: Any, case: Case, chance: random.Random) -> None:
        given, _ = COMPLETIONS[chance.choice(list(COMPLETIONS))]
        plain = {"prompt": case.prompt, "seed": 1, "max_tokens": 8}
        async with self.post(session, plain | given) as answer:
            self.counts["refused" if answer.status == 400 else "wrongly accepted"] += 1

    async def cancelled(self, session: Any, case: Case, chance: random.Random) -> None:
        """Leave before the first piece or after some of them."""
        given = body(case, stream=True, ignore_eos=True, max_tokens=128)
        left = chance.randrange(6)
        async with self.post(session, given) as answer:
            if left:
                async for _ in answer.content:
                    left -= 1
                    if not left:
                        break
            answer.close()
        self.counts["cancelled"] += 1

    async def answered(self, session: Any, index: int, case: Case, chance: random.Random) -> None:
        more: dict[str, Any] = {"logprobs": 5} if chance.random() < 0.2 else {}
        found: list[int] = []
        if chance.random() < 0.5:
            async with self.post(session, body(case, stream=True, **more)) as answer:
                ended = None
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        (choice,) = json.loads(line[6:])["choices"]
                        found += choice["token_ids"] or []
                        ended = choice["finish_reason"] or ended
        else:
            async with self.post(session, body(case, **more)) as answer:
                (choice,) = (await answer.json())["choices"]
                found, ended = choice["token_ids"], choice["finish_reason"]
        self.answers[index] = found
        self.counts["answered" if ended in ("stop", "length") else "lost"] += 1


def metric(server: Server, name: str) -> float:
    """The sum of one of the server's own figures."""
    import requests

    lines = requests.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_soak(tmp_path: Path, ensemble: mod_fused.Ensemble) -> None:
    given = cases(REQUESTS, seed=SEED)
    with serving(tmp_path) as server:
        assert right(server, ensemble)
        soak = Soak(server)
        begin = time.perf_counter()
        asyncio.run(soak.run(given))
        seconds = time.perf_counter() - begin
        sample = random.Random(SEED).sample(sorted(soak.answers), min(CHECKED, len(soak.answers)))
        wanted = expected(ensemble, [given[i] for i in sample])
        wrong = sum(soak.answers[i] != tokens(out) for i, out in zip(sample, wanted, strict=True))
        running = metric(server, "vllm:num_requests_running")
        used = metric(server, "vllm:kv_cache_usage_perc")
        assert right(server, ensemble)
        alive = all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in soak.engine)

    # The heap's fragments fill during the first thousands of requests.
    part = len(soak.memory) // 4
    before, last = (
        sum(found) / part / 1e6 for found in (soak.memory[-2 * part : -part], soak.memory[-part:])
    )
    counts = soak.counts
    row = {
        "requests": REQUESTS,
        "answered": counts["answered"],
        "cancelled": counts["cancelled"],
        "refused": counts["refused"],
        "lost": REQUESTS - counts["answered"] - counts["cancelled"] - counts["refused"],
        "checked": len(sample),
        "wrong": wrong,
        "MB, third quarter": before,
        "MB, last quarter": last,
        "left running": int(running),
        "KV left": used,
        "requests / s": REQUESTS / seconds,
    }
    bench.write(
        "vllm_soak", f"random requests, {AT_ONCE} at a time, seed {SEED}", "make soak-vllm", [row]
    )
    assert alive and row["lost"] == wrong == running == used == 0
    assert last < 1.05 * before
