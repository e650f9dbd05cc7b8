"""Rounding without rounding: sums in rational numbers, and the one nearest number of each type."""

from fractions import Fraction

import torch

# bits of a significand with the hidden one, exponents of the least and the greatest normal number
LAYOUTS = {
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
    torch.float32: (24, -126, 127),
    torch.float64: (53, -1022, 1023),
}


def nearest(x: Fraction, dtype) -> float:
    """The number of ``dtype`` nearest to x, ties to the even one, beyond the greatest to infinity."""
    bits, least, greatest = LAYOUTS[dtype]
    size = abs(x)
    if size == 0:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size  # now 2^exponent <= size < 2^(exponent + 1)
    unit = Fraction(2) ** (max(exponent, least) - bits + 1)
    whole, rest = divmod(size / unit, 1)
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    found = float("inf") if whole * unit >= Fraction(2) ** (greatest + 1) else float(whole * unit)
    return found if x > 0 else -found


def rounded_once(p, b, a, dtype):
    """``P + B A`` in rational numbers, rounded once; a zero that stays zero keeps its sign."""
    rows, columns = p.shape
    (b, b_unit), (a, a_unit) = _whole_numbers(b), _whole_numbers(a)
    a = list(zip(*a, strict=True))
    found = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            start = float(p[i, j])
            total = Fraction(start) + Fraction(sum(x * y for x, y in zip(b[i], a[j], strict=True)), b_unit * a_unit)
            found[i, j] = start if total == 0 and start == 0 else nearest(total, dtype)
    return found.to(dtype)


def _whole_numbers(matrix):
    """Integers and what they are all divided by: floats are dyadic, so this is exact, and faster than fractions."""
    ratios = [[x.as_integer_ratio() for x in row] for row in matrix.tolist()]
    unit = max((d for row in ratios for _, d in row), default=1)
    return [[n * (unit // d) for n, d in row] for row in ratios], unit
