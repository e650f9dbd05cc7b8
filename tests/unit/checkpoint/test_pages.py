"""The sums that tell which pages of a file are written."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge.checkpoint.pages import PAGE, page_sums, units

SUMS = [1502490496550982826, 447775459946881283]  # of the bytes 0, 1, ... 255, 0, 1, ...
begins, sizes = st.integers(0, 3 * PAGE), st.integers(0, 4 * PAGE)


def data_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@given(begins, sizes)
def test_units_cover_the_tensor_and_share_no_page(begin, size):
    found = units(begin, size)
    assert [edge for unit in found for edge in unit][:: max(1, 2 * len(found) - 1)] == ([0, size] if size else [])
    for (_, end), (following, _) in pairwise(found):
        assert end == following
        assert (begin + end) % PAGE == 0
    pages = [{(begin + byte) // PAGE for byte in (first, end - 1)} for first, end in found]
    assert all(len(page) == 1 for page in pages)
    assert len(set.union(set(), *pages)) == len(found)


@given(begins, sizes)
def test_one_sum_a_unit(begin, size):
    data = data_of(size)
    found = page_sums(memoryview(data), begin)
    assert found.dtype == np.uint64
    assert len(found) == len(units(begin, size))
    for (first, end), whole in zip(units(begin, size), found, strict=True):
        assert page_sums(memoryview(data[first:end]), begin + first).tolist() == [whole]


@given(begins, st.integers(1, 3 * PAGE), st.data())
def test_a_changed_bit_changes_its_units_sum_alone(begin, size, draw):
    data = data_of(size)
    before = page_sums(memoryview(data), begin)
    place, bit = draw.draw(st.integers(0, size - 1)), draw.draw(st.integers(0, 7))
    data[place] ^= 1 << bit
    after = page_sums(memoryview(data), begin)
    wrong = [unit for unit, same in zip(units(begin, size), before == after, strict=True) if not same]
    assert [first <= place < end for first, end in wrong] == [True]


@pytest.mark.parametrize("shift", [8, 16, 2048])
def test_words_that_change_places_change_the_sum(shift):
    data = data_of(PAGE)
    assert page_sums(memoryview(data), 0) != page_sums(memoryview(np.roll(data, shift)), 0)


def test_sums_are_those_that_journals_hold():
    """A journal that another version left must still be read."""
    counting = np.arange(PAGE + 100, dtype=np.uint32).astype(np.uint8)
    assert page_sums(memoryview(counting), 0).tolist() == SUMS
    assert page_sums(memoryview(np.zeros(PAGE, np.uint8)), 0).tolist() == [0]
