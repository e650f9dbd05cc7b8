"""Undo records: what was put in comes out, and damaged bytes say so."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge.checkpoint.residual import ResidualWriter, decode
from loraforge.errors import FormatError
from tests.strategies import mutated

SIZES = (1, 2, 4, 8)


def kind(itemsize):
    return np.dtype(f"<i{itemsize}")


def encoded(itemsize, *blocks):
    writer = ResidualWriter(itemsize)
    for places, differences in blocks:
        begin = int(places[0]) // 2 if len(places) else 0  # a block begins somewhere before them
        writer.add(begin, np.asarray(places, np.int64) - begin, np.asarray(differences, kind(itemsize)))
    return writer.encode()


@st.composite
def records(draw):
    """(elements, item size, places, differences)"""
    itemsize = draw(st.sampled_from(SIZES))
    elements = draw(st.sampled_from([1, 7, 300, 2**40]))
    places = sorted(draw(st.sets(st.integers(0, elements - 1), max_size=min(elements, 30))))
    near, any_ = st.integers(-2, 2), st.integers(np.iinfo(kind(itemsize)).min, np.iinfo(kind(itemsize)).max)
    differences = draw(st.lists(near | any_, min_size=len(places), max_size=len(places)))
    return elements, itemsize, places, differences


@given(records(), st.data())
def test_round_trip_however_it_is_cut_into_blocks(record, data):
    elements, itemsize, places, differences = record
    cut = data.draw(st.integers(0, len(places)))
    blocks = [(places[:cut], differences[:cut]), ([], []), (places[cut:], differences[cut:])]
    raw = encoded(itemsize, *blocks)
    assert raw == encoded(itemsize, (places, differences))
    found = decode(raw, elements, itemsize)
    assert found.places.tolist() == places
    assert found.differences.tolist() == differences
    assert found.differences.dtype == kind(itemsize)


@given(records(), st.integers(0, 300), st.integers(0, 300))
def test_within_gives_what_lies_there(record, begin, length):
    elements, itemsize, places, differences = record
    found = decode(encoded(itemsize, (places, differences)), elements, itemsize).within(begin, begin + length)
    expected = [(p - begin, d) for p, d in zip(places, differences, strict=True) if begin <= p < begin + length]
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


@pytest.mark.parametrize("itemsize", SIZES)
def test_nothing_to_correct_is_nearly_nothing(itemsize):
    raw = encoded(itemsize)
    assert len(raw) < 150
    assert decode(raw, 0, itemsize).places.tolist() == []
    assert decode(raw, 10**9, itemsize).within(0, 10**9)[0].tolist() == []


def test_one_element_in_a_hundred_takes_about_a_byte():
    generator = np.random.default_rng(0)
    places = np.flatnonzero(generator.random(4_000_000) < 0.01)
    differences = generator.choice(np.array([-1, 1], np.int16), len(places))
    raw = encoded(2, (places, differences))
    assert len(raw) < 1.35 * len(places)
    assert decode(raw, 4_000_000, 2).places.tolist() == places.tolist()


def reads_or_refuses(raw, elements, itemsize):
    try:
        found = decode(raw, elements, itemsize)
    except FormatError:
        return
    assert len(found.places) == len(found.differences) <= elements
    assert not len(found.places) or 0 <= found.places[0] <= found.places[-1] < elements
    assert (np.diff(found.places) > 0).all()


@given(mutated(records().map(lambda r: encoded(r[1], (r[2], r[3])))), st.integers(0, 400), st.sampled_from(SIZES))
def test_damaged_bytes_are_refused_or_make_sense(raw, elements, itemsize):
    reads_or_refuses(raw, elements, itemsize)


@given(st.binary(max_size=200), st.integers(0, 10**6), st.sampled_from(SIZES))
def test_any_bytes_are_refused_or_make_sense(raw, elements, itemsize):
    reads_or_refuses(raw, elements, itemsize)


def test_places_beyond_the_tensor_that_wrap_around():
    gap = (0x2B2B2B2B2B2B2B2B).to_bytes(8, "little")
    planes = [zlib.compress(bytes([byte]) * 3) for byte in gap] + [zlib.compress(b"\2" * 3)] * 2
    raw = (3).to_bytes(8, "little") + bytes([2]) + b"".join(len(p).to_bytes(8, "little") + p for p in planes)
    with pytest.raises(FormatError):
        decode(raw, 1000, 2)


@given(st.integers(0, 60), st.binary(min_size=1, max_size=40), st.sampled_from(SIZES))
def test_any_planes_are_refused_or_make_sense(count, plane, itemsize):
    """Well-formed DEFLATE of any numbers, for the low bytes of the places and all of the differences."""
    coded = zlib.compress((plane * 60)[:count])
    one = len(coded).to_bytes(8, "little") + coded
    raw = count.to_bytes(8, "little") + bytes([itemsize]) + one * 3 + bytes(8) * 5 + one * itemsize
    reads_or_refuses(raw, 2**28, itemsize)


def test_every_cut_is_refused():
    raw = encoded(2, ([3, 4, 700, 100_000], [1, -1, 300, -32768]))
    for length in range(len(raw)):
        with pytest.raises(FormatError):
            decode(raw[:length], 2**20, 2)
    with pytest.raises(FormatError):
        decode(raw + b"\0", 2**20, 2)


def test_of_another_tensor():
    raw = encoded(2, ([3, 9], [1, -1]))
    decode(raw, 10, 2)
    for elements, itemsize in ((9, 2), (1, 2), (10, 4), (10, 1)):
        with pytest.raises(FormatError):
            decode(raw, elements, itemsize)


def test_a_plane_that_would_unpack_to_more_than_it_may_is_not_unpacked():
    bomb = zlib.compress(bytes(50_000_000), 9)
    plane = len(bomb).to_bytes(8, "little") + bomb
    raw = (2).to_bytes(8, "little") + bytes([2]) + plane * 10
    with pytest.raises(FormatError):
        decode(raw, 100, 2)
