"""Early stopping: training ends when the values no longer predict held-out rewards better."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def quarter_correlations(predictions: Tensor, targets: Tensor, mask: Tensor) -> list[float]:
    """Pearson's correlation of predictions and targets, by quarter of the response.

    A prefix of t of a response's n tokens belongs to the quarter that t / n falls in, the upper end
    included. Prefixes of all responses are pooled.

    Args:
        predictions: float [N, T], one for each prefix.
        targets: float [N, T].
        mask: [N, T], not 0 on the response.

    Returns:
        4 numbers: 0 where all predictions are equal, NaN where a quarter has no two targets that
        differ.
    """
    counted = (mask != 0).long()
    quarter = (4 * counted.cumsum(1) - 1) // counted.sum(1, keepdim=True).clamp(min=1)
    found = []
    for q in range(4):
        at = (quarter == q) & (counted == 1)
        pair = torch.stack([predictions[at], targets[at]]).double()
        constant = [not bool((row != row[:1]).any()) for row in pair]
        if constant[1]:
            found.append(math.nan)
        else:
            found.append(0.0 if constant[0] else float(torch.corrcoef(pair)[0, 1]))
    return found


class EarlyStopping:
    """Keeps the parameters that predict best, and says when there is no more to gain.

    Args:
        model: what is trained.
        correlations: computes the four correlations of the model as it is.
        count: N, how many responses they come from.
        every: steps between two checks.
        steps: the most steps; there is a check after the last.
        patience: checks without a rise of their mean after which training ends.

    Attributes:
        history: (number of steps, the four correlations) of each check.
        best: the number of steps of the best check.
    """

    def __init__(
        self,
        model: Any,
        correlations: Callable[[], list[float]],
        count: int,
        *,
        every: int,
        steps: int,
        patience: int,
    ) -> None:
        self.model, self.correlations, self.count = model, correlations, count
        self.every, self.steps, self.patience = every, steps, patience
        self.history: list[tuple[int, list[float]]] = []
        self.best, self._highest = 0, -math.inf
        self._first = self._kept = copy.deepcopy(model.state_dict())

    def stop_after(self, steps: int) -> bool:
        """Check after every `every` steps and the last; whether training should end."""
        if steps % self.every and steps < self.steps:
            return False
        self.model.eval()
        found = self.correlations()
        self.model.train()
        self.history.append((steps, found))
        known = [x for x in found if not math.isnan(x)]
        mean = sum(known) / len(known) if known else -math.inf
        if mean > self._highest:
            self.best, self._highest = steps, mean
            self._kept = copy.deepcopy(self.model.state_dict())
        return steps - self.best >= self.every * self.patience

    def finish(self) -> None:
        """Give the model its best parameters.

        Raises:
            ValueError: the values never predicted the rewards better than chance does: the mean
                correlation was never above two standard errors, 2 / sqrt(N). The model then has
                the parameters that it began with.
        """
        chance = 2 / math.sqrt(self.count)
        learned = self._highest > chance
        self.model.load_state_dict(self._kept if learned else self._first)
        if not learned:
            raise ValueError(
                f"the scorer has not learned: over {len(self.history)} checks its values correlate "
                f"with {self.count} held-out rewards by {self._highest:.3f} at best, and by chance "
                f"they may by {chance:.3f}; it needs more steps, another learning rate or more data"
            )
