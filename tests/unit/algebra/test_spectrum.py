"""Spectra against dense float64, and the numbers that are made of them against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank
from loraforge.compose import spectra
from loraforge.errors import NumericalError
from loraforge_registry.spectrum import Spectrum

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**31))
VALUES = st.lists(st.floats(0, 1e300), min_size=1, max_size=40).map(lambda found: sorted(found, reverse=True))


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SHAPES)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_singular_values_are_those_of_the_product(shape):
    m, n, rank, seed = shape
    a, b = random((rank, n), seed), random((m, rank), seed + 1)
    dense = torch.linalg.svdvals(b @ a)
    found = lowrank.singular_values(a, b)
    assert len(found) == min(m, n, rank)
    assert torch.allclose(found, dense[: len(found)], rtol=1e-10, atol=1e-12 * float(dense[0]))


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [("linear", (3, 9), (7, 3)), ("embedding", (3, 9), (7, 3)), ("conv2d", (3, 4, 2, 2), (5, 3, 1, 1))],
)
def test_a_spectrum_has_the_scale_in_it(kind, a, b):
    pair = LowRank(kind, random(a, 1), random(b, 2), alpha=-6.0)
    dense = torch.linalg.svdvals(pair.delta().flatten(1))
    found = spectra(Adapter({"m.q": pair}))["m.q"]
    assert found.values == pytest.approx(dense[:3].tolist(), rel=1e-10)
    assert found.norm == pytest.approx(float(pair.delta().norm()), rel=1e-10)


def test_what_has_none_or_no_numbers():
    grouped = LowRank("conv2d", random((4, 1, 3, 3), 1), random((8, 2, 1, 1), 2), alpha=4.0)
    assert spectra(Adapter({"m.conv": grouped})) == {}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericalError, match=r"m\.q.*A holds"):
            spectra(Adapter({"m.q": LowRank("linear", random((2, 3), 1) * bad, random((3, 2), 2), alpha=2.0)}))
    far = LowRank("linear", random((2, 3), 1) * 1e200, random((3, 2), 2) * 1e200, alpha=2.0)
    with pytest.raises(NumericalError, match="beyond the range"):
        spectra(Adapter({"m.q": far}))


@given(VALUES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_ranks_are_their_definitions(values):
    found, s = Spectrum(tuple(values)), np.array(values) / (values[0] or 1.0)
    if not values[0]:
        assert (found.stable_rank, found.effective_rank, found.rank_for(0.99)) == (0.0, 0.0, 0)
        return
    assert found.norm == pytest.approx(np.linalg.norm(s) * values[0], rel=1e-12)
    assert found.stable_rank == pytest.approx((s**2).sum(), rel=1e-9)
    p = s[s / s.sum() > 0] / s.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert 1 - 1e-9 <= found.effective_rank <= len(values) * (1 + 1e-9)
    for share in (0.5, 0.9, 0.99, 1.0):
        k = found.rank_for(share)
        energy = np.cumsum(s**2)
        assert energy[k - 1] >= share * energy[-1] * (1 - 1e-12)
        assert k == 1 or energy[k - 2] < share * energy[-1] * (1 + 1e-12)


def test_equal_values_have_full_rank_and_one_has_rank_one():
    assert Spectrum((3.0,) * 5).effective_rank == pytest.approx(5)
    assert Spectrum((3.0,) * 5).stable_rank == pytest.approx(5)
    assert Spectrum((3.0, 0.0)).effective_rank == 1
