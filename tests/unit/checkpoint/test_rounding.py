"""``P + B A`` rounded once, at the edges: ties and what float64 cannot see beside them, zeros, subnormals, infinity."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraforge.checkpoint.exact import Columns, Left, Product, column_norm, corrected, rounded_sum
from loraforge.checkpoint.floats import bits_of, ordered, round_pair
from loraforge.checkpoint.twofold import dot_at
from loraforge.checkpoint.workspace import Workspace
from tests.checkpoints import NAMES, TINY
from tests.rationals import LAYOUTS, nearest, rounded_once

SHORT = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", LAYOUTS, ids=list(NAMES))
short = pytest.mark.parametrize("dtype", SHORT, ids=list(NAMES)[:3])


def product_of(b, a):
    return Product(Left.of(b), Columns(a), column_norm(b.T))


def merged(p, b, a, dtype):
    return rounded_sum(p, product_of(b, a), dtype, Workspace()).values.clone()


def check(p, b, a, dtype):
    """``rounded_sum`` of the matrices, and ``dot_at`` of each element alone, against the reference."""
    p, b, a = (x.to(torch.float64) for x in (p, b, a))
    want = bits_of(rounded_once(p, b, a, dtype))
    assert (bits_of(merged(p, b, a, dtype)) == want).all()
    rows, columns = np.divmod(np.arange(p.numel()), p.shape[1])
    alone = dot_at(p.numpy().reshape(-1), b.numpy()[rows].T, a.numpy()[:, columns], dtype)
    assert (bits_of(alone) == want.reshape(-1)).all()


def numbers(*values):
    return torch.tensor([values], dtype=torch.float64)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(low, high, *shape, seed):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_reference_rounds_as_torch_does_where_torch_rounds_once():
    """Float64 to float32 and float32 to the short types are one rounding each, and IEEE's."""
    wide = randn(4000, seed=1) * torch.exp2(integers(-150, 130, 4000, seed=2))
    ties = torch.exp2(integers(-150, 127, 200, seed=3)) * 1.5
    wide = torch.cat((wide, ties, torch.tensor([65504.0, 65519.0, 65520.0])))
    for dtype in SHORT:
        given_ = wide if dtype == torch.float32 else wide.float()
        given_ = given_[torch.isfinite(given_) & (given_ != 0)]
        found = numbers(*(nearest(Fraction(x), dtype) for x in given_.tolist())).to(dtype)
        assert (bits_of(found)[0] == bits_of(given_.to(dtype))).all()


@dtypes
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 16, 64, 320])
@pytest.mark.parametrize("ratio", [1e-4, 5e-3, 1.0])
def test_random(dtype, rank, ratio):
    p = randn(6, 9, seed=rank).to(dtype).double()
    b, a = randn(6, rank, seed=rank + 1) * ratio / rank**0.5, randn(rank, 9, seed=rank + 2)
    check(p, b, a, dtype)


@dtypes
@pytest.mark.parametrize("rank", [1, 3, 17, 320])
def test_exact_ties(dtype, rank):
    """Whole numbers one apart, plus multiples of a half: many sums are ties."""
    first = 2.0 ** (LAYOUTS[dtype][0] - 1)
    p = first + integers(0, 100, 8, 12, seed=rank)
    b, a = integers(-2, 3, 8, rank, seed=rank + 1), integers(-2, 3, rank, 12, seed=rank + 2) / 2
    assert 0.1 < float(((b @ a) % 1 == 0.5).double().mean()) < 0.9
    check(p, b, a, dtype)
    check(-p, b, a, dtype)


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("first", [True, False])
def test_near_ties(dtype, sign, first):
    """A tie plus or minus less than float64 sees beside it."""
    # relative to the terms 2^-92 for float64, where the module promises 2^-100, and 2^-67 to 2^-83 for the others
    bits, step = LAYOUTS[dtype][0], 2.0**-20 if dtype == torch.float64 else 2.0**-30
    p = 2.0 ** (bits - 1) + integers(0, 100, 8, 12, seed=1)
    b, a = integers(-2, 3, 8, 3, seed=2), integers(-2, 3, 3, 12, seed=3) / 2
    parts_b, parts_a = [torch.full((8, 1), sign * step).double(), b], [torch.full((1, 12), step).double(), a]
    order = slice(None, None, 1 if first else -1)
    near = merged(p, torch.cat(parts_b[order], dim=1), torch.cat(parts_a[order]), dtype)
    check(p, torch.cat(parts_b[order], dim=1), torch.cat(parts_a[order]), dtype)
    assert (bits_of(near) != bits_of(merged(p, b, a, dtype))).any(), "the small term decided nothing"


