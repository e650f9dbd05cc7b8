"""Successive halving: of n that were begun, those that look worst are given up early.

With ``first`` steps r and eta: rung i is reached after ``r eta^i`` steps, and of n_i there the best
``max(1, floor(n_i / eta))`` go on (Jamieson and Talwalkar 2016, arXiv:1502.07943; with this eta and this floor one
bracket of Hyperband, Li et al. 2018, arXiv:1603.06560, algorithm 1). Departs from both: who goes on keeps the schedule
it began with, to its own last step, so that what comes out is what a run alone would have given.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraforge.errors import TrainingError


@dataclass(frozen=True)
class Halving:
    """When to judge, and how many to keep: the best of ``eta`` each time.

    Raises:
        TrainingError: ``first`` is below 1, or ``eta`` below 2.
    """

    first: int
    eta: int = 3

    def __post_init__(self) -> None:
        for name, least in (("first", 1), ("eta", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TrainingError(f"halving: {name} is {value!r}, expected a whole number from {least}")

    def rungs(self, steps: int) -> list[int]:
        """Return the steps up to ``steps`` after which contests are judged."""
        found, rung = [], self.first
        while rung <= steps:
            found.append(rung)
            rung *= self.eta
        return found

    def plan(self, contestants: int, steps: int) -> list[tuple[int, int]]:
        """Return for each rung up to ``steps`` its step, and how many go on from it, while there is a choice."""
        found = []
        for rung in self.rungs(steps):
            if contestants == 1:
                break
            contestants = max(1, contestants // self.eta)
            found.append((rung, contestants))
        return found


def losers(losses: Mapping[str, float], kept: int) -> list[str]:
    """Return who is given up; a loss that is not finite is the worst, and of equals the later goes."""
    ranked = sorted(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
    return ranked[kept:]
