"""Floating-point numbers as bits, and rounding that happens once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Allocate: TypeAlias = Callable[[str, torch.dtype, tuple[int, ...]], Tensor]
"""Gives a buffer by name, type and shape."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Format:
    """A floating-point element type, seen as integers of its width."""

    magnitude: int
    exponent: int
    mantissa: int


FORMATS = {
    torch.bfloat16: Format(0x7FFF, 0x7F80, 0x007F),
    torch.float16: Format(0x7FFF, 0x7C00, 0x03FF),
    torch.float32: Format(0x7FFF_FFFF, 0x7F80_0000, 0x007F_FFFF),
    torch.float64: Format((1 << 63) - 1, 0x7FF << 52, (1 << 52) - 1),
}


def bits_of(values: Tensor) -> Array:
    """Return a tensor's bits as signed integers of its width, without a copy."""
    return np.asarray(values.view(_INTEGERS[values.itemsize]).numpy())


def ordered(bits: Array) -> Array:
    """Map bits seen as signed integers so that neighbours are one apart, through zero, too; its own inverse."""
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def largest_bits(values: Tensor) -> int:
    """Return the bits of the greatest magnitude of a tensor; of an infinity or NaN, if there is one."""
    bits, magnitude = bits_of(values), FORMATS[values.dtype].magnitude
    # seen as unsigned, the greatest is the negative number of the greatest magnitude, if there is a negative one
    return max(int(bits.max()), int(bits.view(f"u{bits.itemsize}").max()) & magnitude)


def largest(values: Tensor) -> float:
    """Return the greatest magnitude of a tensor, or the greatest finite number, if that is less."""
    bits = min(largest_bits(values), FORMATS[values.dtype].exponent - 1)
    return float(torch.tensor([bits]).to(_INTEGERS[values.itemsize]).view(values.dtype))


def round_once(values: Array, dtype: torch.dtype) -> Tensor:
    """Round float64 numbers once into a shorter type; torch would go through float32, and round twice."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if dtype == torch.float32:
            return torch.from_numpy(single)
        return torch.from_numpy(_to_odd(single, values - single)).to(dtype)


def round_pair(high: Array, low: Array, dtype: torch.dtype) -> Tensor:
    """Round ``high + low`` (float64, |low| at most half an ulp of high) once into ``dtype``.

    Numerics: into a shorter type by round-to-odd on the way, so that the last rounding sees on which side of a tie
        the number lies (Boldo and Melquiond, 2008).
    """
    return torch.from_numpy(high) if dtype == torch.float64 else round_once(_to_odd(high, low), dtype)


def _to_odd(value: Array, rest: Array) -> Array:
    """Of the two neighbours around ``value + rest`` take the one whose last bit is 1; exact numbers stay."""
    integer = np.int64 if value.dtype == np.float64 else np.int32
    bits: Array = value.view(integer)
    move = (rest != 0) & ((bits & 1) == 0) & np.isfinite(value)
    away = np.where((rest > 0) == (value > 0), 1, -1).astype(integer)  # the next bit pattern is the next number
    found: Array = np.where(move, bits + away, bits).view(value.dtype)
    zero = np.flatnonzero(move & (value == 0))
    found[zero] = np.nextafter(value[zero], np.copysign(math.inf, rest[zero]).astype(value.dtype))
    return found
