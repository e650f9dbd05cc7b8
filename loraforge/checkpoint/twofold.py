"""Sums of products in twice the precision of float64, in an order that is the same everywhere.

Ogita, Rump and Oishi, Accurate sum and dot product (SIAM J. Sci. Comput. 26, 2005), Dot2.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from loraforge.checkpoint.floats import Array, round_pair

_SPLIT = 2.0**27 + 1  # Dekker's constant for float64


def dot_at(p: Array, b: Array, a: Array, dtype: torch.dtype) -> Tensor:
    """Return ``p + sum_k b_k a_k``, rounded once into ``dtype``; a zero to which nothing is added keeps its sign.

    Shapes: p (k,), b and a (R, k), all float64; or anything that broadcasts likewise.
    """
    high, low = _dot2(p, zip(b, a, strict=True))
    rounded = round_pair(high, low, dtype)
    zero = np.nonzero((high == 0) & (p == 0))
    if len(zero[0]):
        rounded[tuple(map(torch.from_numpy, zero))] = torch.from_numpy(p[zero]).to(dtype)
    return rounded


def _dot2(p: Array, pairs: Iterable[tuple[Array, Array]]) -> tuple[Array, Array]:
    """``p + sum b_k a_k`` as a sum of two float64, each operation by itself: no order is left to the machine."""
    high, low = p.astype(np.float64, copy=True), np.zeros_like(p, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for b, a in pairs:
            product, product_error = _two_product(b, a)
            high, error = _two_sum(high, product)
            low = low + (error + product_error)
        return _two_sum(high, low)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """Knuth: s + e = x + y exactly."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


def _two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """Dekker and Veltkamp: p + e = x y exactly; without a fused multiply-add, which not every machine has."""
    p = x * y
    x_high, x_low = _halves(x)
    y_high, y_low = _halves(y)
    return p, ((x_high * y_high - p) + x_high * y_low + x_low * y_high) + x_low * y_low


def _halves(x: Array) -> tuple[Array, Array]:
    c = _SPLIT * x
    high = c - (c - x)
    return high, x - high
