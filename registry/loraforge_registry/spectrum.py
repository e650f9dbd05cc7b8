"""The singular values of one target's update, and what they say: plain numbers, whoever worked them out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SHARES = (0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """All singular values of dW, descending: finite, none below 0."""

    values: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The spectral norm of dW."""
        return self.values[0] if self.values else 0.0

    @property
    def norm(self) -> float:
        """The Frobenius norm of dW."""
        return math.hypot(*self.values)

    @property
    def stable_rank(self) -> float:
        """``|dW|_F^2 / |dW|_2^2`` (Rudelson and Vershynin, 2007); 0 for a zero update."""
        return (self.norm / self.largest) ** 2 if self.largest else 0.0

    @property
    def effective_rank(self) -> float:
        """``exp(-sum p_i ln p_i)`` with ``p_i = s_i / sum s`` (Roy and Vetterli, 2007); 0 for a zero update."""
        if not self.largest:
            return 0.0
        scaled = [value / self.largest for value in self.values]  # a sum of the values themselves may overflow
        total = math.fsum(scaled)
        return math.exp(-math.fsum(s / total * math.log(s / total) for s in scaled if s / total > 0))

    def rank_for(self, share: float) -> int:
        """The smallest rank that holds a share of ``|dW|_F^2``; 0 for a zero update."""
        if not self.largest:
            return 0
        squares = [(value / self.largest) ** 2 for value in self.values]
        wanted, held = share * math.fsum(squares) * (1 - 1e-15), 0.0
        for count, square in enumerate(squares, 1):
            held += square
            if held >= wanted:
                return count
        return len(squares)

    def as_json(self) -> Mapping[str, object]:
        """The document that ``--json`` prints."""
        return {
            "values": list(self.values),
            "norm": self.norm,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "rank_for": {f"{share:g}": self.rank_for(share) for share in SHARES},
        }
