"""How much of an update survives the rounding into the weights' type."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of an update survived the rounding, on the elements that were measured.

    ``wanted`` is |dW|^2, ``lost`` is |(W' - W) - dW|^2; ``changed`` of ``measured`` elements have other bits.
    """

    wanted: float = 0.0
    lost: float = 0.0
    changed: int = 0
    measured: int = 0

    @property
    def error(self) -> float:
        """``|(W' - W) - dW| / |dW|``; 0 where there is no update."""
        return math.sqrt(self.lost / self.wanted) if self.wanted else 0.0

    @property
    def share_changed(self) -> float:
        """The share of elements whose bits changed."""
        return self.changed / self.measured if self.measured else 0.0

    def __add__(self, other: "Fidelity") -> "Fidelity":
        """Return that of both together."""
        return Fidelity(
            self.wanted + other.wanted,
            self.lost + other.lost,
            self.changed + other.changed,
            self.measured + other.measured,
        )
