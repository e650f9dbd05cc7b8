"""Tensors of a safetensors file, mapped: opening costs the header, a page is read when it is used."""

import mmap

import torch
from torch import Tensor

from loraforge.adapter import DTYPES
from loraforge.errors import HeaderError
from loraforge_registry.header import Header, TensorEntry


def map_tensors(fd: int, header: Header) -> dict[str, Tensor]:
    """Return the tensors of an open file by name; they stay valid after it is closed.

    The mapping is private: writing into a tensor never reaches the file. The file must not be truncated while the
    tensors live; what lies in a store never is.

    Raises:
        HeaderError: an element type that no adapter tensor has.
    """
    if not any(entry.end > entry.begin for entry in header.tensors):
        return {entry.name: torch.empty(entry.shape, dtype=_dtype(entry)) for entry in header.tensors}
    mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    return {entry.name: _tensor(mapping, header.data_start, entry) for entry in header.tensors}


def _tensor(mapping: mmap.mmap, data_start: int, entry: TensorEntry) -> Tensor:
    dtype = _dtype(entry)
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    start = data_start + entry.begin
    if start % dtype.itemsize:  # legal in the format, but kernels expect aligned elements
        copied = bytearray(mapping[start : data_start + entry.end])
        return torch.frombuffer(copied, dtype=dtype).reshape(entry.shape)
    return torch.frombuffer(mapping, dtype=dtype, count=entry.elements, offset=start).reshape(entry.shape)


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise HeaderError(f"tensor {entry.name!r} is {entry.dtype}; expected one of {', '.join(DTYPES)}")
    return DTYPES[entry.dtype]
