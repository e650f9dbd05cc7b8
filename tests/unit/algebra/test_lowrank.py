"""Factored algebra against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge import lowrank

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**31))


def factors(m, n, rank, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    b = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


@given(SHAPES)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_decompose_is_the_svd_of_the_product_also_where_the_rank_exceeds_both_sides(shape):
    a, b = factors(*shape)
    found = lowrank.decompose(a, b)
    dense = b @ a
    s = torch.linalg.svdvals(dense)
    count = len(found.s)
    assert torch.allclose(found.s, s[:count], rtol=1e-10, atol=1e-12 * float(s[0]))
    u, v = found.bases(count)
    assert torch.allclose(u @ torch.diag(found.s) @ v.T, dense, atol=1e-10)
    assert torch.allclose(u.T @ u, torch.eye(count, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(v.T @ v, torch.eye(count, dtype=torch.float64), atol=1e-10)


@given(SHAPES, st.integers(1, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_truncation_error_is_the_tail(shape, rank):
    a, b = factors(*shape)
    found = lowrank.decompose(a, b)
    rank = min(rank, len(found.s))
    small_a, small_b = lowrank.truncate(found, rank)
    measured = float((small_b @ small_a - b @ a).norm())
    assert measured == pytest.approx(lowrank.tail_error(found.s, rank), rel=1e-9, abs=1e-10 * float(found.s[0]))


@given(SHAPES, st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_norm_does_not_depend_on_the_gauge(shape, other_seed):
    a, b = factors(*shape)
    rank = shape[2]
    turn = torch.linalg.qr(factors(rank, rank, rank, other_seed)[0])[0]
    a2, b2 = turn @ a, b @ turn.T
    dense = b @ a
    assert lowrank.norm(a2, b2) == pytest.approx(float(dense.norm()), rel=1e-10)


def test_signs_are_fixed_so_that_equal_products_give_equal_factors():
    a, b = factors(9, 7, 3, 1)
    first = lowrank.truncate(lowrank.decompose(a, b), 2)
    second = lowrank.truncate(lowrank.decompose(-a, -b), 2)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(first, second, strict=True))
    left, _ = lowrank.decompose(a, b).bases(3)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_singular_values_of_a_badly_scaled_pair_keep_their_digits():
    """Factors whose columns differ by ten orders of magnitude: a Gram matrix would lose the small ones."""
    a, b = factors(40, 30, 4, 2)
    scales = torch.tensor([1e5, 1.0, 1e-5, 1e-3], dtype=torch.float64)
    found = lowrank.decompose(a / scales[:, None], b * scales)
    assert torch.allclose(found.s, torch.linalg.svdvals(b @ a)[:4], rtol=1e-8)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_rank_for_energy_is_the_smallest_that_holds_the_share(share):
    s = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    rank = lowrank.rank_for_energy(s, share)
    energy = s.square().cumsum(0) / s.square().sum()
    assert energy[rank - 1] >= share - 1e-12
    assert rank == 1 or energy[rank - 2] < share


def test_a_zero_matrix_has_no_rank():
    zero = torch.zeros(3, 5, dtype=torch.float64)
    found = lowrank.decompose(zero, torch.zeros(4, 3, dtype=torch.float64))
    assert lowrank.rank_for_energy(found.s, 0.9) == 0
    assert lowrank.numerical_rank(found) == 0


def test_inputs_are_not_changed():
    a, b = factors(6, 5, 3, 3, torch.float32)
    before = a.clone(), b.clone()
    lowrank.truncate(lowrank.decompose(a, b), 2)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