@dtypes
def test_cancellation(dtype):
    """Terms a million times the sum, and sums of nothing but what rounding usually leaves."""
    p = randn(6, 9, seed=1).to(dtype).double()
    big_b, big_a, b, a = randn(6, 1, seed=2) * 2**20, randn(1, 9, seed=3), randn(6, 2, seed=4), randn(2, 9, seed=5)
    check(p, torch.cat((big_b, b, -big_b), dim=1), torch.cat((big_a, a * 1e-3, big_a)), dtype)
    check(p, torch.cat((big_b, -big_b), dim=1), torch.cat((big_a, big_a)), dtype)
    # what remains of p - p is far below p
    column, ones = p[:, :1], torch.ones(1, 9, dtype=torch.float64)
    same = column.expand(6, 9).contiguous()
    check(same, torch.cat((-column, b[:, :1]), dim=1), torch.cat((ones, ones * 1e-9)), dtype)
    check(same, -column, ones, dtype)


@dtypes
def test_zeros_keep_their_sign_where_nothing_is_added(dtype):
    p = numbers(0.0, -0.0, 1.0, -1.0, TINY[dtype])
    same = bits_of(p.to(dtype))
    zeros = torch.tensor([[3.0] * 5, [-2.0] * 5, [0.0] * 5], dtype=torch.float64)
    assert (bits_of(merged(p, numbers(0.0, -0.0, 1.0), zeros, dtype)) == same).all()
    cancelled = torch.ones(2, 5, dtype=torch.float64)
    assert (bits_of(merged(p, numbers(1.0, -1.0), cancelled, dtype)) == same).all()
    # what goes to zero is +0, as in IEEE
    gone = merged(p, numbers(-1.0), p, dtype)
    assert bits_of(gone).tolist() == [[0, same[0, 1], 0, 0, 0]]


@short
def test_a_sum_too_small_for_the_type_keeps_its_own_sign(dtype):
    p, b, a = numbers(0.0, -0.0, 0.0, -0.0), numbers(2.0**-300), numbers(1.0, 1.0, -1.0, -1.0)
    check(p, b, a, dtype)
    assert (bits_of(merged(p, b, a, dtype)) < 0).tolist() == [[False, False, True, True]]


@dtypes
def test_subnormals(dtype):
    tiny = TINY[dtype]
    p = integers(-40, 41, 8, 12, seed=1) * tiny
    b, a = integers(-6, 7, 8, 3, seed=2) * tiny, integers(-6, 7, 3, 12, seed=3)
    check(p, b, a, dtype)
    if dtype != torch.float64:  # halves and thirds of the least number, which float64 has and the type has not
        check(p, b, a / 2, dtype)
        check(p, b, randn(3, 12, seed=4), dtype)
    least = torch.finfo(dtype).smallest_normal
    check(least + p, b, a, dtype)
    check(p, b / tiny * least, a, dtype)


@short
def test_overflow_is_to_infinity_from_half_a_unit_beyond_the_greatest_number(dtype):
    greatest = torch.finfo(dtype).max
    half = 2.0 ** (LAYOUTS[dtype][2] - LAYOUTS[dtype][0])
    steps = numbers(0.5, 1 - 2.0**-40, 1.0, 1 + 2.0**-40, 2.0, 1000.0)
    p, b = torch.full((2, 6), greatest, dtype=torch.float64), torch.full((2, 1), half, dtype=torch.float64)
    p[1], b[1] = -p[1], -b[1]
    check(p, b, steps, dtype)
    assert torch.isinf(merged(p, b, steps, dtype))[0].tolist() == [False, False, True, True, True, True]


def test_overflow_of_float64_is_no_number():
    found = merged(numbers(torch.finfo(torch.float64).max), numbers(1e8), numbers(1e300), torch.float64)
    assert not torch.isfinite(found).any()


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(dtype, value):
    a = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    found = merged(numbers(1.0, value, 2.0), numbers(0.5, 1.0), a, dtype)
    assert torch.isfinite(found).tolist() == [[True, False, True]]
    assert found[0, ::2].tolist() == [1.5, 3.5]


@dtypes
@pytest.mark.parametrize("rank", [5, 320])
def test_threads_blocks_and_order_of_the_rank_change_nothing(dtype, rank):
    p = randn(130, 257, seed=1).to(dtype).double()
    b, a = randn(130, rank, seed=2) * 0.01, randn(rank, 257, seed=3)
    whole = bits_of(merged(p, b, a, dtype)).copy()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert (bits_of(merged(p, b, a, dtype)) == whole).all()
    finally:
        torch.set_num_threads(before)
    space = Workspace()  # one for blocks of several sizes, as in a merge
    for step in (7, 64, 129):
        for begin in range(0, 130, step):
            rows = slice(begin, begin + step)
            block = rounded_sum(p[rows], product_of(b[rows], a), dtype, space).values
            assert (bits_of(block) == whole[rows]).all()
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(1))
    assert (bits_of(merged(p, b[:, order].contiguous(), a[order].contiguous(), dtype)) == whole).all()


