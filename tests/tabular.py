"""A world small enough to solve exactly: all responses over a few tokens, as a tree.

Token 0 ends a response, and so does its length. The reference is a fixed random table of logits,
the reward a fixed random number in [0, 1] for every complete response. Everything is float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch

END = -1


class Tree:
    """Prefixes in breadth-first order, the empty one first.

    Attributes:
        child: int64 [n, V], the prefix after a token; END where the response is complete.
        ref: float64 [n, V], log pi_ref of the next token.
        rewards: float64 [n, V], of the complete responses; 0 elsewhere.
        tokens, nodes, mask: [N, T], every complete response, its prefixes before each token, and
            where it has tokens.
    """

    def __init__(self, vocab: int = 4, depth: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes: list[tuple[int, ...]] = [()]
        for prefix in prefixes:  # grows
            if len(prefix) + 1 < depth:
                prefixes += [(*prefix, token) for token in range(1, vocab)]
        index = {prefix: i for i, prefix in enumerate(prefixes)}
        nexts = [[index.get((*p, z), END) for z in range(vocab)] for p in prefixes]
        self.child = torch.tensor(nexts)
        shape = self.child.shape
        self.ref = (1.5 * torch.randn(shape, generator=generator)).double().log_softmax(-1)
        drawn = torch.rand(shape, generator=generator).double()
        self.ends = self.child == END
        self.rewards = torch.where(self.ends, drawn, 0.0)
        complete = [(*p, z) for p in prefixes for z in range(vocab) if (*p, z) not in index]
        self.mask = torch.tensor([[t < len(y) for t in range(depth)] for y in complete]).double()
        padded = [[*y, *[0] * (depth - len(y))] for y in complete]
        self.tokens = torch.tensor(padded)
        self.nodes = torch.tensor(
            [[index[y[:t]] if t < len(y) else 0 for t in range(depth)] for y in complete]
        )
        self.response_rewards = self.rewards[self.nodes, self.tokens][
            torch.arange(len(complete)), self.mask.sum(1).long() - 1
        ]

    def up(self, values_of: Any) -> torch.Tensor:
        """Q [n, V] with Q = reward at the end and values_of(node, Q) of the prefix elsewhere."""
        q = self.rewards.clone()
        values = torch.zeros(len(q), dtype=torch.float64)
        for node in reversed(range(len(q))):
            going_on = ~self.ends[node]
            q[node, going_on] = values[self.child[node, going_on]]
            values[node] = values_of(node, q[node])
        return q

    def q(self, policy: torch.Tensor, beta: float = math.inf) -> torch.Tensor:
        """Q [n, V] of a policy (log-probabilities [n, V]): reward to come less KL / beta."""
        p = policy.exp()
        kl = torch.where(p > 0, p * (policy - self.ref), 0.0).sum(-1) / beta
        return self.up(lambda node, q: p[node] @ q - kl[node])

    def soft_q(self, beta: float) -> torch.Tensor:
        """Q* [n, V] of the best policy, V*(y) = 1/beta log E_ref exp(beta Q*)."""
        return self.up(lambda node, q: torch.logsumexp(self.ref[node] + beta * q, 0) / beta)

    def objective(self, policy: torch.Tensor, beta: float) -> float:
        """E[reward] - KL(policy || ref) / beta of whole responses."""
        log_p, log_ref = self.logprobs(policy), self.logprobs(self.ref)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (self.response_rewards - (log_p - log_ref) / beta), 0.0)
        return float(terms.sum())

    def logprobs(self, policy: torch.Tensor) -> torch.Tensor:
        """log-probability [N] of every complete response."""
        steps = policy[self.nodes, self.tokens]
        return torch.where(self.mask > 0, steps, 0.0).sum(1)

    def step(self, table: torch.Tensor) -> Any:
        """step(tokens) -> table [B, V] of the prefix so far, for `Ensemble` and `Guidance`."""
        at = None

        def step(tokens: torch.Tensor) -> torch.Tensor:
            nonlocal at
            if at is None:  # the prompt says nothing
                at = torch.zeros(len(tokens), dtype=torch.int64)
            else:
                at = self.child[at, tokens[:, 0]].clamp(min=0)  # ended rows: anywhere
            return table[at].float()

        return step
