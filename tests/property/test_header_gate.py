"""The gate in front of safetensors files: what passes here passes in the library, and bad bytes give one error."""

import itertools
from dataclasses import astuple

import pytest
import safetensors
import torch
from blake3 import blake3
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loraforge.adapter import DTYPES, raw_bytes
from loraforge.adapter.mapped import map_tensors
from loraforge.adapter.tensors import dtype_name
from loraforge_registry.errors import ConflictError, HeaderError
from loraforge_registry.header import Header, encode_header, header_length, parse_header, read_header
from loraforge_registry.ingest import TensorHasher
from tests.bad_files import file_bytes
from tests.strategies import mutated, safetensors_files

FEW = settings(max_examples=150)
MANY = settings(max_examples=600)


def gate(data: bytes) -> Header:
    """The two checks that ``read_header`` makes, without a file."""
    length = header_length(data[:32], len(data))
    return parse_header(data[8 : 8 + length], len(data))


@FEW
@given(safetensors_files())
def test_well_formed_files_pass(data):
    theirs = dict(safetensors.deserialize(data))
    ours = {entry.name: entry for entry in gate(data).tensors}
    assert {name: (t.dtype, list(t.shape)) for name, t in ours.items()} == {
        name: (info["dtype"], info["shape"]) for name, info in theirs.items()
    }


@MANY
@given(mutated(safetensors_files()) | st.binary(max_size=80) | st.binary(max_size=80).map(file_bytes))
@example(file_bytes(b"{}"))
@example(file_bytes(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)))
@example(file_bytes(b'{"a":{"dtype":"F32","shape":[0,18446744073709551615],"data_offsets":[0,0]}}'))
@example(file_bytes(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', bytes(1)))
@example(file_bytes(b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}', bytes(3)))
@example(file_bytes(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', bytes(1)))
@example(file_bytes(b'{"__metadata__":{"a":1}}'))
def test_nothing_passes_that_the_library_refuses(data):
    try:
        header = gate(data)
    except HeaderError:
        return
    found = {name: bytes(info["data"]) for name, info in safetensors.deserialize(data)}
    assert {t.name: data[header.data_start + t.begin : header.data_start + t.end] for t in header.tensors} == found


@FEW
@given(mutated(safetensors_files()))
def test_a_file_is_read_as_its_bytes_are(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data)
    with path.open("rb") as file:
        outcomes = [outcome(lambda: gate(data)), outcome(lambda: read_header(file.fileno()))]
    assert outcomes[0] == outcomes[1]


def outcome(read):
    try:
        return astuple(read())
    except HeaderError as error:
        return str(error)


@MANY
@given(safetensors_files(), st.data())
def test_every_flipped_bit_of_a_header_is_refused_or_another_header(data, draw):
    length = header_length(data[:32], len(data))
    position = draw.draw(st.integers(0, 8 * (8 + length) - 1))
    flipped = bytearray(data)
    flipped[position // 8] ^= 1 << position % 8
    try:
        header = gate(bytes(flipped))
    except HeaderError:
        return
    assert header.raw != gate(data).raw


shapes = st.lists(st.integers(0, 4), max_size=3)
names = st.text("abc._é/0", min_size=1, max_size=6)


@st.composite
def torch_tensors(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(shapes)
    count = 1
    for dimension in shape:
        count *= dimension
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


@FEW
@given(st.dictionaries(names, torch_tensors(), min_size=1, max_size=5))
def test_what_is_written_is_what_the_library_writes(tensors):
    start = encode_header((name, dtype_name(t), tuple(t.shape)) for name, t in tensors.items())
    size = len(start) + sum(t.numel() * t.itemsize for t in tensors.values())
    order = parse_header(start[8:], size).tensors
    written = start + b"".join(bytes(raw_bytes(tensors[entry.name])) for entry in order)
    assert written == save(tensors, metadata={"format": "pt"})


@FEW
@given(st.dictionaries(names, torch_tensors(), min_size=1, max_size=5))
def test_mapped_tensors_are_the_file_s(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "mapped.safetensors"
    path.write_bytes(save(tensors))
    with path.open("rb") as file:
        found = map_tensors(file.fileno(), read_header(file.fileno()))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(raw_bytes(found[name])) == bytes(raw_bytes(tensor))


@FEW
@given(safetensors_files(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_tensors_are_hashed_whatever_the_chunks(data, sizes):
    header = gate(data)
    hasher = TensorHasher(header)
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(data):
            break
        hasher.feed(data[position : position + size])
        position += size
    hasher.check_complete()
    found = {tensor.entry.name: tensor.digest.raw for tensor in hasher.tensors}
    expected = {
        t.name: blake3(data[header.data_start + t.begin : header.data_start + t.end]).digest() for t in header.tensors
    }
    assert found == expected


@FEW
@given(mutated(safetensors_files()), safetensors_files())
def test_a_file_that_is_not_the_header_s_is_noticed(other, data):
    header = gate(data)
    assume(len(other) != len(data) or other[: header.data_start] != data[: header.data_start])
    with pytest.raises(ConflictError):
        _hash(header, other)


def _hash(header: Header, data: bytes) -> None:
    hasher = TensorHasher(header)
    hasher.feed(data)
    hasher.check_complete()