@dtypes
def test_ties_in_any_order_of_the_rank(dtype):
    p = 2.0 ** (LAYOUTS[dtype][0] - 1) + integers(0, 100, 20, 30, seed=1)
    b, a = integers(-3, 4, 20, 12, seed=2), integers(-3, 4, 12, 30, seed=3) / 2
    whole = bits_of(merged(p, b, a, dtype)).copy()
    for seed in range(5):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        assert (bits_of(merged(p, b[:, order].contiguous(), a[order].contiguous(), dtype)) == whole).all()


@dtypes
def test_empty(dtype):
    for rows, columns, rank in ((0, 4, 2), (3, 0, 2)):
        p = torch.zeros(rows, columns, dtype=torch.float64)
        b, a = torch.zeros(rows, rank, dtype=torch.float64), torch.zeros(rank, columns, dtype=torch.float64)
        assert merged(p, b, a, dtype).shape == (rows, columns)


@dtypes
@pytest.mark.parametrize("ratio", [1e-4, 5e-3, 1.0])
def test_the_way_back_is_told_where_every_sum_is_a_tie_or_near_one(dtype, ratio):
    first = 2.0 ** (LAYOUTS[dtype][0] - 1)
    p = torch.cat((first + integers(0, 100, 40, 12, seed=1), integers(-9, 9, 40, 12, seed=4), randn(40, 12, seed=7)))
    p = p.to(dtype)
    b, a = integers(-2, 3, 120, 3, seed=2), integers(-2, 3, 3, 12, seed=3) * ratio / 2
    product = product_of(b, a)
    found = rounded_sum(p, product, dtype, Workspace(), back=True)
    guess = rounded_sum(found.values, product.negated(), dtype, Workspace()).values
    assert (bits_of(guess) != bits_of(p)).any(), "nothing to correct"
    assert (bits_of(corrected(guess, found.back)) == bits_of(p)).all()


small = st.integers(-12, 12)


@st.composite
def problems(draw):
    """Whole numbers times powers of two: sums full of ties, zeros and numbers next to them."""
    dtype = draw(st.sampled_from(list(LAYOUTS)))
    rank, rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    bits = LAYOUTS[dtype][0]

    def matrix(shape, elements):
        flat = draw(st.lists(elements, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    near = st.integers(2 ** (bits - 1) - 3, 2 ** (bits - 1) + 3) | st.integers(2**bits - 4, 2**bits - 1) | small
    p = matrix((rows, columns), st.builds(lambda n, s: float(n * s), near, st.sampled_from([1, -1])))
    unit = 2.0 ** draw(st.integers(-12, 4))
    # beyond 2^-100 nothing is promised, so float64 has terms of one scale only
    shifts = [0, -1] if dtype == torch.float64 else [0, 0, 0, -1, -20, -27]
    elements = st.builds(lambda n, s: n * 2.0**s, small, st.sampled_from(shifts))
    return dtype, (p * unit).to(dtype), matrix((rows, rank), elements) * unit, matrix((rank, columns), elements)


@given(problems())
def test_any_sum_is_rounded_once(problem):
    dtype, p, b, a = problem
    p = torch.where(torch.isfinite(p), p, 1)
    check(p, b, a, dtype)


@given(
    st.sampled_from(SHORT),
    st.floats(-70000, 70000, width=64) | st.integers(-(2**30), 2**30).map(lambda n: n / 512),
    st.floats(-1, 1, width=64) | st.sampled_from([0.0, 1.0, -1.0, 2.0**-60]),
)
def test_a_pair_is_rounded_once(dtype, high, share):
    low = share * np.spacing(abs(high)) / 2
    high, low = high + low, low - ((high + low) - high)
    total = Fraction(high) + Fraction(low)
    expected = nearest(total, dtype) if total else high
    found = round_pair(np.array([high]), np.array([low]), dtype)
    assert bits_of(found)[0] == bits_of(numbers(expected).to(dtype))[0, 0]


@short
def test_a_pair_beside_a_tie_is_not_rounded_twice(dtype):
    """The classic: a tie and a little, which a rounding in between makes a tie."""
    bits = LAYOUTS[dtype][0]
    tie, above = 1 + 2.0**-bits, 1 + 2.0 ** (1 - bits)
    for low, expected in ((2.0**-54, above), (2.0**-900, above), (0.0, 1.0), (-(2.0**-54), 1.0), (-(2.0**-900), 1.0)):
        for sign in (1, -1):
            assert float(round_pair(np.array([sign * tie]), np.array([sign * low]), dtype)) == sign * expected, low


@dtypes
def test_order_of_bits_is_the_order_of_numbers(dtype):
    greatest = torch.finfo(dtype).max
    values = numbers(-greatest, -1.0, -TINY[dtype], -0.0, 0.0, TINY[dtype], 1.0, greatest).to(dtype)[0]
    places = [int(place) for place in ordered(bits_of(values))]
    assert places == sorted(set(places))
    assert np.diff(places[2:6]).tolist() == [1, 1, 1]
    assert (ordered(ordered(bits_of(values))) == bits_of(values)).all()
