"""``P + B A`` against rational arithmetic: every element is the real number, rounded once, to nearest, ties to even."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from loraforge.checkpoint import exact
from loraforge.checkpoint.workspace import Workspace

PRECISION = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


def rounded(x, dtype):
    """The nearest number of a type to a fraction, ties to even."""
    digits, least = PRECISION[dtype]
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    exponent += Fraction(2) ** (exponent + 1) <= size
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    return math.copysign(float(round(size / unit) * unit), x)


def expected(p, b, a, dtype):
    terms = [[Fraction(float(x)) for x in row] for row in b.tolist()], [[Fraction(x) for x in r] for r in a.tolist()]
    return [
        [
            rounded(Fraction(p[i, j].item()) + sum(terms[0][i][k] * terms[1][k][j] for k in range(len(a))), dtype)
            for j in range(p.shape[1])
        ]
        for i in range(p.shape[0])
    ]


def computed(p, b, a, dtype):
    product = exact.Product(exact.Left.of(b), exact.Columns(a), exact.column_norm(b.T))
    return exact.rounded_sum(p, product, dtype, Workspace()).values.to(torch.float64)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("rank", [1, 3, 16, 80])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1, 1, 30])
def test_every_element_is_correctly_rounded(dtype, rank, scale):
    g = torch.Generator().manual_seed(rank)
    p = torch.randn(6, 8, generator=g, dtype=torch.float64).mul(0.02).to(dtype).to(torch.float64)
    p[0], p[1], p[2] = 0, -0.0, p[2] * 1e-6
    p = p.to(dtype).to(torch.float64)
    b, a = (torch.randn(s, generator=g).to(torch.float64) for s in ((6, rank), (rank, 8)))
    assert computed(p, b * scale, a * 0.02, dtype).tolist() == expected(p, b * scale, a * 0.02, dtype)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("nudge", [0, 2.0**-60, -(2.0**-60)])
def test_ties_and_what_lies_next_to_them(dtype, nudge):
    g = torch.Generator().manual_seed(0)
    p = torch.randint(-300, 300, (20, 30), generator=g).to(torch.float64).mul(2.0**-8).to(dtype).to(torch.float64)
    b = torch.cat([torch.randint(-3, 4, (20, 4), generator=g), torch.ones(20, 1)], dim=1).to(torch.float64)
    a = torch.cat([torch.randint(-3, 4, (4, 30), generator=g) * 2.0**-10, torch.full((1, 30), nudge)]).to(torch.float64)
    assert computed(p, b, a, dtype).tolist() == expected(p, b, a, dtype)


@pytest.mark.parametrize("dtype", PRECISION)
def test_order_threads_and_blocks_change_nothing(dtype):
    g = torch.Generator().manual_seed(1)
    p = torch.randn(64, 96, generator=g).to(dtype).to(torch.float64)
    b, a = torch.randn(64, 24, generator=g).to(torch.float64), torch.randn(24, 96, generator=g).to(torch.float64)
    whole = computed(p, b, a, dtype)
    order = torch.randperm(24, generator=g)
    assert torch.equal(whole, computed(p, b[:, order], a[order].contiguous(), dtype))
    parts = [computed(p[rows : rows + 7], b[rows : rows + 7].contiguous(), a, dtype) for rows in range(0, 64, 7)]
    assert torch.equal(whole, torch.cat(parts))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert torch.equal(whole, computed(p, b, a, dtype))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", PRECISION)
def test_zeros_keep_their_sign_where_nothing_is_added(dtype):
    p = torch.tensor([[0.0, -0.0]], dtype=torch.float64)
    values = computed(p, torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64), dtype)
    assert np.signbit(values.numpy()).tolist() == [[False, True]]
